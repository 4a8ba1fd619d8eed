"""Each chunk is assigned exactly once, to the right worker, and never lost."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from delethink.engines.scheduler import Rank, Request, Scheduler
from delethink.errors import ConfigError

WORKERS = st.integers(0, 4)


class SchedulerMachine(RuleBasedStateMachine):
    """Random histories against a model that only knows where each chunk must be."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(max_queries=5)
        self.slots: dict[Hashable, int] = {}
        self.paused: set[Hashable] = set()
        self.waiting: list[Request] = []
        self.in_flight: dict[Request, Hashable] = {}
        self.is_assigned = True  # nothing has happened since assign

    @rule(worker=WORKERS, slots=st.integers(1, 4))
    def add_worker(self, worker: int, slots: int) -> None:
        if worker in self.slots:
            with pytest.raises(ConfigError, match="twice"):
                self.scheduler.add_worker(worker, slots)
            return
        self.scheduler.add_worker(worker, slots)
        self.slots[worker] = slots
        self.is_assigned = False

    @rule(worker=WORKERS)
    def remove_worker(self, worker: int) -> None:
        self.scheduler.remove_worker(worker)
        self.slots.pop(worker, None)
        self.paused.discard(worker)
        for request in [r for r, w in self.in_flight.items() if w == worker]:
            del self.in_flight[request]
            self._submit(request, first=True)

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), pause=st.booleans())
    def pause_or_resume(self, data: st.DataObject, pause: bool) -> None:
        worker = data.draw(st.sampled_from(sorted(self.slots)))
        (self.scheduler.pause if pause else self.scheduler.resume)(worker)
        (self.paused.add if pause else self.paused.discard)(worker)
        self.is_assigned = False

    @rule(tokens=st.integers(1, 9), query=st.integers(0, 6), rank=st.integers(0, 2))
    def submit(self, tokens: int, query: int, rank: int) -> None:
        self._submit(Request(tokens, query or None, (rank,)), first=False)

    @rule()
    def assign(self) -> None:
        for worker, request in self.scheduler.assign():
            assert request.rank == min(r.rank for r in self.waiting)
            assert worker in self.slots
            assert worker not in self.paused
            self.waiting.remove(request)
            self.in_flight[request] = worker
        self.is_assigned = True

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), again=st.booleans())
    def end(self, data: st.DataObject, again: bool) -> None:
        request = data.draw(st.sampled_from(list(self.in_flight)))
        self.scheduler.release(self.in_flight.pop(request), request)
        self.is_assigned = False
        if again:
            self._submit(request, first=True)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.waiting))
        self.scheduler.withdraw(request)
        self.scheduler.withdraw(request)  # a second time changes nothing
        self.waiting.remove(request)

    def _submit(self, request: Request, first: bool) -> None:
        self.scheduler.submit(request, first)
        self.waiting.append(request)
        self.is_assigned = False

    @invariant()
    def counts_agree(self) -> None:
        assert self.scheduler.num_waiting == len(self.waiting)
        for worker, slots in self.slots.items():
            own = [request for request, w in self.in_flight.items() if w == worker]
            assert self.scheduler.tokens(worker) == sum(request.tokens for request in own)
            assert len(own) <= slots

    @invariant()
    def no_worker_has_a_free_slot_while_chunks_wait(self) -> None:
        if self.is_assigned and self.waiting:
            held = Counter(self.in_flight.values())
            assert all(held[w] == self.slots[w] for w in self.slots.keys() - self.paused)


TestSchedulerLaws = SchedulerMachine.TestCase


def make(num_workers: int, slots: int) -> Scheduler:
    scheduler = Scheduler()
    for worker in range(num_workers):
        scheduler.add_worker(worker, slots)
    return scheduler


def submit(
    scheduler: Scheduler, tokens: int = 10, query: Hashable = None, rank: Rank = ()
) -> Request:
    request = Request(tokens, query, rank)
    scheduler.submit(request)
    return request


