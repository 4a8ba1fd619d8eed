"""Workers without an engine for tests of the pool: they sample from prompt and seed, and can fail.

Real ones take half a minute to restart and cannot be made slow; what is tested here in virtual time
is tested with real ones in tests/integration/test_ray_chaos.py.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from delethink.engines.exchange import Answer, EngineCounts, Job, Report, WorkerState
from delethink.errors import WeightSyncError
from delethink.types import StopReason

EOS = 1


def sampled(job: Job) -> tuple[list[int], StopReason]:
    """What any worker makes of a job: a matter of its prompt and seed alone."""
    rng = random.Random(f"{job.prompt_ids} {job.seed}")
    if rng.random() < 0.7:
        return [rng.randint(2, 9) for _ in range(job.max_new_tokens)], StopReason.LENGTH
    tokens = [rng.randint(2, 9) for _ in range(rng.randrange(job.max_new_tokens))]
    return [*tokens, EOS], StopReason.EOS


@dataclass(eq=False)
class FakeWorker:
    """One life of a worker, at ``seconds_per_token``; faults are set on it as it goes."""

    index: int
    start_seconds: float = 20.0
    seconds_per_token: float = 0.01
    batch_size: int = 4
    start_error: Exception | None = None
    update_error: Exception | None = None
    update_seconds: float = 0.1
    raises: Callable[[Job], Exception | None] = lambda job: None
    said_version: int | None = None

    version: int = 0
    dead: bool = False
    stopped: bool = False  # as by SIGSTOP
    engine_stopped: bool = False
    asleep: bool = False
    started: list[Job] = field(default_factory=list)
    in_flight: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    most_in_flight: int = 0
    tokens: int = 0
    inbox: list[tuple[Sequence[Job], Sequence[int]]] = field(default_factory=list)
    reporting: asyncio.Task[None] | None = None

    async def start(self) -> WorkerState:
        await asyncio.sleep(self.start_seconds)
        if self.start_error:
            raise self.start_error
        self._check()
        return WorkerState(pid=100 + self.index, max_model_tokens=256, batch_size=self.batch_size)

    def attend(self, hear: Callable[[Report], None], lose: Callable[[Exception], None]) -> None:
        self.reporting = asyncio.ensure_future(self._report(hear, lose))

    async def _report(
        self, hear: Callable[[Report], None], lose: Callable[[Exception], None]
    ) -> None:
        try:
            while True:
                for _ in range(40):
                    if self.answers or self.dead or self.stopped:
                        break
                    await asyncio.sleep(0.05)
                await self._wait()
                self._take()
                answers, self.answers = self.answers, []
                hear(Report(answers, EngineCounts(steps=self.tokens, tokens=self.tokens)))
                await asyncio.sleep(0)
        except ConnectionError as error:
            lose(error)

    def send(self, jobs: Sequence[Job], dropped: Sequence[int]) -> None:
        self.inbox.append((jobs, dropped))
        if not (self.dead or self.stopped):
            self._take()

    def _take(self) -> None:
        for jobs, dropped in self.inbox:
            for job in jobs:
                self.started.append(job)
                self.in_flight[job.number] = asyncio.ensure_future(self._do(job))
            self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
            for number in dropped:
                if (task := self.in_flight.pop(number, None)) is not None:
                    task.cancel()
        self.inbox = []

    async def _do(self, job: Job) -> None:
        tokens, stop = sampled(job)
        for _ in tokens:
            await asyncio.sleep(self.seconds_per_token)
            while self.stopped or self.engine_stopped:
                await asyncio.sleep(1)
            self.tokens += 1
        error = self.raises(job)
        self.in_flight.pop(job.number, None)
        logprobs = [-0.5] * len(tokens)
        answer = Answer.pack(job.number, tokens, logprobs, stop, self.version)
        self.answers.append(answer._replace(error=error))

    async def _wait(self) -> None:
        self._check()
        while self.stopped:
            await asyncio.sleep(3)  # later than what it samples goes on
            self._check()

    def _check(self) -> None:
        if self.dead:
            raise ConnectionError("is dead")

    async def update(self, weights: Any, version: int) -> int:
        assert not self.in_flight, "weights change while chunks are being sampled"
        await self._wait()
        await asyncio.sleep(self.update_seconds)
        if self.update_error:
            raise self.update_error
        if weights == "refused":
            raise WeightSyncError("failed: they do not fit")
        self.version = version
        return version if self.said_version is None else self.said_version

    async def sleep(self) -> None:
        assert not self.in_flight
        self.asleep = True

    async def wake(self) -> None:
        self.asleep = False

    async def stop(self) -> None:
        self._check()

    def kill(self) -> None:
        self.dead = True
        tasks = [self.reporting] if self.reporting else []
        for task in [*tasks, *self.in_flight.values()]:
            task.cancel()


class FakeCluster:
    """Launches fakes and remembers them: ``lives[i]`` are those of worker i."""

    def __init__(self, num_workers: int, **settings: Any) -> None:
        self.lives: list[list[FakeWorker]] = [[] for _ in range(num_workers)]
        self.settings = settings

    def launch(self, index: int) -> FakeWorker:
        worker = FakeWorker(index, **self.settings)
        self.lives[index].append(worker)
        return worker

    def now(self, index: int) -> FakeWorker:
        """The present life of a worker."""
        return self.lives[index][-1]
