"""Simulates the scheduler on clusters of any size, in virtual time.

An engine samples a batch of chunks side by side. A step gives each of them one token and takes

    step_seconds + sequence_seconds * (chunks in the batch)

and a prompt that enters the batch delays the others by ``prefill_seconds`` a token, except for the
tokens of a query in its prefix cache. Engines fail as ``Faults`` describes. The driver is one
process: a chunk reaches it a round trip after its end, and takes ``driver_seconds``.

Not simulated: the growth of attention within a chunk (times are those of the mean context), weight
updates, and engines of unequal speed.
"""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from delethink.chunking import ChunkSpec
from delethink.engines.scheduler import Rank, Request, Scheduler
from delethink.errors import ConfigError

_TOLERANCE_TOKENS = 1e-6  # for rounding errors
_CACHED_QUERIES = 4096  # in the prefix cache of an engine


@dataclass(frozen=True)
class ServiceTimes:
    """Service times of an engine, in seconds."""

    step_seconds: float  # per step, for any batch
    sequence_seconds: float  # per step and chunk in the batch
    prefill_seconds: float  # per prompt token

    def step(self, batch: int) -> float:
        """Return the seconds of one step."""
        return self.step_seconds + self.sequence_seconds * batch


@dataclass(frozen=True)
class Faults:
    """Failures of workers at random times, in seconds."""

    every: float  # mean time between two failures in the cluster
    hang_share: float = 0.5  # share of hangs; the other workers die
    heartbeat_timeout: float = 15.0  # until the chunks of a hanging worker go to others
    hang_timeout: float = 120.0  # until a hanging worker is restarted
    restart: float = 90.0  # duration of a restart


