"""Which worker samples which chunk next: pure bookkeeping, without Ray, asyncio or a clock.

At a boundary the whole state of a trace is its next prompt, so any worker may take any chunk. What
is decided here, in this order:

1. A worker has at most ``slots`` chunks; the others wait with the scheduler, where it costs nothing
   to give them to another worker. While chunks wait, no worker has a free slot. Up to ``surplus``
   more lie ready at a worker while at least twice as many wait for each worker, so that they run
   out as the work does and none holds back what another could do (guided self-scheduling:
   Polychronopoulos and Kuck, 1987). A worker that was always alone holds nothing back, and
   an engine begins faster what lies there together.
2. The worker with the fewest tokens in flight is served first.
3. It gets a chunk of the lowest rank; among equals one whose query it has sampled from before, so
   that the prefix is in its cache; then one of a query that no worker has; then the oldest.

So the prefix decides only between chunks of one rank, and never leaves a worker with more work. A
worker that holds the prefix and is as idle as the one to be served, but for one chunk, gets it.

What callers can rely on: a chunk that was submitted is either waiting or has exactly one lease; a
lease ends once (``finish``, ``give_back``, ``withdraw``, or with its worker), and an answer to one
that has ended is told apart by ``None``. Each call takes O(log n) of workers and ranks, amortised.

    scheduler = Scheduler()
    scheduler.add_worker("a", slots=64, surplus=64)
    scheduler.submit(Request(key=7, tokens=160, query=hash(query_ids), rank=(-11,)))
    for lease in scheduler.assign(now):     # after any number of other calls
        send(lease.worker, lease.number, lease.request.key)
    ...
    if scheduler.finish(number) is None:    # the lease was taken back: a late answer
        drop()
"""

from __future__ import annotations

import heapq
import itertools
import sys
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from delethink.errors import ConfigError

Rank = tuple[float, ...]

_SPARE_ENTRIES = 64  # in a heap of workers, before stale ones are cleared out
_WAIT_FOR_SURPLUS = 2  # chunks that wait for each worker, for one that lies ready beyond its slots


class Request(NamedTuple):
    """A chunk to be sampled, as the scheduler sees it."""

    key: Hashable  # the caller's name for it, of its own among chunks that wait or are in flight
    tokens: int  # of its prompt, and as many new ones as it may have
    query: Hashable = None  # the same for chunks whose prompts begin alike
    rank: Rank = ()  # the lowest goes first


class Lease(NamedTuple):
    """A chunk that was given to a worker."""

    number: int  # unlike that of any other lease
    worker: Hashable
    request: Request
    given: float  # when


@dataclass(eq=False, slots=True)
class _Worker:
    name: Hashable
    slots: int
    surplus: int
    order: int  # between equals, the one added first
    tokens: int = 0  # of its leases
    leases: dict[int, Lease] = field(default_factory=dict)
    paused: bool = False
    gone: bool = False

    def takes(self, beyond: int) -> bool:
        """Whether it takes a chunk, where it may have so many more than its slots."""
        return not (self.gone or self.paused) and len(self.leases) < self.slots + beyond


