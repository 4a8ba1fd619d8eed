"""Clients of other projects against ``delethink serve``; a model without a chat template."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("torch")

import openai
from chat_tokenizers import make_chat_tokenizer
from installed import need
from lm_eval_task import run_lm_eval
from serve_command import serve_command
from served import service_of
from tiny_models import make_qwen2

from delethink import ChunkSpec, Sampling, ScriptedPolicy, run_rollouts
from delethink.cli.main import main
from delethink.config import EngineConfig
from delethink.engines.factory import make_engine
from delethink.engines.loading import load_tokenizer
from delethink.envs.automaton import AutomatonTask
from delethink.serve.start import listen, serve_forever
from delethink.tokenization import query_ids, reward_text

pytestmark = pytest.mark.integration

SIZES = ["-C", "90", "--carryover-size", "45", "--head-size", "0", "--max-chunks", "25"]
SPEC = ChunkSpec(90, 45, 25, 0)
PROBLEMS = [AutomatonTask(3, 12).problem("heldout", i) for i in range(8)]
PROMPT = "99:" + "01" * 6  # an automaton; its thinking crosses boundaries


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("serve")
    options = ["-m", "toy", *SIZES, "--answer-tokens", "16", "engine=transformers"]
    with serve_command(folder, *options) as (address, _):
        yield address


def messages(prompt: str) -> Any:
    return [{"role": "user", "content": prompt}]


@pytest.mark.filterwarnings("ignore")  # of its own types, for pydantic
@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm_reads_thinking_and_answer(
    url: str, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would be downloaded
    litellm = pytest.importorskip("litellm")
    given = {"model": f"{provider}/toy", "api_base": url, "api_key": "any", "temperature": 0}
    given |= {"messages": messages(PROMPT), "num_retries": 0}

    async def later() -> tuple[Any, list[Any]]:
        stream = await litellm.acompletion(**given, stream=True)
        return await litellm.acompletion(**given), [piece async for piece in stream]

    whole = litellm.completion(**given)
    usage = {"include_usage": True}
    streams = [list(litellm.completion(**given, stream=True, stream_options=usage))]
    another, pieces = asyncio.run(later())
    streams.append(pieces)
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as asking:
        reply = asking.chat.completions.create(
            model="toy", messages=messages(PROMPT), temperature=0
        )
    expected = reply.choices[0].message
    assert reply.delethink["chunks"] > 1
    for each in (whole, another):
        message = each.choices[0].message
        assert (message.reasoning_content, message.content) == (
            expected.reasoning,
            expected.content,
        )
        assert each.choices[0].finish_reason == reply.choices[0].finish_reason
        assert each.usage.completion_tokens == reply.usage.completion_tokens
    for stream in streams:
        deltas = [piece.choices[0].delta for piece in stream if piece.choices]
        thinking = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        assert thinking == expected.reasoning
        assert "".join(delta.content or "" for delta in deltas) == expected.content
    assert streams[0][-1].usage.completion_tokens == reply.usage.completion_tokens
    with pytest.raises(litellm.NotFoundError, match="this server has 'toy'"):
        litellm.completion(**{**given, "model": f"{provider}/other"})


def test_the_client_in_the_guide_prints_its_transcript(url: str, tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "serve.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(import openai\n.*?)```", guide, re.DOTALL)
    (printed,) = re.findall(r"```\n(10:1.*?)```", guide, re.DOTALL)
    assert "http://127.0.0.1:8100/v1" in code
    code = code.replace("http://127.0.0.1:8100/v1", url)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "".join(done.stdout.split()) == "".join(printed.split())


@pytest.mark.slow
def test_lm_eval_scores_a_task_from_a_file(url: str, tmp_path: Path) -> None:
    need("lm_eval")  # pip install 'lm-eval[api]'
    tokenizer: Any = load_tokenizer("toy")
    config = EngineConfig(name="transformers")
    engine = make_engine(config, "toy", None, tokenizer, is_trained=False)
    queries = [query_ids(tokenizer, problem) for problem in PROBLEMS]
    traces = asyncio.run(run_rollouts(engine, SPEC, queries, [Sampling(0.0)] * len(queries)))
    said = [reward_text(tokenizer, t.output_ids).partition("</think>")[2] for t in traces]
    right = [text == problem.answer for text, problem in zip(said, PROBLEMS, strict=True)]
    rows = [{"question": p.prompt, "answer": p.answer} for p in PROBLEMS]
    scored = run_lm_eval(tmp_path, url, "toy", rows, {"num_concurrent": 4})
    assert scored.exact_match == pytest.approx(sum(right) / len(right))
    assert sum(right) > 0
    assert scored.responses == said


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as base models are: it has no chat template."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_chat_tokenizer(None)
    model = make_qwen2(0, vocab_size=len(tokenizer), max_position_embeddings=512)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(str(folder)).chat_template is None
    return folder


def test_a_model_without_a_chat_template_takes_one_from_a_file(
    base_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    spec = ChunkSpec(40, 20, 4, 0)
    sizes = ["-C", "40", "--carryover-size", "20", "--head-size", "0", "--max-chunks", "4"]
    options = ["-m", str(base_model), *sizes, "--answer-tokens", "8", "--name", "base"]
    options += ["--chat-template", str(file), "engine=transformers"]
    with (
        serve_command(tmp_path, *options) as (address, _),
        openai.OpenAI(base_url=address, api_key="any", max_retries=0) as asking,
    ):
        reply = asking.chat.completions.create(
            model="base",
            messages=messages("Hi."),
            temperature=0,
            extra_body={"return_token_ids": True},
        )
    tokenizer: Any = load_tokenizer(str(base_model))
    config = EngineConfig(name="transformers")
    engine = make_engine(config, str(base_model), None, tokenizer, is_trained=False)
    query = tuple(tokenizer("<user>Hi.\n<assistant><think>")["input_ids"])
    (trace,) = asyncio.run(run_rollouts(engine, spec, [query], [Sampling(0.0)]))
    (choice,) = reply.choices
    assert choice.prompt_token_ids == list(query)
    assert choice.token_ids[: len(trace.output_ids)] == list(trace.output_ids)
    assert reply.delethink["chunks"] == 4
    assert choice.message.content


def test_a_broken_template_is_a_sentence_at_the_start(
    base_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] }")
    options = ["-m", str(base_model), "-C", "40", "--answer-tokens", "8", "engine=transformers"]
    monkeypatch.setattr("delethink.serve.start.serve_forever", lambda *_: None)
    assert main(["serve", "--port", "0", *options, "--chat-template", str(file)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "chat template" in line


def test_the_address_is_told_when_connections_are_taken() -> None:
    told: list[Any] = []

    def ready() -> None:
        with socket.create_connection(address, timeout=60) as connection:
            told.append(connection.getpeername())
        raise KeyboardInterrupt

    with contextlib.closing(listen("127.0.0.1", 0)) as sock:
        address = sock.getsockname()
        with contextlib.suppress(KeyboardInterrupt):
            serve_forever(service_of(ScriptedPolicy([])), sock, ready)
    assert told == [address]
