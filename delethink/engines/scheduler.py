"""Decides which worker samples which chunk next: bookkeeping without Ray, asyncio or a clock.

At a boundary the whole state of a trace is its next prompt, so any worker can take any chunk:

1. A worker holds at most ``slots`` chunks: a quarter more than its batch, so the engine never waits
   for the driver. The other chunks wait here, free for any worker.
2. The worker with the fewest tokens in flight is served first.
3. The chunk has the lowest rank. Among equal ranks, a query from the prefix cache of the worker
   goes first, then a new query, then the oldest chunk of the longest queue. Another worker with the
   query in its cache takes the chunk instead, if its load exceeds the first one's by at most the
   chunk.

    scheduler = Scheduler()
    scheduler.add_worker("a", slots=80)
    scheduler.submit(Request(tokens=160, query=hash(query_ids), rank=(0, -11)))
    for worker, request in scheduler.assign():
        ...                                     # sample the chunk
        scheduler.release(worker, request)
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Literal

from delethink.errors import ConfigError
from delethink.policy import SchedulingHint

Rank = tuple[float, ...]


@dataclass(eq=False, slots=True)
class Request:
    """A chunk to be sampled."""

    tokens: int  # prompt tokens and the limit of new ones
    query: Hashable = None  # equal for chunks whose prompts begin alike
    rank: Rank = ()  # the lowest goes first
    is_waiting: bool = False


@dataclass(eq=False, slots=True)
class _Load:
    """Load of a worker."""

    slots: int
    order: int  # number of the worker; breaks ties
    chunks: int = 0
    tokens: int = 0
    is_paused: bool = False


class Scheduler:
    """Assigns waiting chunks to workers.

    Args:
        max_queries: number of queries whose worker is remembered.
    """

    def __init__(self, max_queries: int = 2**17) -> None:
        self._max_queries = max_queries
        self._loads: dict[Hashable, _Load] = {}
        self._open: dict[Hashable, _Load] = {}  # workers with a free slot, not paused
        self._homes: OrderedDict[Hashable, Hashable] = OrderedDict()  # query -> worker
        # Waiting chunks by rank, then by the worker of their query (None: no worker yet).
        self._queues: dict[Rank, dict[Hashable, deque[Request]]] = {}
        self._ranks: list[Rank] = []  # heap of the keys of _queues
        self._order = itertools.count()
        self.num_waiting = 0

    def add_worker(self, worker: Hashable, slots: int) -> None:
        """Add a worker with an empty prefix cache.

        Raises:
            ConfigError: the worker is there already, or has no slot.
        """
        if worker in self._loads:
            raise ConfigError(f"worker {worker!r} was added twice")
        if slots < 1:
            raise ConfigError(f"a worker needs at least one slot, got {slots}")
        self._loads[worker] = _Load(slots, next(self._order))
        self._update_open(worker)

    def remove_worker(self, worker: Hashable) -> None:
        """Forget a worker and its chunks, which the caller submits again."""
        if self._loads.pop(worker, None) is None:
            return
        self._open.pop(worker, None)
        self._homes = OrderedDict(item for item in self._homes.items() if item[1] != worker)
        for queues in self._queues.values():
            queues.setdefault(None, deque()).extend(queues.pop(worker, ()))

    def pause(self, worker: Hashable) -> None:
        """Assign no more chunks to a worker; those in flight continue."""
        self._loads[worker].is_paused = True
        self._update_open(worker)

    def resume(self, worker: Hashable) -> None:
        """Assign chunks to a paused worker again."""
        self._loads[worker].is_paused = False
        self._update_open(worker)

    def tokens(self, worker: Hashable) -> int:
        """Return the tokens a worker has in flight: of prompts, and the limits of new ones."""
        return self._loads[worker].tokens if worker in self._loads else 0

    def submit(self, request: Request, first: bool = False) -> None:
        """Let a chunk wait for a worker, ``first`` in its queue if it is a retry."""
        queues = self._queues.get(request.rank)
        if queues is None:
            queues = self._queues[request.rank] = {}
            heapq.heappush(self._ranks, request.rank)
        queue = queues.setdefault(self._homes.get(request.query), deque())
        (queue.appendleft if first else queue.append)(request)
        request.is_waiting = True
        self.num_waiting += 1

    def withdraw(self, request: Request) -> None:
        """Forget a waiting chunk; its entry in a queue is skipped later."""
        if request.is_waiting:
            request.is_waiting = False
            self.num_waiting -= 1

    def assign(self) -> Iterator[tuple[Hashable, Request]]:
        """Yield (worker, chunk) until no chunk waits or no worker has a free slot."""
        while self.num_waiting and self._open:
            worker, load = min(self._open.items(), key=lambda item: (item[1].tokens, item[1].order))
            request = self._next_request(worker)
            home = self._homes.get(request.query)
            if home in self._open and self._open[home].tokens <= load.tokens + request.tokens:
                worker, load = home, self._open[home]
            if request.query is not None:
                self._homes[request.query] = worker
                self._homes.move_to_end(request.query)
                if len(self._homes) > self._max_queries:
                    self._homes.popitem(last=False)
            load.chunks += 1
            load.tokens += request.tokens
            self._update_open(worker)
            yield worker, request

    def release(self, worker: Hashable, request: Request) -> None:
        """Free the slot of a chunk."""
        load = self._loads[worker]
        load.chunks -= 1
        load.tokens -= request.tokens
        self._update_open(worker)

    def _next_request(self, worker: Hashable) -> Request:
        """Take the next chunk for a worker out of its queue; there is one."""
        while True:
            queues = self._queues[self._ranks[0]]
            request = self._take(queues, worker)
            if request is not None:
                self.withdraw(request)
                return request
            del self._queues[heapq.heappop(self._ranks)]

    def _take(self, queues: dict[Hashable, deque[Request]], worker: Hashable) -> Request | None:
        """Take a chunk of one rank; ``None`` if there is none."""
        if (request := _pop(queues, worker)) is not None:
            return request
        while (request := _pop(queues, None)) is not None:
            home = self._homes.get(request.query)
            if home is None or home == worker:
                return request
            queues.setdefault(home, deque()).append(request)  # its query has a worker by now
        while queues:
            longest = max(queues, key=lambda home: len(queues[home]))
            if (request := _pop(queues, longest)) is not None:
                return request
        return None

    def _update_open(self, worker: Hashable) -> None:
        load = self._loads[worker]
        if load.is_paused or load.chunks >= load.slots:
            self._open.pop(worker, None)
        else:
            self._open[worker] = load


def _pop(queues: dict[Hashable, deque[Request]], home: Hashable) -> Request | None:
    """Take the oldest chunk out of a queue, without withdrawn ones, and drop an empty queue."""
    queue = queues.get(home)
    while queue:
        request = queue.popleft()
        if request.is_waiting:
            return request
    queues.pop(home, None)
    return None


def slots(batch_size: int) -> int:
    """Return the number of slots of a worker: its batch and a quarter more."""
    return batch_size + max(1, batch_size // 4)


def rank(hint: SchedulingHint, order: Literal["breadth", "depth"]) -> Rank:
    """Return the rank of a chunk: batches in order, then the trace with most chunks to come.

    If unknown, "breadth" takes the trace with the fewest chunks so far, whose
    rest may be the longest, and "depth" the one with the most.
    """
    if hint.expected_chunks is not None:
        rest = max(1.0, hint.expected_chunks - hint.num_chunks)
    elif order == "depth":
        rest = hint.num_chunks
    else:
        rest = hint.max_chunks - hint.num_chunks
    return hint.batch, -float(round(rest))
