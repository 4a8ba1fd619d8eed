"""``delethink serve`` as a process of its own, over the shipped toy reasoner."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("torch")

import time

import openai
import psutil
import torch
from serve_command import serve_command
from tiny_models import make_qwen2

from delethink import ChunkSpec, Problem, Sampling, run_rollout
from delethink.cli.main import main
from delethink.config import EngineConfig
from delethink.engines.factory import make_engine
from delethink.engines.loading import load_tokenizer
from delethink.serve.start import listen
from delethink.tokenization import encode, query_ids, reward_text

pytestmark = pytest.mark.integration

SIZES = ["-C", "90", "--carryover-size", "45", "--head-size", "0", "--max-chunks", "25"]
SPEC = ChunkSpec(90, 45, 25, 0)
ANSWER = ["--answer-tokens", "16"]
LONG = "99:" + "01" * 6  # an automaton, whose thinking crosses boundaries


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("serve")
    options = ["-m", "toy", *SIZES, *ANSWER, "engine=transformers", "--log-requests"]
    with serve_command(folder, *options) as served:
        yield served


def messages(prompt: str) -> Any:
    return [{"role": "user", "content": prompt}]


def rollout(model: str, spec: ChunkSpec, prompt: str) -> Any:
    """Returns tokenizer, query, engine and greedy trace by the library itself."""
    torch.set_num_threads(1)  # the server has the other core
    tokenizer: Any = load_tokenizer(model)
    engine = make_engine(
        EngineConfig(name="transformers"), model, None, tokenizer, is_trained=False
    )
    query = query_ids(tokenizer, Problem(prompt, ""))
    trace = asyncio.run(run_rollout(engine, spec, query, Sampling(0.0)))
    return tokenizer, query, engine, trace


@pytest.mark.parametrize("prompt", ["05:011010011001", "20:110010011010"])
def test_a_greedy_trace_is_that_of_the_library(toy: tuple[str, Path], prompt: str) -> None:
    tokenizer, query, _, trace = rollout("toy", SPEC, prompt)
    asking = openai.OpenAI(base_url=toy[0], api_key="any", max_retries=0)
    reply = asking.chat.completions.create(
        model="toy",
        messages=messages(prompt),
        temperature=0,
        logprobs=True,
        extra_body={"return_token_ids": True},
    )
    (choice,) = reply.choices
    assert choice.prompt_token_ids == list(query)
    assert choice.token_ids == list(trace.output_ids)
    sampled = [value for chunk in trace.chunks for value in chunk.logprobs]
    given = [entry.logprob for entry in choice.logprobs.content]
    assert given == pytest.approx(sampled, abs=1e-4)
    text = reward_text(tokenizer, trace.output_ids)
    thinking, _, answer = text.partition("</think>")
    assert (choice.message.reasoning, choice.message.content) == (thinking, answer)
    assert reply.delethink["chunks"] == len(trace.chunks)
    assert choice.finish_reason == "stop"


def test_the_stream_is_the_whole_response(toy: tuple[str, Path]) -> None:
    async def both() -> tuple[Any, list[Any]]:
        async with openai.AsyncOpenAI(base_url=toy[0], api_key="any", max_retries=0) as asking:
            given: Any = {"model": "toy", "messages": messages(LONG), "temperature": 0}
            whole = await asking.chat.completions.create(**given)
            usage = {"include_usage": True}
            stream = await asking.chat.completions.create(
                **given, stream=True, stream_options=usage
            )
            return whole, [piece async for piece in stream]

    whole, pieces = asyncio.run(both())
    deltas = [piece.choices[0].delta for piece in pieces if piece.choices]
    message = whole.choices[0].message
    assert "".join(getattr(d, "reasoning_content", "") or "" for d in deltas) == message.reasoning
    assert "".join(delta.content or "" for delta in deltas) == message.content
    assert pieces[-1].usage == whole.usage


def make_endless_model(folder: Path) -> str:
    """Saves a random model with a window of 64 tokens, which ends neither thinking nor answer."""
    tokenizer: Any = load_tokenizer("toy")
    model = make_qwen2(0, vocab_size=len(tokenizer), max_position_embeddings=64)
    mark = encode(tokenizer, "</think>")
    with torch.no_grad():
        model.lm_head.weight[[tokenizer.eos_token_id, *mark]] = 0  # others have higher logits
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_thinking_ten_times_longer_than_the_window_finishes(tmp_path: Path) -> None:
    spec = ChunkSpec(24, 12, 60, 0)
    assert spec.budget > 10 * 64
    model = make_endless_model(tmp_path / "endless")
    tokenizer, _, engine, trace = rollout(model, spec, LONG)
    last, mark = trace.chunks[-1], encode(tokenizer, "</think>")
    prompt = last.prompt_ids + last.output_ids + mark
    answer = asyncio.run(engine.generate(prompt, 8, Sampling(0.0)))
    sizes = ["-C", "24", "--carryover-size", "12", "--head-size", "0", "--max-chunks", "60"]
    options = ["-m", model, *sizes, "--answer-tokens", "8", "--name", "endless"]
    with serve_command(tmp_path, *options, "engine=transformers") as (url, _):
        asking = openai.OpenAI(base_url=url, api_key="any", max_retries=0)
        (card,) = asking.models.list().data
        given: Any = {"model": "endless", "messages": messages(LONG), "temperature": 0}
        reply = asking.chat.completions.create(**given, extra_body={"return_token_ids": True})
        with pytest.raises(openai.BadRequestError, match="at most 31: the model takes 64"):
            asking.chat.completions.create(**{**given, "messages": messages("0" * 50)})
    assert card.delethink["real_window"] == 64
    assert card.max_model_len > 10 * 64
    assert reply.choices[0].token_ids == [*trace.output_ids, *answer.token_ids]
    assert reply.delethink["forced_end"]
    assert reply.delethink["chunks"] == 60
    assert reply.choices[0].message.content


def test_requests_are_logged_without_their_texts(toy: tuple[str, Path]) -> None:
    url, log = toy
    asking = openai.OpenAI(base_url=url, api_key="any", max_retries=0)
    reply = asking.chat.completions.create(model="toy", messages=messages("07:000111000111"))
    deadline = time.monotonic() + 60
    while f"{reply.id}: 200 after" not in (lines := log.read_text("utf-8")):
        assert time.monotonic() < deadline, lines  # the line follows the response
        time.sleep(0.05)
    assert "000111000111" not in lines


@pytest.mark.slow
def test_memory_is_flat_over_the_chunks(tmp_path: Path) -> None:
    model = make_endless_model(tmp_path / "endless")
    sizes = ["-C", "24", "--carryover-size", "12", "--head-size", "0", "--max-chunks", "60"]
    options = ["-m", model, *sizes, "--answer-tokens", "8", "--name", "endless"]
    with serve_command(tmp_path, *options, "engine=transformers") as (url, _):
        asking = openai.OpenAI(base_url=url, api_key="any", max_retries=0)
        own = psutil.Process().children()
        (server,) = (each for each in own if each.cwd() == str(tmp_path))

        def resident(chunks: int) -> int:
            for _ in range(3):
                reply = asking.chat.completions.create(
                    model="endless",
                    messages=messages(LONG),
                    temperature=0,
                    extra_body={"delethink": {"max_chunks": chunks}},
                )
                assert reply.delethink["chunks"] == chunks
            return int(server.memory_info().rss)

        resident(2)
        few, many = resident(2), resident(60)
    assert abs(many - few) <= 0.03 * few, (few, many)


def test_keys_come_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = tmp_path / "keys"
    for text, wrong in (("", "has no key"), ("short\n", "at least 8 visible")):
        keys.write_text(text)
        assert main(["serve", "-m", "toy", "--port", "0", "--keys-file", str(keys)]) == 2
        assert wrong in capsys.readouterr().err
    missing = str(tmp_path / "none")
    assert main(["serve", "-m", "toy", "--port", "0", "--keys-file", missing]) == 2
    assert "cannot be read" in capsys.readouterr().err


WRONG = {
    "no model": ([], "name a model with -m, or a running server with --base-url"),
    "served": (["-m", "toy", "--served-model", "x"], "--served-model needs --base-url"),
    "carryover": (["-m", "toy", "-C", "90", "--carryover-size", "90"], "carryover_size"),
    "window": (["-m", "toy", "-C", "2k"], "the model takes 1024 tokens, and a context needs"),
    "mark": (
        ["-m", "toy", "-C", "90", "--answer-tokens", "9", "--end-of-thinking", "null"],
        "does not mark the end of its thinking",
    ),
    "unknown": (["-m", "./nowhere"], "does not exist"),
    "host": (["-m", "toy", "--host", "0.0.0.0"], "--keys-file"),
    "template": (
        ["-m", "toy", "-C", "90", "--answer-tokens", "9", "--chat-template", "nowhere.jinja"],
        "--chat-template nowhere.jinja cannot be read",
    ),
    "upstream": (["-m", "toy", "--base-url", "http://127.0.0.1:9/v1"], "cannot be reached"),
    "upstream alone": (["--base-url", "http://127.0.0.1:9/v1"], "name its tokenizer with -m"),
    "effort": (["-m", "toy", "--effort", "lwo=1k"], "Did you mean 'low'"),
    "name of carryover": (["-m", "toy", "--carryover", "tali"], "Did you mean 'tail'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_a_sentence_at_the_start(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    arguments, text = WRONG[name]
    assert main(["serve", "--port", "0", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert text in lines[0]


def test_a_port_in_use_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "-m", "toy", "-C", "90", "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


def test_pieces_are_sent_at_once() -> None:
    """Else each piece would wait for the client's word about the last one, some 40 ms."""

    async def delayed() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def on_client(reader: Any, writer: asyncio.StreamWriter) -> None:
            sock = writer.get_extra_info("socket")
            found.set_result(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        opened = listen("127.0.0.1", 0)
        async with await asyncio.start_server(on_client, sock=opened):
            _, writer = await asyncio.open_connection(*opened.getsockname())
            writer.close()
            return await found

    assert asyncio.run(delayed())
