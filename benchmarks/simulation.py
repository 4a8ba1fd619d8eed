"""The scheduler against simulated engines, in virtual time: clusters that nobody here has.

An engine samples a batch of chunks side by side. A step gives each of them one token and takes

    step_seconds + sequence_seconds * (chunks in the batch)

and a prompt that enters the batch holds the others up for ``prefill_seconds`` a token, those of a
query that the engine has seen aside. Engines fail as faults say. The driver is one process that
hears of each chunk a round trip after it is done, and takes ``driver_seconds`` over each.

What is left out: the growth of attention within a chunk (times are those of the mean context),
weight updates, and engines of unequal speed.
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
from delethink.engines.scheduler import Lease, Rank, Request, Scheduler
from delethink.errors import ConfigError

_TOLERANCE = 1e-6  # of a token, for sums of floating point
_CACHED_QUERIES = 4096  # of an engine


@dataclass(frozen=True)
class ServiceTimes:
    """How long an engine takes; all in seconds."""

    step_seconds: float  # of a step, whatever the batch
    sequence_seconds: float  # of a step, for each chunk in the batch
    prefill_seconds: float  # of a prompt token

    def step(self, batch: int) -> float:
        """Of one step."""
        return self.step_seconds + self.sequence_seconds * batch


@dataclass(frozen=True)
class Faults:
    """What happens to workers, at random times."""

    every: float  # mean seconds between two, anywhere in the cluster
    hang_share: float = 0.5  # the others die, which Ray tells at once
    silence_timeout: float = 15.0  # seconds until the chunks of one that hangs go to others
    hang_timeout: float = 120.0  # seconds until it is given up
    restart: float = 90.0  # seconds from there until the worker is back


@dataclass(frozen=True)
class Cluster:
    """What samples."""

    num_workers: int
    batch_size: int  # chunks that an engine samples side by side
    slots: int  # chunks that a worker has at a time
    times: ServiceTimes
    surplus: int = 0  # more that it has while many wait
    round_trip: float = 0.01  # seconds from a chunk's end to the next one's arrival
    driver_seconds: float = 0.0  # of the driver, for each chunk
    faults: Faults | None = None

    def __post_init__(self) -> None:
        for name in ("num_workers", "batch_size", "slots"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Workload:
    """What is sampled: traces of these lengths, which the scheduler does not know."""

    spec: ChunkSpec
    lengths: Sequence[int]
    query_tokens: int
    group_size: int = 1  # this many traces in a row are of one query

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError("every trace needs at least one token")
        if max(self.lengths) > self.spec.budget:
            raise ConfigError(
                f"a trace of {max(self.lengths)} tokens is longer than the budget of "
                f"{self.spec.budget}"
            )

    def chunks(self, length: int) -> list[tuple[int, int]]:
        """(prompt tokens beside the query, new tokens) of each chunk of a trace."""
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
    """The cluster at one time."""

    seconds: float
    tokens: int  # sampled and returned until then
    ended: int  # traces
    waiting: int  # chunks
    in_flight: int
    workers: int  # in service


@dataclass
class Outcome:
    """What came out of a simulation. Seconds are virtual but for ``scheduler_seconds``."""

    makespan: float = 0.0
    bound_work: float = 0.0  # no schedule is shorter: all work spread evenly over full batches
    bound_trace: float = 0.0  # nor than this: the longest trace alone on an engine
    completions: int = 0  # chunks
    scheduler_seconds: float = 0.0  # of this machine's processor
    driver_busy: float = 0.0
    rescheduled: int = 0  # chunks that were lost with a worker and sampled again
    failures: int = 0
    query_hits: int = 0  # chunks that went where their query had been seen
    ended: list[int] = field(default_factory=list)  # times that each trace has ended: 1
    left_over: int = 0  # entries in the scheduler after the end: 0
    course: list[Moment] = field(default_factory=list)

    @property
    def lower_bound(self) -> float:
        """Seconds below which no schedule can be."""
        return max(self.bound_work, self.bound_trace)

    @property
    def ratio(self) -> float:
        """Of the makespan to the lower bound."""
        return self.makespan / self.lower_bound

    @property
    def completions_per_second(self) -> float:
        """That the scheduler could take part in on this machine."""
        return self.completions / self.scheduler_seconds


def simulate(
    workload: Workload,
    cluster: Cluster,
    rank: Callable[[int, int], Rank],
    seed: int = 0,
    sample_every: float = 1.0,
) -> Outcome:
    """Plays a workload to its end.

    Args:
        workload: the traces.
        cluster: the workers.
        rank: what is sampled first, from the place of a trace and the number of its chunks so far.
        seed: of faults.
        sample_every: seconds between two moments of the course.
    """
    return _Simulation(workload, cluster, rank, seed, sample_every).run()


class _Engine:
    """One engine; its clock counts the tokens that each chunk of its batch has got."""

    def __init__(self, times: ServiceTimes, batch_size: int) -> None:
        self.version = 0  # of the next end: older ones are void
        self.failed = False
        self._times, self._batch_size = times, batch_size
        self._clock, self._updated, self._stalled = 0.0, 0.0, 0.0
        self._batch: list[tuple[float, int]] = []  # heap of (clock at the end, lease)
        self._queue: deque[tuple[int, int, int]] = deque()
        self._queries: OrderedDict[int, None] = OrderedDict()

    def saw(self, query: int) -> bool:
        """Whether the query is in the prefix cache, where it is afterwards."""
        seen = query in self._queries
        self._queries[query] = None
        self._queries.move_to_end(query)
        if len(self._queries) > _CACHED_QUERIES:
            self._queries.popitem(last=False)
        return seen

    def add(self, now: float, lease: int, new: int, prompt: int) -> None:
        self._advance(now)
        self._queue.append((lease, new, prompt))
        self._admit()

    def take(self, now: float) -> list[int]:
        """The leases that have ended by now."""
        self._advance(now)
        ended = []
        while self._batch and self._batch[0][0] <= self._clock + _TOLERANCE:
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
            lease, new, prompt = self._queue.popleft()
            heapq.heappush(self._batch, (self._clock + new, lease))
            self._stalled += prompt * self._times.prefill_seconds


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
        self.lives = itertools.count()
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
        self.later(0.0, self.look)
        while self.num_ended < len(self.remaining):
            now, _, act, arguments = heapq.heappop(self.events)
            act(now, *arguments)
        outcome.makespan = now
        self.look(now)
        outcome.left_over = self.scheduler.num_waiting + self.scheduler.num_in_flight
        return outcome

    def later(self, when: float, act: Callable[..., None], *arguments: object) -> None:
        heapq.heappush(self.events, (when, next(self.order), act, arguments))

    def look(self, now: float) -> None:
        scheduler = self.scheduler
        self.outcome.course.append(
            Moment(
                now,
                self.tokens,
                self.num_ended,
                scheduler.num_waiting,
                scheduler.num_in_flight,
                len(self.engines),
            )
        )
        self.later(now + self.sample_every, self.look)

    # -- the driver ----------------------------------------------------------------------------

    def submit(self, trace: int) -> None:
        spec, done = self.workload.spec, self.chunks[trace]
        tokens = self.workload.query_tokens + spec.context_size
        query = trace // self.workload.group_size
        self.scheduler.submit(Request(trace, tokens, query, self.rank(trace, done)))

    def assign(self, now: float) -> None:
        began = time.thread_time()
        leases = self.scheduler.assign(now)
        self.outcome.scheduler_seconds += time.thread_time() - began
        touched: dict[int, None] = {}
        for lease in leases:
            self.give(now, lease)
            touched[cast(int, lease.worker)] = None
        for worker in touched:
            self.expect(worker)

    def hear(self, now: float, worker: int, numbers: list[int]) -> None:
        """The driver is told of chunks."""
        if now < self.driver_free:
            self.later(self.driver_free, self.hear, worker, numbers)
            return
        busy = self.cluster.driver_seconds * len(numbers)
        self.driver_free = now + busy
        self.outcome.driver_busy += busy
        began = time.thread_time()
        for number in numbers:
            lease = self.scheduler.finish(number)
            if lease is not None:
                self.go_on(cast(int, lease.request.key))
        self.outcome.scheduler_seconds += time.thread_time() - began
        self.assign(now)

    def go_on(self, trace: int) -> None:
        """A chunk of a trace is done."""
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
        """Carried and new tokens of the chunk that a trace samples next."""
        spec = self.workload.spec
        carried = spec.carryover_size if self.chunks[trace] else 0
        return carried, min(self.remaining[trace], spec.context_size - carried)

    # -- workers -------------------------------------------------------------------------------

    def join(self, now: float) -> None:
        worker = next(self.lives)
        self.engines[worker] = _Engine(self.cluster.times, self.cluster.batch_size)
        self.engines[worker].take(now)
        self.scheduler.add_worker(worker, self.cluster.slots, self.cluster.surplus)

    def give(self, now: float, lease: Lease) -> None:
        engine, trace = self.engines[cast(int, lease.worker)], cast(int, lease.request.key)
        carried, new = self.next_chunk(trace)
        if engine.saw(trace // self.workload.group_size):
            self.outcome.query_hits += 1
        else:
            carried += self.workload.query_tokens
        engine.add(now, lease.number, new, carried)

    def expect(self, worker: int) -> None:
        engine = self.engines[worker]
        engine.version += 1
        end = engine.next_end()
        if end is not None:
            self.later(end, self.end, worker, engine.version)

    def end(self, now: float, worker: int, version: int) -> None:
        """The next chunk of an engine is done, if nothing has changed since."""
        engine = self.engines.get(worker)
        if engine is None or engine.failed or engine.version != version:
            return
        if numbers := engine.take(now):
            self.later(now + self.cluster.round_trip, self.hear, worker, numbers)
        self.expect(worker)

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
            self.later(now + min(faults.silence_timeout, faults.hang_timeout), self.suspect, worker)
        self.later(now + (faults.hang_timeout if hangs else 1.0), self.lose, worker)

    def suspect(self, now: float, worker: int) -> None:
        """The driver has not heard of a worker for a while."""
        self.scheduler.pause(worker)
        for lease in reversed(self.scheduler.leases(worker)):
            self.scheduler.give_back(lease.number)
            self.outcome.rescheduled += 1
        self.assign(now)

    def lose(self, now: float, worker: int) -> None:
        """The driver notices that a worker has failed."""
        assert self.cluster.faults is not None
        del self.engines[worker]
        self.outcome.rescheduled += len(self.scheduler.remove_worker(worker))
        self.later(now + self.cluster.faults.restart, self.come_back)
        self.assign(now)

    def come_back(self, now: float) -> None:
        self.join(now)
        self.assign(now)


def bounds(workload: Workload, cluster: Cluster) -> tuple[float, float]:
    """Seconds below which no schedule without faults can be.

    Returns:
        All work spread evenly over workers whose batches are full, each query encoded once; and the
        longest trace alone on an engine.
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