@dataclass(frozen=True)
class Cluster:
    """Workers, and the driver that gives them chunks."""

    num_workers: int
    batch_size: int  # chunks that an engine samples at once
    slots: int  # chunks that a worker holds
    times: ServiceTimes
    round_trip: float = 0.01  # seconds from a chunk's end to the arrival of the next
    driver_seconds: float = 0.0  # driver time per chunk
    faults: Faults | None = None

    def __post_init__(self) -> None:
        for name in ("num_workers", "batch_size", "slots"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Workload:
    """Traces of given lengths, unknown to the scheduler."""

    spec: ChunkSpec
    lengths: Sequence[int]
    query_tokens: int
    group_size: int = 1  # traces of one query, in a row

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError("every trace needs at least one token")
        if max(self.lengths) > self.spec.budget:
            raise ConfigError(
                f"a trace of {max(self.lengths)} tokens is longer than the budget of "
                f"{self.spec.budget}"
            )

    def chunks(self, length: int) -> list[tuple[int, int]]:
        """Return (prompt tokens beside the query, new tokens) of each chunk of a trace."""
        carried, size = 0, self.spec.context_size
        found = []
        while length > 0:
            new = min(length, size)
            found.append((carried, new))
            length -= new
            carried = self.spec.carryover_size
            size = self.spec.context_size - carried
        return found


class Moment(NamedTuple):
    """State of the cluster at one time."""

    seconds: float
    tokens: int  # sampled and returned so far
    ended: int  # traces
    waiting: int  # chunks
    in_flight: int
    workers: int  # in service


@dataclass
class Outcome:
    """Results of a simulation. Seconds are virtual, except for ``scheduler_seconds``."""

    makespan: float = 0.0
    bound_work: float = 0.0  # lower bound: all work spread evenly over full batches
    bound_trace: float = 0.0  # lower bound: the longest trace alone on an engine
    completions: int = 0  # chunks
    scheduler_seconds: float = 0.0  # CPU time on this machine
    driver_busy: float = 0.0
    rescheduled: int = 0  # chunks that were lost with a worker and sampled again
    failures: int = 0
    query_hits: int = 0  # chunks whose query was in the prefix cache
    ended: list[int] = field(default_factory=list)  # ends of each trace; 1 if all is right
    left_over: int = 0  # chunks in the scheduler after the end; 0 if all is right
    course: list[Moment] = field(default_factory=list)

    @property
    def lower_bound(self) -> float:
        """Return the larger of the two lower bounds."""
        return max(self.bound_work, self.bound_trace)

    @property
    def ratio(self) -> float:
        """Return makespan / lower bound."""
        return self.makespan / self.lower_bound

    @property
    def completions_per_second(self) -> float:
        """Return the chunks per second of the scheduler alone on this machine."""
        return self.completions / self.scheduler_seconds


def simulate(
    workload: Workload,
    cluster: Cluster,
    rank: Callable[[int, int], Rank],
    seed: int = 0,
    sample_every: float = 1.0,
) -> Outcome:
    """Simulate a workload to its end.

    Args:
        workload: the traces.
        cluster: the workers.
        rank: rank of a chunk, from the index of its trace and the number of chunks before it.
        seed: seed of the faults.
        sample_every: seconds between two entries of ``Outcome.course``.
    """
    return _Simulation(workload, cluster, rank, seed, sample_every).run()


class _Engine:
    """One engine; its clock counts the tokens of each chunk of its batch."""

    def __init__(self, times: ServiceTimes, batch_size: int) -> None:
        self.version = 0  # of the next end; ends of older versions are void
        self.failed = False
        self._times, self._batch_size = times, batch_size
        self._clock, self._updated, self._stalled = 0.0, 0.0, 0.0
        self._batch: list[tuple[float, int]] = []  # heap of (clock at the end, chunk)
        self._queue: deque[tuple[int, int, int]] = deque()
        self._queries: OrderedDict[int, None] = OrderedDict()

    def look_up(self, query: int) -> bool:
        """Return whether the query is in the prefix cache, and cache it."""
        seen = query in self._queries
        self._queries[query] = None
        self._queries.move_to_end(query)
        if len(self._queries) > _CACHED_QUERIES:
            self._queries.popitem(last=False)
        return seen

    def add(self, now: float, chunk: int, new: int, prompt: int) -> None:
        self._advance(now)
        self._queue.append((chunk, new, prompt))
        self._admit()

    def take(self, now: float) -> list[int]:
        """Return the chunks that have ended by now."""
        self._advance(now)
        ended = []
        while self._batch and self._batch[0][0] <= self._clock + _TOLERANCE_TOKENS:
            ended.append(heapq.heappop(self._batch)[1])
        self._admit()
        return ended

    def next_end(self) -> float | None:
        if not self._batch:
            return None
        left = max(0.0, self._batch[0][0] - self._clock)
        return self._updated + self._stalled + left * self._times.step(len(self._batch))

    def _advance(self, now: float) -> None:
        passed, self._updated = now - self._updated, now
        stalled = min(passed, self._stalled)
        self._stalled -= stalled
        if self._batch:
            self._clock += (passed - stalled) / self._times.step(len(self._batch))

    def _admit(self) -> None:
        while self._queue and len(self._batch) < self._batch_size:
            chunk, new, prompt = self._queue.popleft()
            heapq.heappush(self._batch, (self._clock + new, chunk))
            self._stalled += prompt * self._times.prefill_seconds


@dataclass(eq=False, slots=True, kw_only=True)
class _Chunk(Request):
    trace: int
    number: int = 0
    worker: int = 0


class _Simulation:
    def __init__(
        self,
        workload: Workload,
        cluster: Cluster,
        rank: Callable[[int, int], Rank],
        seed: int,
        sample_every: float,
    ) -> None:
        self.workload, self.cluster, self.rank = workload, cluster, rank
        self.sample_every = sample_every
        self.random = random.Random(seed)
        self.scheduler = Scheduler()
        self.engines: dict[int, _Engine] = {}
        self.lives, self.numbers = itertools.count(), itertools.count()
        self.in_flight: dict[int, _Chunk] = {}  # by number, the oldest first
        self.events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self.order = itertools.count()
        self.driver_free = 0.0
        self.remaining = list(workload.lengths)
        self.chunks = [0] * len(workload.lengths)
        self.tokens = 0
        self.num_ended = 0
        self.outcome = Outcome(ended=[0] * len(workload.lengths))

    def run(self) -> Outcome:
        outcome, cluster = self.outcome, self.cluster
        outcome.bound_work, outcome.bound_trace = bounds(self.workload, cluster)
        for _ in range(cluster.num_workers):
            self.join(0.0)
        for trace in range(len(self.remaining)):
            self.submit(trace)
        self.assign(0.0)
        if cluster.faults is not None:
            self.later(self.random.expovariate(1 / cluster.faults.every), self.fail)
        self.later(0.0, self.record)
        while self.num_ended < len(self.remaining):
            now, _, act, arguments = heapq.heappop(self.events)
            act(now, *arguments)
        outcome.makespan = now
        self.record(now)
        outcome.left_over = self.scheduler.num_waiting + len(self.in_flight)
        return outcome

    def later(self, when: float, act: Callable[..., None], *arguments: object) -> None:
        heapq.heappush(self.events, (when, next(self.order), act, arguments))

    def record(self, now: float) -> None:
        scheduler = self.scheduler
        self.outcome.course.append(
            Moment(
                now,
                self.tokens,
                self.num_ended,
                scheduler.num_waiting,
                len(self.in_flight),
                len(self.engines),
            )
        )
        self.later(now + self.sample_every, self.record)

    # -- the driver ----------------------------------------------------------------------------

    def submit(self, trace: int) -> None:
        spec, done = self.workload.spec, self.chunks[trace]
        tokens = self.workload.query_tokens + spec.context_size
        query = trace // self.workload.group_size
        self.scheduler.submit(_Chunk(tokens, query, self.rank(trace, done), trace=trace))

    def assign(self, now: float) -> None:
        began = time.thread_time()
        assigned = list(self.scheduler.assign())
        self.outcome.scheduler_seconds += time.thread_time() - began
        workers: dict[int, None] = {}
        for worker, chunk in assigned:
            self.start_chunk(now, cast(int, worker), cast(_Chunk, chunk))
            workers[cast(int, worker)] = None
        for worker_number in workers:
            self.schedule_end(worker_number)

    def receive(self, now: float, worker: int, numbers: list[int]) -> None:
        """Take completed chunks in."""
        if now < self.driver_free:
            self.later(self.driver_free, self.receive, worker, numbers)
            return
        busy = self.cluster.driver_seconds * len(numbers)
        self.driver_free = now + busy
        self.outcome.driver_busy += busy
        began = time.thread_time()
        for number in numbers:
            chunk = self.in_flight.pop(number, None)
            if chunk is not None:  # else it was rescheduled
                self.scheduler.release(worker, chunk)
                self.complete(chunk.trace)
        self.outcome.scheduler_seconds += time.thread_time() - began
        self.assign(now)

    def complete(self, trace: int) -> None:
        """Continue a trace after a chunk."""
        _, new = self.next_chunk(trace)
        self.outcome.completions += 1
        self.tokens += new
        self.remaining[trace] -= new
        self.chunks[trace] += 1
        if self.remaining[trace]:
            self.submit(trace)
        else:
            self.outcome.ended[trace] += 1
            self.num_ended += 1

    def next_chunk(self, trace: int) -> tuple[int, int]:
        """Return the carried and new tokens of the next chunk of a trace."""
        spec = self.workload.spec
        carried = spec.carryover_size if self.chunks[trace] else 0
        return carried, min(self.remaining[trace], spec.context_size - carried)

    # -- workers -------------------------------------------------------------------------------

    def join(self, now: float) -> None:
        worker = next(self.lives)
        self.engines[worker] = _Engine(self.cluster.times, self.cluster.batch_size)
        self.engines[worker].take(now)
        self.scheduler.add_worker(worker, self.cluster.slots)

    def start_chunk(self, now: float, worker: int, chunk: _Chunk) -> None:
        engine, trace = self.engines[worker], chunk.trace
        chunk.number, chunk.worker = next(self.numbers), worker
        self.in_flight[chunk.number] = chunk
        carried, new = self.next_chunk(trace)
        if engine.look_up(trace // self.workload.group_size):
            self.outcome.query_hits += 1
        else:
            carried += self.workload.query_tokens
        engine.add(now, chunk.number, new, carried)

    def schedule_end(self, worker: int) -> None:
        engine = self.engines[worker]
        engine.version += 1
        end = engine.next_end()
        if end is not None:
            self.later(end, self.end, worker, engine.version)

    def end(self, now: float, worker: int, version: int) -> None:
        """End the next chunk of an engine, unless something has changed since."""
        engine = self.engines.get(worker)
        if engine is None or engine.failed or engine.version != version:
            return
        if numbers := engine.take(now):
            self.later(now + self.cluster.round_trip, self.receive, worker, numbers)
        self.schedule_end(worker)

    def fail(self, now: float) -> None:
        faults = self.cluster.faults
        assert faults is not None
        self.later(now + self.random.expovariate(1 / faults.every), self.fail)
        well = [worker for worker, engine in self.engines.items() if not engine.failed]
        if not well:
            return
        worker = self.random.choice(well)
        self.engines[worker].failed = True
        self.outcome.failures += 1
        hangs = self.random.random() < faults.hang_share
        if hangs:
            self.later(
                now + min(faults.heartbeat_timeout, faults.hang_timeout),
                self.miss_heartbeat,
                worker,
            )
        self.later(now + (faults.hang_timeout if hangs else 1.0), self.lose, worker)

    def miss_heartbeat(self, now: float, worker: int) -> None:
        """Reschedule the chunks of a worker that has not answered for a while."""
        self.scheduler.pause(worker)
        self.reschedule(worker)
        self.assign(now)

    def reschedule(self, worker: int) -> None:
        for chunk in reversed([c for c in self.in_flight.values() if c.worker == worker]):
            del self.in_flight[chunk.number]
            self.scheduler.release(worker, chunk)
            self.scheduler.submit(chunk, first=True)
            self.outcome.rescheduled += 1

    def lose(self, now: float, worker: int) -> None:
        """Notice a failed worker."""
        assert self.cluster.faults is not None
        del self.engines[worker]
        self.reschedule(worker)
        self.scheduler.remove_worker(worker)
        self.later(now + self.cluster.faults.restart, self.come_back)
        self.assign(now)

    def come_back(self, now: float) -> None:
        self.join(now)
        self.assign(now)


def bounds(workload: Workload, cluster: Cluster) -> tuple[float, float]:
    """Return lower bounds of the makespan of any schedule without faults.

    Returns:
        Seconds for all work spread evenly over full batches, with each query encoded once; and for
        the longest trace alone on an engine.
    """
    times, batch = cluster.times, cluster.batch_size
    carried = sum(c for n in workload.lengths for c, _ in workload.chunks(n))
    queries = -(-len(workload.lengths) // workload.group_size) * workload.query_tokens
    decoding = sum(workload.lengths) * times.step(batch) / batch
    work = decoding + (carried + queries) * times.prefill_seconds
    longest = workload.chunks(max(workload.lengths))
    alone = sum(new * times.step(1) + c * times.prefill_seconds for c, new in longest)
    alone += workload.query_tokens * times.prefill_seconds
    return work / cluster.num_workers, alone + cluster.round_trip * len(longest)
