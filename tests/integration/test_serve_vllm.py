"""``delethink serve`` in front of a real vLLM server, and with vLLM in Ray workers of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

import openai
from installed import need
from serve_command import serve_command
from vllm_server import KEY, vllm_server

from delethink import ChunkSpec, Sampling, TraceStop, run_rollouts
from delethink.engines.loading import eos_ids, load_model, load_tokenizer
from delethink.tokenization import query_ids

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SPEC = ChunkSpec(60, 30, 9, 0)
OPTIONS = ["-C", "60", "--carryover-size", "30", "--head-size", "0", "--max-chunks", "9"]
OPTIONS += ["--answer-tokens", "20"]


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    need("vllm")
    with vllm_server(tmp_path_factory.mktemp("vllm")) as address:
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
        assert max(map(len, pieces)) <= 32  # not a whole chunk at a time
        return [token for ids in pieces for token in ids]

    async def everything() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as asking:
            for stream in (False, True):
                said = await asyncio.gather(*(ask(asking, p, stream) for p, _ in expected))
                assert [tuple(ids) for ids in said] == [ids for _, ids in expected]

    asyncio.run(everything())


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
        said = log.read_text("utf-8")
    assert "gets token ids back" in said
    assert KEY not in said


def test_with_vllm_in_workers_of_its_own(expected: Any, tmp_path: Path) -> None:
    need("vllm", "ray")
    engine = ["engine=vllm", "engine.dtype=float32", "engine.kv_cache_gib=0.25"]
    with serve_command(tmp_path, "-m", "toy", *OPTIONS, *engine) as (url, _):
        check(url, expected)