class Scheduler:
    """Gives waiting chunks to workers.

    Args:
        max_queries: of how many queries it remembers which worker has sampled from them.
    """

    def __init__(self, max_queries: int = 2**17) -> None:
        self._max_queries = max_queries
        self._workers: dict[Hashable, _Worker] = {}
        self._most_workers = 0  # that there were: one that is gone may come back
        self._levels: dict[Rank, _Level] = {}
        self._ranks: list[Rank] = []  # heap of the keys of _levels
        self._waiting: dict[Hashable, Request] = {}
        self._leases: dict[int, Lease] = {}
        self._lease_of: dict[Hashable, int] = {}
        self._homes: OrderedDict[Hashable, _Worker] = OrderedDict()  # of queries
        self._free = _Idlest(self._workers, surplus=False)
        self._full = _Idlest(self._workers, surplus=True)
        self._changed: dict[_Worker, None] = {}  # since a worker was last looked for
        self._numbers, self._orders = itertools.count(1), itertools.count()

    # -- what there is -------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Chunks that no worker has."""
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Chunks that a worker has."""
        return len(self._leases)

    @property
    def workers(self) -> list[Hashable]:
        """The workers, in the order in which they were added."""
        return list(self._workers)

    def leases(self, worker: Hashable) -> list[Lease]:
        """What a worker has, the oldest first; nothing where there is no such worker."""
        held = self._workers.get(worker)
        return list(held.leases.values()) if held else []

    def tokens(self, worker: Hashable) -> int:
        """Tokens that a worker has in flight: of prompts, and as many new ones as they may have."""
        held = self._workers.get(worker)
        return held.tokens if held else 0

    # -- workers come and go -------------------------------------------------------------------

    def add_worker(self, worker: Hashable, slots: int, surplus: int = 0) -> None:
        """A worker that takes up to ``slots`` chunks at a time, with an empty prefix cache.

        While many wait, it takes up to ``surplus`` more.

        Raises:
            ConfigError: there is one of that name, or it has no slot.
        """
        if worker in self._workers:
            raise ConfigError(f"there is a worker {worker!r} already")
        if slots < 1:
            raise ConfigError(f"a worker needs at least one slot, got {slots}")
        added = _Worker(worker, slots, surplus, next(self._orders))
        self._workers[worker] = added
        self._most_workers = max(self._most_workers, len(self._workers))
        self._changed[added] = None

    def remove_worker(self, worker: Hashable) -> list[Lease]:
        """Forgets a worker. Its chunks wait again, before others of their rank.

        Returns:
            The leases that have ended so; none where there is no such worker.
        """
        gone = self._workers.pop(worker, None)
        if gone is None:
            return []
        gone.gone = True
        for level in self._levels.values():
            level.release(gone)
        ended = list(gone.leases.values())
        for lease in reversed(ended):  # so that the oldest is the first again
            self._end(lease)
            self._wait(lease.request, first=True)
        return ended

    def pause(self, worker: Hashable) -> None:
        """Gives a worker no further chunk; those that it has go on."""
        self._workers[worker].paused = True

    def resume(self, worker: Hashable) -> None:
        """Ends a pause."""
        held = self._workers[worker]
        held.paused = False
        self._changed[held] = None

    # -- chunks come and go --------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Lets a chunk wait for a worker.

        Raises:
            ConfigError: a chunk of that key is waiting or in flight.
        """
        if request.key in self._waiting or request.key in self._lease_of:
            raise ConfigError(f"the chunk {request.key!r} is waiting or in flight already")
        self._wait(request, first=False)

    def assign(self, now: float = 0.0) -> list[Lease]:
        """Gives out waiting chunks, until none waits or no worker takes one."""
        given = []
        while self._waiting and (found := self._next_worker()) is not None:
            given.append(self._give(*found, now))
        return given

    def finish(self, number: int) -> Lease | None:
        """Ends a lease whose chunk was sampled; ``None`` where it had ended before."""
        lease = self._leases.get(number)
        if lease is not None:
            self._end(lease)
        return lease

    def give_back(self, number: int) -> Lease | None:
        """Ends a lease whose chunk was not sampled: it waits again, before others of its rank.

        Returns:
            ``None`` where the lease had ended before.
        """
        lease = self.finish(number)
        if lease is not None:
            self._wait(lease.request, first=True)
        return lease

    def withdraw(self, key: Hashable) -> Lease | None:
        """Forgets a chunk that nobody wants any more, wherever it is.

        Returns:
            Its lease, if it had one.
        """
        if (request := self._waiting.pop(key, None)) is not None:
            self._levels[request.rank].remove(key)
            return None
        return self.finish(self._lease_of.get(key, 0))

    # -- inside --------------------------------------------------------------------------------

    def _wait(self, request: Request, first: bool) -> None:
        level = self._levels.get(request.rank)
        if level is None:
            level = self._levels[request.rank] = _Level()
            heapq.heappush(self._ranks, request.rank)
        self._waiting[request.key] = request
        level.add(request, self._home(request.query), first)

    def _next_worker(self) -> tuple[_Worker, int] | None:
        """Who is served next, and how many chunks more than its slots anybody may have now."""
        for changed in self._changed:
            if changed.takes(0):
                self._free.add(changed)
            elif changed.takes(changed.surplus):
                self._full.add(changed)
        self._changed.clear()
        if (worker := self._free.find()) is not None:
            return worker, 0
        worker = self._full.find()
        beyond = self._most_beyond()
        if worker is None or not worker.takes(beyond):
            return None
        return worker, beyond

    def _most_beyond(self) -> int:
        """How many chunks more than its slots a worker may have now, if its surplus allows."""
        if self._most_workers == 1:
            return sys.maxsize
        return len(self._waiting) // (_WAIT_FOR_SURPLUS * max(1, len(self._workers)))

    def _give(self, worker: _Worker, beyond: int, now: float) -> Lease:
        level = self._lowest_level()
        request, home = level.take(worker)
        if home is not None and home is not worker:
            near = home.tokens <= worker.tokens + request.tokens
            worker = home if near and home.takes(min(beyond, home.surplus)) else worker
        del self._waiting[request.key]
        if request.query is not None:
            self._settle(request.query, worker)
            level.settle(request.query, worker)
        lease = Lease(next(self._numbers), worker.name, request, now)
        self._leases[lease.number] = worker.leases[lease.number] = lease
        self._lease_of[request.key] = lease.number
        worker.tokens += request.tokens
        self._changed[worker] = None
        return lease

    def _end(self, lease: Lease) -> None:
        del self._leases[lease.number], self._lease_of[lease.request.key]
        worker = self._workers.get(lease.worker)
        if worker is not None and worker.leases.pop(lease.number, None) is not None:
            worker.tokens -= lease.request.tokens
            self._changed[worker] = None

    def _lowest_level(self) -> _Level:
        """Of those in which something waits; there is one."""
        while (level := self._levels[self._ranks[0]]).is_empty:
            del self._levels[heapq.heappop(self._ranks)]
        return level

    def _home(self, query: Hashable) -> _Worker | None:
        """Who has sampled from a query last, if that worker is still there."""
        home = self._homes.get(query) if query is not None else None
        return None if home is None or home.gone else home

    def _settle(self, query: Hashable, worker: _Worker) -> None:
        self._homes[query] = worker
        self._homes.move_to_end(query)
        if len(self._homes) > self._max_queries:
            self._homes.popitem(last=False)


