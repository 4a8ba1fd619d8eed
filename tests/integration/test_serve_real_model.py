"""Clients of ``delethink serve`` over a pretrained model without a chat template.

DELETHINK_REAL_MODEL=FOLDER pytest -m slow tests/integration/test_serve_real_model.py
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("torch")

import openai
from installed import need
from lm_eval_task import run_lm_eval
from serve_command import serve_command

from delethink import ChunkSpec, Sampling, run_rollouts
from delethink.config import EngineConfig
from delethink.engines.factory import make_engine
from delethink.engines.loading import load_tokenizer
from delethink.tokens import TokenIds

FOLDER = os.environ.get("DELETHINK_REAL_MODEL")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="DELETHINK_REAL_MODEL names no folder with a model"),
]

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}thinking: {% endif %}"
)
SPEC = ChunkSpec(16, 8, 3)  # small, as a base model never ends its thinking by itself
ANSWER_TOKENS = 4
SIZES = ["-C", "16", "--carryover-size", "8", "--max-chunks", "3"]
QUESTIONS = ["What is the capital of France?", "How many days has a week? Count them."]
CLIENT_TIME_S = 3000  # the machine may be busy


class Reply(NamedTuple):
    """What a client reads."""

    thinking: str
    content: str


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "chat.jinja").write_text(TEMPLATE)
    options = ["-m", str(FOLDER), *SIZES, "--answer-tokens", str(ANSWER_TOKENS), "--name", "base"]
    options += ["--chat-template", "chat.jinja", "--query-tokens", "64", "engine=transformers"]
    with serve_command(folder, *options) as (address, log):
        yield address
        assert "</think> is assumed" in log.read_text("utf-8")


def messages(question: str) -> Any:
    return [{"role": "user", "content": question}]


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=CLIENT_TIME_S)


@pytest.fixture(scope="module")
def rollouts() -> list[tuple[TokenIds, TokenIds]]:
    """Query and greedy thinking of each question, by the library in this process."""
    tokenizer: Any = load_tokenizer(str(FOLDER))
    assert tokenizer.chat_template is None
    tokenizer.chat_template = TEMPLATE
    engine = make_engine(
        EngineConfig(name="transformers"), str(FOLDER), None, tokenizer, is_trained=False
    )
    queries = [
        tuple(
            tokenizer.apply_chat_template(
                messages(question), add_generation_prompt=True, return_dict=False
            )
        )
        for question in QUESTIONS
    ]
    traces = asyncio.run(run_rollouts(engine, SPEC, queries, [Sampling(0.0)] * len(queries)))
    assert all(len(trace.chunks) > 1 for trace in traces)
    return [(query, trace.output_ids) for query, trace in zip(queries, traces, strict=True)]


@pytest.fixture(scope="module")
def replies(url: str, rollouts: list[tuple[TokenIds, TokenIds]]) -> list[Reply]:
    """Replies to the official client, whose tokens are those of the library."""
    found = []
    with client(url) as asking:
        for question, (query, thinking) in zip(QUESTIONS, rollouts, strict=True):
            reply: Any = asking.chat.completions.create(
                model="base",
                messages=messages(question),
                temperature=0,
                extra_body={"return_token_ids": True},
            )
            (choice,) = reply.choices
            assert choice.prompt_token_ids == list(query)
            assert choice.token_ids[: len(thinking)] == list(thinking)
            assert len(choice.token_ids) == len(thinking) + ANSWER_TOKENS
            assert reply.delethink["chunks"] == SPEC.max_chunks
            assert reply.delethink["stop_reason"] == "budget"
            assert choice.message.content
            found.append(Reply(choice.message.reasoning, choice.message.content))
    return found


def test_the_official_client_streams_and_waits_alike(url: str, replies: list[Reply]) -> None:
    async def both() -> tuple[Reply, Reply]:
        async with openai.AsyncOpenAI(
            base_url=url, api_key="any", max_retries=0, timeout=CLIENT_TIME_S
        ) as asking:
            given: Any = {"model": "base", "messages": messages(QUESTIONS[0]), "temperature": 0}
            reply = await asking.chat.completions.create(**given)
            stream = await asking.chat.completions.create(**given, stream=True)
            deltas = [piece.choices[0].delta async for piece in stream]
        message = reply.choices[0].message
        thinking = "".join(getattr(delta, "reasoning", None) or "" for delta in deltas)
        content = "".join(delta.content or "" for delta in deltas)
        return Reply(message.reasoning, message.content), Reply(thinking, content)

    assert asyncio.run(both()) == (replies[0], replies[0])


@pytest.mark.filterwarnings("ignore")  # of its own types, for pydantic
def test_litellm_reads_thinking_and_answer(
    url: str, replies: list[Reply], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would be downloaded
    litellm = pytest.importorskip("litellm")
    given = {"model": "hosted_vllm/base", "api_base": url, "api_key": "any", "temperature": 0}
    given |= {"messages": messages(QUESTIONS[0]), "num_retries": 0, "timeout": CLIENT_TIME_S}
    message = litellm.completion(**given).choices[0].message
    assert Reply(message.reasoning_content, message.content) == replies[0]
    deltas = [piece.choices[0].delta for piece in litellm.completion(**given, stream=True)]
    thinking = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert Reply(thinking, "".join(delta.content or "" for delta in deltas)) == replies[0]


def test_lm_eval_reads_the_answers(url: str, replies: list[Reply], tmp_path: Path) -> None:
    need("lm_eval")  # pip install 'lm-eval[api]'
    rows = [
        {"question": question, "answer": reply.content if i == 0 else "never said"}
        for i, (question, reply) in enumerate(zip(QUESTIONS, replies, strict=True))
    ]
    options = {"num_concurrent": 1, "timeout": CLIENT_TIME_S}
    scored = run_lm_eval(tmp_path, url, "base", rows, options, CLIENT_TIME_S)
    assert scored.responses == [reply.content for reply in replies]
    assert scored.exact_match == pytest.approx(0.5)
