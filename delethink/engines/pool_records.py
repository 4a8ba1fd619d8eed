"""Records of the pool: pending chunks, workers over all their restarts, and counters."""

from __future__ import annotations

import asyncio
import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from delethink.engines.base import EngineCounts, WorkerHandle, WorkerState
from delethink.engines.scheduler import Request
from delethink.policy import Sampling, TokenListener
from delethink.tokens import Logprobs
from delethink.types import TokenIds

_PACE_WINDOW_CHUNKS = 32  # smoothing window for the pace of a worker


@dataclass(eq=False, slots=True, kw_only=True)
class PendingChunk(Request):
    """A chunk with a waiting caller of ``generate``."""

    prompt_ids: TokenIds
    max_new_tokens: int
    sampling: Sampling
    task: asyncio.Task[Any]  # the caller's
    listener: TokenListener | None = None  # of a streamed chunk
    is_heard: bool = False  # the caller has tokens of it
    attempts: int = 0
    assigned: asyncio.Future[None] = field(init=False)  # done once a worker has the chunk
    worker: WorkerRecord | None = None  # None unless in flight
    started: float = 0.0  # time of the assignment to the worker
    interruption: Exception | None = None

    def pass_on(self, token_ids: TokenIds, logprobs: Logprobs) -> None:
        """Give tokens to the caller."""
        assert self.listener is not None
        self.is_heard = True
        self.listener(token_ids, logprobs)

    def interrupt(self, error: Exception) -> None:
        """End the present attempt with an error, in the way of ``asyncio.timeout``."""
        if self.interruption is None:
            self.task.cancel()
        self.interruption = error


@dataclass(frozen=True)
class Activity:
    """Work of a worker, or of all, since metrics were last taken."""

    counts: EngineCounts
    chunks: int
    seconds: float  # with a chunk in flight

    @classmethod
    def total(cls, activities: Sequence[Activity]) -> Activity:
        """Add up the activities of workers; the seconds are those of the busiest."""
        counts = [EngineCounts(), *(activity.counts for activity in activities)]
        return cls(
            EngineCounts(*map(sum, zip(*map(dataclasses.astuple, counts), strict=True))),
            sum(activity.chunks for activity in activities),
            max((activity.seconds for activity in activities), default=0.0),
        )

    def rates(self) -> dict[str, float]:
        """Return the rates over the time with chunks in flight; none without such time.

        ``tokens_per_second``: sampled tokens. ``batch_occupancy``: mean chunks per forward pass.
        ``prefix_cache_hit_rate``: share of prompt tokens found in the prefix cache.
        """
        counts, rates = self.counts, {}
        if self.seconds:
            rates["tokens_per_second"] = counts.tokens / self.seconds
        if counts.steps:
            rates["batch_occupancy"] = counts.running / counts.steps
        if counts.prefix_queries:
            rates["prefix_cache_hit_rate"] = counts.prefix_hits / counts.prefix_queries
        return rates


@dataclass
class FaultCounts:
    """Faults since metrics were last taken."""

    restarts: int = 0
    chunks_rescheduled: int = 0
    chunks_handed_back: int = 0  # waited at a worker when new weights came
    tokens_lost: int = 0  # sampled by workers before their loss, an estimate from below
    chunk_timeouts: int = 0
    chunks_failed: int = 0


@dataclass(eq=False)
class WorkerRecord:
    """A worker over all its restarts."""

    index: int
    name: str
    handle: WorkerHandle | None = None  # in the present life, from one start to the next
    pid: int = 0  # 0 while there is no process
    batch_size: int = 0  # chunks sampled at once
    in_service: bool = False  # else starting, restarting or given up
    missed_heartbeat: bool = False  # its chunks went to other workers
    given_up: bool = False  # not restarted again
    reason: str = ""  # for the last loss
    restarts: int = 0
    completions: int = 0

    lost: asyncio.Future[str] = field(init=False, repr=False)  # reason for the end of the life
    failures: int = 0  # losses and failed starts since the last sampled chunk
    error_rounds: int = 0  # pauses after errors, in a row
    resting: bool = False  # after an error
    chunks: dict[PendingChunk, None] = field(default_factory=dict)  # in flight, the oldest first
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    health: asyncio.Task[None] = field(init=False, repr=False)
    heard: float = 0.0  # time of the last answer
    progressed: float = 0.0  # time of the last step of the engine, or without chunks
    pace: float = 0.0  # seconds per sampled token of a chunk, smoothed
    paced_chunks: int = 0
    returned_tokens: int = 0  # in the present life
    counts: EngineCounts = field(default_factory=EngineCounts)
    taken_counts: EngineCounts = field(default_factory=EngineCounts)  # when metrics were taken
    taken_completions: int = 0
    busy_since: float | None = None
    busy_seconds: float = 0.0  # with a chunk in flight, since metrics were taken

    def start_life(self, state: WorkerState, now: float) -> None:
        """Reset everything about the previous life."""
        self.pid, self.in_service, self.batch_size = state.pid, True, state.batch_size
        self.missed_heartbeat = self.resting = False
        self.lost = asyncio.get_running_loop().create_future()
        self.heard = self.progressed = now
        self.counts = self.taken_counts = EngineCounts()
        self.error_rounds = self.returned_tokens = self.paced_chunks = 0
        self.pace = 0.0
        self.idle.set()

    def add(self, chunk: PendingChunk, now: float) -> None:
        """Record a chunk as in flight."""
        chunk.worker, chunk.started = self, now
        self.chunks[chunk] = None
        if self.idle.is_set():
            self.idle.clear()
            self.progressed = self.busy_since = now

    def remove(self, chunk: PendingChunk, now: float) -> None:
        """Record the end of a chunk in flight."""
        chunk.worker = None
        del self.chunks[chunk]
        if not self.chunks:
            self.busy_seconds = self.busy_seconds_at(now)
            self.busy_since = None
            self.idle.set()

    def busy_seconds_at(self, now: float) -> float:
        """Return the seconds with a chunk in flight since metrics were taken."""
        return self.busy_seconds + (0.0 if self.busy_since is None else now - self.busy_since)

    def update_health(self, counts: EngineCounts, now: float) -> None:
        """Record an answer to ``health``."""
        self.heard = now
        if counts.steps != self.counts.steps or self.idle.is_set():
            self.progressed = now
        self.counts = counts

    def record_completion(self, chunk: PendingChunk, num_tokens: int, now: float) -> None:
        """Record a sampled chunk."""
        self.heard = now
        self.completions += 1
        self.returned_tokens += num_tokens
        self.failures = self.error_rounds = 0
        self.paced_chunks += 1
        pace = (now - chunk.started) / max(1, num_tokens)
        self.pace += (pace - self.pace) / min(self.paced_chunks, _PACE_WINDOW_CHUNKS)

    def take_activity(self, now: float) -> Activity:
        """Return the activity since the last call."""
        counts, taken = dataclasses.astuple(self.counts), dataclasses.astuple(self.taken_counts)
        activity = Activity(
            EngineCounts(*map(operator.sub, counts, taken)),
            self.completions - self.taken_completions,
            self.busy_seconds_at(now),
        )
        self.taken_counts, self.taken_completions = self.counts, self.completions
        self.busy_seconds = 0.0
        self.busy_since = None if self.busy_since is None else now
        return activity

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid})" if self.pid else self.name