def test_everything_is_sampled_once_although_workers_are_lost() -> None:
    rng = random.Random(3)
    scheduler, done = make(3, 4), Counter[Request]()
    requests = [submit(scheduler, query=i // 8) for i in range(500)]
    in_flight: list[tuple[Hashable, Request]] = []
    while scheduler.num_waiting or in_flight:
        in_flight += scheduler.assign()
        if rng.random() < 0.1:
            worker = rng.randrange(3)
            scheduler.remove_worker(worker)
            scheduler.add_worker(worker, 4)
            for _, request in [pair for pair in in_flight if pair[0] == worker]:
                scheduler.submit(request, first=True)
            in_flight = [pair for pair in in_flight if pair[0] != worker]
            continue
        worker_of_it, request = in_flight.pop(rng.randrange(len(in_flight)))
        scheduler.release(worker_of_it, request)
        done[request] += 1
    assert done == dict.fromkeys(requests, 1)


def test_tokens_in_flight_are_balanced_and_not_only_their_number() -> None:
    scheduler = make(2, 8)
    for tokens in (100, 10, 10, 10):
        submit(scheduler, tokens)
    list(scheduler.assign())
    assert [scheduler.tokens(0), scheduler.tokens(1)] == [100, 30]


def test_the_lowest_rank_goes_first_and_then_the_oldest() -> None:
    scheduler = make(1, 1)
    late, early, early_too = (submit(scheduler, rank=(rank,)) for rank in (2, 1, 1))
    order = []
    while assigned := list(scheduler.assign()):
        order += [request for _, request in assigned]
        scheduler.release(*assigned[0])
    assert order == [early, early_too, late]


def test_a_chunk_that_was_lost_goes_before_others_of_its_rank() -> None:
    scheduler = make(1, 1)
    first = submit(scheduler)
    submit(scheduler)
    ((worker, request),) = scheduler.assign()
    scheduler.release(worker, request)
    scheduler.submit(request, first=True)
    assert [again for _, again in scheduler.assign()] == [first]


def test_a_worker_prefers_the_queries_it_has_sampled_from() -> None:
    scheduler = make(2, 2)
    for i in range(16):
        submit(scheduler, query=i // 4)
    held: dict[Hashable, set[Hashable]] = {0: set(), 1: set()}
    while assigned := list(scheduler.assign()):
        for worker, request in assigned:
            held[worker].add(request.query)
            scheduler.release(worker, request)
    assert not held[0] & held[1]
    assert len(held[0]) == len(held[1]) == 2


def test_the_next_chunk_of_a_trace_goes_to_its_worker_if_that_is_as_idle() -> None:
    scheduler = make(2, 4)
    submit(scheduler, query="q")
    ((worker, _),) = scheduler.assign()
    submit(scheduler)
    ((other, _),) = scheduler.assign()
    assert other != worker
    submit(scheduler, query="q")
    assert [again for again, _ in scheduler.assign()] == [worker]


def test_a_prefix_does_not_keep_a_chunk_from_an_idle_worker() -> None:
    scheduler = make(2, 8)
    for _ in range(8):
        submit(scheduler, query="q")
    counts = Counter(worker for worker, _ in scheduler.assign())
    assert max(counts.values()) - min(counts.values()) <= 2


def test_a_worker_that_was_added_again_has_no_prefix() -> None:
    scheduler = make(2, 1)
    submit(scheduler, query="q")
    ((worker, request),) = scheduler.assign()
    scheduler.remove_worker(worker)
    scheduler.add_worker(worker, 1)
    scheduler.submit(request, first=True)
    assert [again for again, _ in scheduler.assign()] != [worker]


def test_a_worker_needs_a_slot() -> None:
    with pytest.raises(ConfigError, match="at least one slot, got 0"):
        Scheduler().add_worker("a", 0)
