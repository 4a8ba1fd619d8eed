"""An engine in a thread of its own: tokens at once, the same completions, calls that end early."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

pytest.importorskip("torch")

from tiny_models import EOS, make_qwen2

from delethink import Sampling
from delethink.engines.transformers import TransformersEngine
from delethink.serve.local_engine import EngineThread

pytestmark = pytest.mark.integration


@pytest.fixture
def engine() -> TransformersEngine:
    return TransformersEngine(make_qwen2(0, vocab_size=16), [EOS], pad_id=0)


def test_a_completion_is_that_of_the_engine(engine: TransformersEngine) -> None:
    calls: list[Any] = [((5, 6), 12, Sampling(0.7, seed=i)) for i in range(4)]
    expected = [asyncio.run(engine.generate(*call)) for call in calls]
    heard: list[list[int]] = [[] for _ in calls]

    async def all_at_once(thread: EngineThread) -> list[Any]:
        streams = (
            thread.stream(*call, lambda ids, _, row=row: heard[row].extend(ids))
            for row, call in enumerate(calls)
        )
        return list(await asyncio.gather(*streams, *(thread.generate(*call) for call in calls)))

    with contextlib.closing(EngineThread(engine, [EOS])) as thread:
        done = asyncio.run(all_at_once(thread))
    assert [one.token_ids for one in done] == [one.token_ids for one in expected] * 2
    assert [tuple(ids) for ids in heard] == [one.token_ids for one in expected]
    assert [one.stop for one in done] == [one.stop for one in expected] * 2


def test_a_cancelled_call_ends_and_the_next_is_served(engine: TransformersEngine) -> None:
    async def leave(thread: EngineThread) -> int:
        heard: list[int] = []
        first = asyncio.Event()

        def listen(ids: Any, _: Any) -> None:
            heard.extend(ids)
            first.set()

        call = asyncio.ensure_future(thread.stream((5, 6), 100_000, Sampling(0.0), listen))
        await first.wait()
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
        await thread.generate((5, 6, 7), 3, Sampling(0.0))
        return len(heard)

    engine.model.lm_head.weight.data[EOS] = 0  # no sequence ends by itself
    with contextlib.closing(EngineThread(engine, [EOS])) as thread:
        assert asyncio.run(leave(thread)) < 1000


def test_an_error_of_the_engine_reaches_its_caller(engine: TransformersEngine) -> None:
    with (
        contextlib.closing(EngineThread(engine, [EOS])) as thread,
        pytest.raises(IndexError),
    ):
        asyncio.run(thread.generate((99,), 3, Sampling(0.0)))
