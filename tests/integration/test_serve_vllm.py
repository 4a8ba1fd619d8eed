"""``delethink serve`` in front of a real vLLM server, and with vLLM in Ray workers of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

import openai
import psutil
import vllm_server as vllm_server_module
from installed import need
from serve_command import serve_command
from vllm_server import KEY, vllm_server

from delethink import ChunkSpec, Sampling, TraceStop, run_rollouts
from delethink.engines.loading import eos_ids, load_model, load_tokenizer
from delethink.tokenization import query_ids

pytestmark = [pytest.mark.integration, pytest.mark.slow]

PARSER = "digits_tool_parser.py"
TOOLS: list[Any] = [{"type": "function", "function": {"name": "take", "parameters": {}}}]
SPEC = ChunkSpec(60, 30, 9, 0)
OPTIONS = ["-C", "60", "--carryover-size", "30", "--head-size", "0", "--max-chunks", "9"]
OPTIONS += ["--answer-tokens", "20"]


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    need("vllm")
    parser = ["--tool-parser-plugin", str(Path(vllm_server_module.__file__).parent / PARSER)]
    parser += ["--enable-auto-tool-choice", "--tool-call-parser", "digits"]
    with vllm_server(tmp_path_factory.mktemp("vllm"), "--enable-scale-out", *parser) as address:
        yield address


@pytest.fixture(scope="module")
def expected() -> list[tuple[Any, tuple[int, ...]]]:
    """Problems with their greedy traces, by transformers in this process."""
    from delethink.engines.transformers import TransformersEngine
    from delethink.envs.automaton import AutomatonTask

    tokenizer, model = load_tokenizer("toy"), load_model("toy", "float32")
    engine = TransformersEngine(model, eos_ids(model, tokenizer), int(tokenizer.pad_token_id))
    problems = [AutomatonTask(3, 12).problem("heldout", i) for i in range(8)]
    queries = [query_ids(tokenizer, problem) for problem in problems]
    traces = asyncio.run(run_rollouts(engine, SPEC, queries, [Sampling(0.0)] * len(queries)))
    assert all(trace.stop is TraceStop.COMPLETED for trace in traces)
    assert max(len(trace.chunks) for trace in traces) > 2
    return [(p.prompt, tuple(t.output_ids)) for p, t in zip(problems, traces, strict=True)]


def check(url: str, expected: list[tuple[Any, tuple[int, ...]]]) -> None:
    async def ask(asking: Any, prompt: str, stream: bool) -> list[int]:
        reply = await asking.chat.completions.create(
            model="toy",
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            stream=stream,
            extra_body={"return_token_ids": True},
        )
        if not stream:
            return list(reply.choices[0].token_ids)
        pieces = [getattr(piece.choices[0], "token_ids", []) async for piece in reply]
        assert len(next(filter(None, pieces))) < 60  # not a whole chunk at a time
        return [token for ids in pieces for token in ids]

    async def everything() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as asking:
            for stream in (False, True):
                said = await asyncio.gather(*(ask(asking, p, stream) for p, _ in expected))
                assert [tuple(ids) for ids in said] == [ids for _, ids in expected]

    asyncio.run(everything())


def check_tools(url: str, expected: list[tuple[Any, tuple[int, ...]]]) -> None:
    """A chat with tools thinks in the same tokens, and its answer becomes a call."""
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as asking:
        for stream in (False, True):
            said = asking.chat.completions.create(
                model="toy",
                messages=[{"role": "user", "content": expected[0][0]}],
                tools=TOOLS,
                temperature=0,
                stream=stream,
                extra_body={"return_token_ids": True},
            )
            choices = [piece.choices[0] for piece in said] if stream else [said.choices[0]]
            messages = [choice.delta if stream else choice.message for choice in choices]
            ids = [
                token for choice in choices for token in getattr(choice, "token_ids", None) or []
            ]
            assert tuple(ids) == expected[0][1]
            ((call,),) = [message.tool_calls for message in messages if message.tool_calls]
            digits = str(load_tokenizer("toy").decode(ids)).partition("</think>")[2]
            assert json.loads(call.function.arguments)["state"] == digits.removesuffix("<eos>")
            assert choices[-1].finish_reason == "tool_calls"
            assert not any(message.content for message in messages)


def test_in_front_of_a_vllm_server(
    vllm: str, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_OF_TEST", KEY)
    options = ["--base-url", vllm, "--api-key-env", "KEY_OF_TEST", *OPTIONS]
    with serve_command(tmp_path, *options, "--name", "toy") as (url, log):
        check(url, expected)
        with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as asking:
            plain = asking.chat.completions.create(
                model="toy",
                messages=[{"role": "user", "content": expected[0][0]}],
                temperature=0,
                extra_body={"chat_template_kwargs": {"enable_thinking": False}},
            )
        assert plain.choices[0].message.content
        check_tools(url, expected)
        said = log.read_text("utf-8")
    assert "gets token ids back" in said
    assert "requests may have tools" in said
    assert KEY not in said


def test_a_killed_worker_ends_no_stream(expected: Any, tmp_path: Path) -> None:
    need("vllm", "ray")
    engine = ["engine=vllm", "engine.dtype=float32", "engine.kv_cache_gib=0.25"]
    engine += ["engine.num_engines=2", "engine.cpus_per_engine=1"]
    prompts = [prompt for prompt, _ in expected] * 4

    async def read(asking: Any, prompt: str, begun: asyncio.Semaphore) -> tuple[int, ...]:
        stream = await asking.chat.completions.create(
            model="toy",
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            stream=True,
            extra_body={"return_token_ids": True},
        )
        ids = list[int]()
        async for piece in stream:
            begun.release()
            ids += getattr(piece.choices[0], "token_ids", None) or []
        return tuple(ids)

    async def everything(url: str, server: psutil.Process) -> list[tuple[int, ...]]:
        begun = asyncio.Semaphore(0)
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as asking:
            reading = asyncio.gather(*(read(asking, prompt, begun) for prompt in prompts))
            for _ in range(len(prompts)):
                await begun.acquire()
            workers = [p for p in server.children(recursive=True) if "VllmWorker" in p.name()]
            assert len(workers) == 2, [p.name() for p in server.children(recursive=True)]
            workers[0].kill()
            return await reading

    with serve_command(tmp_path, "-m", "toy", *OPTIONS, *engine) as (url, log):
        (server,) = [
            process
            for process in psutil.Process().children()
            if "delethink.cli.main" in " ".join(process.cmdline())
        ]
        said = asyncio.run(everything(url, server))
        assert said == [ids for _, ids in expected] * 4
        assert "is dead" in log.read_text("utf-8")
        check(url, expected)


def test_with_vllm_in_workers_of_its_own(expected: Any, tmp_path: Path) -> None:
    need("vllm", "ray")
    engine = ["engine=vllm", "engine.dtype=float32", "engine.kv_cache_gib=0.25"]
    with serve_command(tmp_path, "-m", "toy", *OPTIONS, *engine) as (url, _):
        check(url, expected)