class _Idlest:
    """Finds the worker with the fewest tokens among those that were added and still take chunks.

    Args:
        workers: all that there are.
        surplus: whether those count that take one beyond their slots only.
    """

    def __init__(self, workers: dict[Hashable, _Worker], surplus: bool) -> None:
        self._workers, self._surplus = workers, surplus
        self._heap: list[tuple[int, int, _Worker]] = []  # entries may be stale

    def add(self, worker: _Worker) -> None:
        heapq.heappush(self._heap, (worker.tokens, worker.order, worker))
        if len(self._heap) > 4 * len(self._workers) + _SPARE_ENTRIES:
            latest = {w.order: (t, w.order, w) for t, _, w in self._heap if w.tokens == t}
            self._heap = list(latest.values())
            heapq.heapify(self._heap)

    def find(self) -> _Worker | None:
        while self._heap:
            tokens, _, worker = self._heap[0]
            if worker.tokens == tokens and worker.takes(worker.surplus if self._surplus else 0):
                return worker
            heapq.heappop(self._heap)
        return None


class _Level:
    """The chunks of one rank that wait, by who should take them.

    Every dict here is read and emptied at its front, which a plain ``dict`` gets slower at.
    """

    def __init__(self) -> None:
        self._all: OrderedDict[Hashable, tuple[Request, _Worker | None]] = OrderedDict()
        self._homed: dict[_Worker, OrderedDict[Hashable, Request]] = {}  # the query's home
        self._homeless: OrderedDict[Any, OrderedDict[Hashable, Request]] = OrderedDict()  # by query

    @property
    def is_empty(self) -> bool:
        return not self._all

    def add(self, request: Request, home: _Worker | None, first: bool) -> None:
        self._all[request.key] = request, home
        same = self._same(request, home)
        same[request.key] = request
        if first:
            self._all.move_to_end(request.key, last=False)
            same.move_to_end(request.key, last=False)
            if home is None:
                self._homeless.move_to_end(_query(request), last=False)

    def take(self, worker: _Worker) -> tuple[Request, _Worker | None]:
        """Takes out the chunk that a worker should have; with its home."""
        if own := self._homed.get(worker):
            return self.remove(_first(own))
        if self._homeless:
            return self.remove(_first(_first(self._homeless.values())))
        return self.remove(_first(self._all))

    def remove(self, key: Hashable) -> tuple[Request, _Worker | None]:
        request, home = self._all.pop(key)
        same = self._same(request, home)
        del same[key]
        if not same and home is not None:
            del self._homed[home]
        elif not same:
            del self._homeless[_query(request)]
        return request, home

    def settle(self, query: Hashable, home: _Worker) -> None:
        """A query without a home has one now."""
        if query not in self._homeless:
            return
        for request in self._homeless.pop(query).values():
            self._all[request.key] = request, home
            self._same(request, home)[request.key] = request

    def release(self, home: _Worker) -> None:
        """A home is gone."""
        for request in self._homed.pop(home, {}).values():
            self._all[request.key] = request, None
            self._same(request, None)[request.key] = request

    def _same(self, request: Request, home: _Worker | None) -> OrderedDict[Hashable, Request]:
        group: dict[Any, OrderedDict[Hashable, Request]] = self._homed
        key: Hashable = home
        if home is None:
            group, key = self._homeless, _query(request)
        same = group.get(key)
        if same is None:
            same = group[key] = OrderedDict()
        return same


def _query(request: Request) -> Hashable:
    """Of a chunk; one that names none has a query of its own."""
    return ("alone", request.key) if request.query is None else request.query


def _first(values: Any) -> Any:
    return next(iter(values))
