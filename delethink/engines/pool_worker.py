"""What a pool knows of a worker, of a chunk that somebody waits for, and of faults so far."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from delethink.engines.exchange import EngineCounts, Job, WorkerHandle
from delethink.policy import Completion, Sampling
from delethink.types import TokenIds

Outcome = Completion | Exception


@dataclass(eq=False)
class PoolWorker:
    """A worker over all its lives, as the pool sees it."""

    index: int
    name: str
    handle: WorkerHandle | None = None  # of its present life
    pid: int = 0  # on its own machine; 0 while it has none
    in_service: bool = False
    silent: bool = False  # for so long that its chunks were given to others
    given_up: bool = False  # it is not started again
    completions: int = 0  # that it has returned
    restarts: int = 0
    tokens_in_flight: int = 0  # of its chunks: prompts, and as many new tokens as they may have
    reason: str = ""  # why it was lost last

    life: int = 0  # counts its starts; the scheduler knows it by this too
    lost: asyncio.Future[str] | None = None  # ends its present life
    fruitless: int = 0  # starts without a chunk since
    failing_reports: int = 0  # in a row
    jobs: list[Job] = field(default_factory=list)  # to be handed over
    dropped: list[int] = field(default_factory=list)  # to be taken back
    heard: float = 0.0  # when it last reported
    progressed: float = 0.0  # when its engine last made a step, or had nothing to do
    pace: float = 0.0  # seconds per sampled token of a chunk, smoothed
    paced: int = 0  # chunks that the pace was measured on
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    counts: EngineCounts = field(default_factory=EngineCounts)  # of its present life
    taken: EngineCounts = field(default_factory=EngineCounts)  # as metrics last had them
    returned_tokens: int = 0  # in its present life
    given_chunks: int = 0  # returned since metrics were last taken
    busy_since: float | None = None
    busy_seconds: float = 0.0  # with a chunk, since metrics were last taken

    def take_busy_seconds(self, now: float) -> float:
        """How long it had a chunk since this was last asked."""
        if self.busy_since is not None:
            self.busy_seconds += now - self.busy_since
            self.busy_since = now
        seconds, self.busy_seconds = self.busy_seconds, 0.0
        return seconds

    def begin(self, now: float) -> None:
        """It has a chunk."""
        if self.idle.is_set():
            self.idle.clear()
            self.progressed = self.busy_since = now

    def rest(self, now: float) -> None:
        """It has none any more."""
        if not self.idle.is_set() and self.busy_since is not None:
            self.busy_seconds += now - self.busy_since
        self.busy_since = None
        self.idle.set()

    @property
    def is_dead(self) -> bool:
        """Whether it takes no chunks now: it is being restarted, or was given up."""
        return not self.in_service

    @property
    def key(self) -> tuple[int, int]:
        """Its present life, to the scheduler."""
        return self.index, self.life

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid})" if self.pid else self.name


@dataclass(eq=False, slots=True)
class Chunk:
    """A chunk that somebody waits for."""

    prompt_ids: TokenIds
    max_new_tokens: int
    sampling: Sampling
    deliver: Callable[[Outcome], None]
    key: int = 0
    attempts: int = 0


@dataclass
class Counts:
    """Faults and what they cost, since they were last asked for."""

    restarts: int = 0
    chunks_rescheduled: int = 0
    tokens_lost: int = 0  # sampled and never returned, as far as the worker had reported them
    late_answers: int = 0
    chunk_timeouts: int = 0
    chunks_failed: int = 0


def say(problem: BaseException) -> str:
    """What an error says, or at least its name."""
    return str(problem) or repr(problem)
