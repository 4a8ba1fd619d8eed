"""Workers without an engine for tests of the pool: they sample from prompt and seed, and can fail.

Real workers take half a minute to restart and cannot be slowed down. The same faults happen to real
ones in tests/integration/test_ray_chaos.py.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from delethink.engines.base import EngineCounts, WorkerState
from delethink.errors import WeightSyncError
from delethink.policy import Completion, Sampling, TokenListener
from delethink.types import StopReason, TokenIds

EOS = 1


def sampled(
    prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
) -> tuple[list[int], StopReason]:
    """Return the tokens that any worker samples: they depend on prompt and seed alone."""
    rng = random.Random(f"{list(prompt_ids)} {sampling.seed}")
    if rng.random() < 0.7:
        return [rng.randint(2, 9) for _ in range(max_new_tokens)], StopReason.LENGTH
    tokens = [rng.randint(2, 9) for _ in range(rng.randrange(max_new_tokens))]
    return [*tokens, EOS], StopReason.EOS


@dataclass(eq=False)
class FakeWorker:
    """One life of a worker, at ``seconds_per_token``; tests set faults on it while it runs."""

    index: int
    start_seconds: float = 20.0
    seconds_per_token: float = 0.01
    batch_size: int = 4
    start_error: Exception | None = None
    update_error: Exception | None = None
    update_seconds: float = 0.1
    raises: Callable[[TokenIds], Exception | None] = lambda prompt_ids: None
    answered_version: int | None = None
    has_places: bool = False  # samples batch_size chunks at once, as engines do; others wait

    version: int = 0
    dead: bool = False
    stopped: bool = False  # the process, as by SIGSTOP
    engine_stopped: bool = False
    asleep: bool = False
    started: int = 0  # chunks
    in_flight: int = 0
    most_in_flight: int = 0
    tokens: int = 0
    waiting: int = 0

    def __post_init__(self) -> None:
        self.places = asyncio.Semaphore(self.batch_size)

    async def start(self) -> WorkerState:
        await asyncio.sleep(self.start_seconds)
        if self.start_error:
            raise self.start_error
        self._check()
        return WorkerState(pid=100 + self.index, max_model_tokens=256, batch_size=self.batch_size)

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        return await self.stream(prompt_ids, max_new_tokens, sampling, lambda *_: None)

    async def stream(
        self,
        prompt_ids: TokenIds,
        max_new_tokens: int,
        sampling: Sampling,
        on_tokens: TokenListener,
    ) -> Completion:
        self.started += 1
        self.waiting += 1
        try:
            if self.has_places:
                await self.places.acquire()
        finally:
            self.waiting -= 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            tokens, stop = sampled(prompt_ids, max_new_tokens, sampling)
            for token in tokens:
                await asyncio.sleep(self.seconds_per_token)
                await self._wait_while_stopped()
                self.tokens += 1
                on_tokens((token,), (-0.5,))
            if (error := self.raises(prompt_ids)) is not None:
                raise error
        finally:
            self.in_flight -= 1
            self.places.release()
        return Completion(tuple(tokens), (-0.5,) * len(tokens), stop, self.version)

    async def health(self) -> EngineCounts:
        while self.stopped:
            self._check()
            await asyncio.sleep(1)
        self._check()
        return EngineCounts(steps=self.tokens, tokens=self.tokens, waiting=self.waiting)

    async def _wait_while_stopped(self) -> None:
        self._check()
        while self.stopped or self.engine_stopped:
            await asyncio.sleep(1)
            self._check()

    def _check(self) -> None:
        if self.dead:
            raise ConnectionError("is dead")

    async def update_weights(self, weights: Any, version: int) -> int:
        assert not self.in_flight, "weights change while chunks are being sampled"
        await self._wait_while_stopped()
        await asyncio.sleep(self.update_seconds)
        if self.update_error:
            raise self.update_error
        if weights == "refused":
            raise WeightSyncError("failed: they do not fit")
        self.version = version
        return version if self.answered_version is None else self.answered_version

    async def sleep(self) -> None:
        assert not self.in_flight
        self.asleep = True

    async def wake(self) -> None:
        self.asleep = False

    async def stop(self) -> None:
        self._check()

    def kill(self) -> None:
        self.dead = True


class FakeCluster:
    """Launches fakes and keeps them: ``lives[i]`` are those of worker i."""

    def __init__(self, num_workers: int, **settings: Any) -> None:
        self.lives: list[list[FakeWorker]] = [[] for _ in range(num_workers)]
        self.settings = settings

    def launch(self, index: int) -> FakeWorker:
        worker = FakeWorker(index, **self.settings)
        self.lives[index].append(worker)
        return worker

    def now(self, index: int) -> FakeWorker:
        """Return the present life of a worker."""
        return self.lives[index][-1]
