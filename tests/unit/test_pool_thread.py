"""A pool in a thread of its own, asked from event loops that come and go."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fake_workers import FakeCluster

from delethink.engines import pool_thread
from delethink.engines.pool import WorkerPool
from delethink.engines.pool_settings import PoolSettings
from delethink.engines.pool_thread import PoolThread
from delethink.engines.pool_worker import Chunk
from delethink.errors import PolicyError
from delethink.policy import Completion, Sampling

AT_ONCE = 32


class Listening(WorkerPool):
    """A pool that notes what it is asked, a list for each turn of its event loop."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.turns: list[list[Chunk]] = []
        self.withdrawn: list[Chunk] = []
        self._in_turn = False

    def submit(self, chunk: Chunk) -> None:
        if not self._in_turn:
            self._in_turn = True
            self.turns.append([])
            asyncio.get_running_loop().call_soon(self._end_turn)
        self.turns[-1].append(chunk)
        super().submit(chunk)

    def _end_turn(self) -> None:
        self._in_turn = False

    def withdraw(self, chunk: Chunk) -> None:
        self.withdrawn.append(chunk)
        super().withdraw(chunk)


@contextlib.contextmanager
def running(seconds_per_token: float = 0.0) -> Iterator[tuple[PoolThread, Listening]]:
    cluster = FakeCluster(2, start_seconds=0, seconds_per_token=seconds_per_token)
    pool = Listening(cluster.launch, 2, PoolSettings())
    with contextlib.closing(PoolThread(pool)) as thread:
        thread.start()
        thread.run(pool.start())
        yield thread, pool


async def reach(turns: int) -> None:
    """As many turns of this event loop: two after ``ask`` it has asked, and not yet handed over."""
    for _ in range(turns):
        await asyncio.sleep(0)


async def ask(thread: PoolThread, *seeds: int) -> list[Completion]:
    return await asyncio.gather(*[thread.sample((5, 6), 4, Sampling(seed=s)) for s in seeds])


def test_what_is_asked_in_a_turn_comes_in_a_turn() -> None:
    with running() as (thread, pool):
        done = asyncio.run(ask(thread, *range(AT_ONCE)))
        assert len(done) == AT_ONCE
        assert [len(turn) for turn in pool.turns] == [AT_ONCE]


def test_callers_in_threads_of_their_own_have_their_own_answers() -> None:
    with running() as (thread, _), ThreadPoolExecutor(4) as others:
        alone = {seed: asyncio.run(ask(thread, seed))[0] for seed in range(AT_ONCE)}

        def call(first: int) -> list[Completion]:
            seeds = [*range(first, AT_ONCE), *range(first)]
            done = asyncio.run(ask(thread, *seeds))
            return [done[seeds.index(seed)] for seed in range(AT_ONCE)]

        for done in others.map(call, range(8)):
            assert done == list(alone.values())


@pytest.mark.parametrize("turns", [2, 3, 4])
def test_what_is_not_waited_for_any_more_is_withdrawn(turns: int) -> None:
    with running(seconds_per_token=100) as (thread, pool):

        async def give_up() -> None:
            waiting = asyncio.ensure_future(ask(thread, 1, 2))
            await reach(turns)
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting

        asyncio.run(give_up())
        thread.run(asyncio.sleep(0))  # the pool has heard of it
        assert pool.withdrawn == pool.turns[0]
        assert pool.num_waiting == 0
        assert all(pool.chunks_at(worker) == 0 for worker in pool.workers)


@pytest.mark.parametrize("when", ["after it was asked", "while it is sampled"])
def test_who_waits_when_it_is_closed_is_told_so(when: str) -> None:
    with running(seconds_per_token=100) as (thread, pool):

        async def ask_and_close() -> None:
            waiting = asyncio.ensure_future(ask(thread, 1))
            await reach(2)
            while when == "while it is sampled" and not pool.turns:
                await asyncio.sleep(0.01)
            thread.close()
            async with asyncio.timeout(10):
                await waiting

        with pytest.raises(PolicyError, match="the pool is closed"):
            asyncio.run(ask_and_close())


@pytest.mark.parametrize(
    "use", [lambda thread: thread.run(asyncio.sleep(0)), lambda thread: asyncio.run(ask(thread, 1))]
)
def test_a_closed_one_says_so(use: Callable[[PoolThread], object]) -> None:
    with running() as (thread, _):
        thread.close()
        assert not thread.is_open
        with pytest.raises(PolicyError, match="the pool is closed"):
            use(thread)
        thread.close()


def test_a_caller_that_is_gone_harms_nobody() -> None:
    with running() as (thread, _):
        loop = asyncio.new_event_loop()
        left = loop.create_task(ask(thread, *range(8)))  # never cancelled, never awaited
        left._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.run_until_complete(reach(2))
        loop.close()
        assert len(asyncio.run(ask(thread, *range(AT_ONCE)))) == AT_ONCE


def test_what_does_not_end_in_time_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(WorkerPool):
        async def close(self) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr(pool_thread, "_CLOSE_TIMEOUT_S", 0.1)
    cluster = FakeCluster(2, start_seconds=0)
    thread = PoolThread(Endless(cluster.launch, 2, PoolSettings()))
    thread.start()
    pool = thread._pool
    thread.run(pool.start())
    thread.close()
    thread.close()
    assert all(life.dead for lives in cluster.lives for life in lives)
    assert pool.workers == []
