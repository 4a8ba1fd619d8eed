"""Chunks are given out exactly once, to the right worker, and never lost."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from delethink.engines.scheduler import Lease, Request, Scheduler
from delethink.errors import ConfigError

KEYS = st.integers(0, 40)
WORKERS = st.integers(0, 4)


class SchedulerMachine(RuleBasedStateMachine):
    """Random histories against a model that only knows where each chunk has to be."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(max_queries=5)
        self.slots: dict[Hashable, int] = {}
        self.surplus: dict[Hashable, int] = {}
        self.most_workers = 0
        self.paused: set[Hashable] = set()
        self.waiting: dict[Hashable, Request] = {}
        self.given: dict[int, Lease] = {}
        self.ended: set[int] = set()
        self.assigned = True  # whether nothing has happened since assign

    @rule(worker=WORKERS, slots=st.integers(1, 4), surplus=st.integers(0, 3))
    def add_worker(self, worker: int, slots: int, surplus: int) -> None:
        if worker in self.slots:
            with pytest.raises(ConfigError, match="already"):
                self.scheduler.add_worker(worker, slots)
            return
        self.scheduler.add_worker(worker, slots, surplus)
        self.slots[worker], self.surplus[worker] = slots, surplus
        self.most_workers = max(self.most_workers, len(self.slots))
        self.assigned = False

    @rule(worker=WORKERS)
    def remove_worker(self, worker: int) -> None:
        ended = self.scheduler.remove_worker(worker)
        assert {lease.number for lease in ended} == {
            number for number, lease in self.given.items() if lease.worker == worker
        }
        self.slots.pop(worker, None)
        self.paused.discard(worker)
        for lease in ended:
            self._end(lease.number, again=True)
        self.assigned = False  # for fewer workers, more chunks wait for each

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), pause=st.booleans())
    def pause_or_resume(self, data: st.DataObject, pause: bool) -> None:
        worker = data.draw(st.sampled_from(sorted(self.slots)))
        (self.scheduler.pause if pause else self.scheduler.resume)(worker)
        (self.paused.add if pause else self.paused.discard)(worker)
        self.assigned = False

    @rule(key=KEYS, tokens=st.integers(1, 9), query=st.integers(0, 6), rank=st.integers(0, 2))
    def submit(self, key: int, tokens: int, query: int, rank: int) -> None:
        request = Request(key, tokens, query or None, (rank,))
        if key in self.waiting or key in self._in_flight():
            with pytest.raises(ConfigError, match="already"):
                self.scheduler.submit(request)
            return
        self.scheduler.submit(request)
        self.waiting[key] = request
        self.assigned = False

    @rule()
    def assign(self) -> None:
        held = Counter({worker: len(self.scheduler.leases(worker)) for worker in self.slots})
        for lease in self.scheduler.assign(1.5):
            assert held[lease.worker] < self.slots[lease.worker] + self._most_beyond()
            held[lease.worker] += 1
            # A later one of the same call may have a lower rank only if this one was put back.
            assert lease.request.rank == min(r.rank for r in self.waiting.values())
            assert self.waiting.pop(lease.request.key) == lease.request
            assert lease.worker in self.slots
            assert lease.worker not in self.paused
            assert lease.given == 1.5
            assert lease.number not in self.given
            assert lease.number not in self.ended
            self.given[lease.number] = lease
        self.assigned = True

    @precondition(lambda self: self.given)
    @rule(data=st.data(), again=st.booleans())
    def end(self, data: st.DataObject, again: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.given)))
        ended = (self.scheduler.give_back if again else self.scheduler.finish)(number)
        assert ended == self.given[number]
        self._end(number, again)

    @precondition(lambda self: self.ended)
    @rule(data=st.data(), again=st.booleans())
    def answer_late(self, data: st.DataObject, again: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.ended)))
        assert (self.scheduler.give_back if again else self.scheduler.finish)(number) is None

    @rule(key=KEYS)
    def withdraw(self, key: int) -> None:
        lease = self.scheduler.withdraw(key)
        self.waiting.pop(key, None)
        assert (lease.number if lease else None) == self._in_flight().get(key)
        if lease:
            self._end(lease.number, again=False)

    def _most_beyond(self) -> int:
        """A half of what waits for each; where there never was more than one worker, all."""
        return (
            10**6 if self.most_workers == 1 else len(self.waiting) // (2 * max(1, len(self.slots)))
        )

    def _end(self, number: int, again: bool) -> None:
        lease = self.given.pop(number)
        self.ended.add(number)
        if again:
            self.waiting[lease.request.key] = lease.request
        self.assigned = False

    def _in_flight(self) -> dict[Hashable, int]:
        return {lease.request.key: number for number, lease in self.given.items()}

    @invariant()
    def counts_agree(self) -> None:
        assert self.scheduler.num_waiting == len(self.waiting)
        assert self.scheduler.num_in_flight == len(self.given)
        assert sorted(self.scheduler.workers) == sorted(self.slots)
        for worker, slots in self.slots.items():
            own = [lease for lease in self.given.values() if lease.worker == worker]
            assert self.scheduler.leases(worker) == own
            assert self.scheduler.tokens(worker) == sum(lease.request.tokens for lease in own)
            assert len(own) <= slots + self.surplus[worker]

    @invariant()
    def no_worker_is_idle_while_chunks_wait(self) -> None:
        if self.assigned and self.waiting:
            for worker in self.slots.keys() - self.paused:
                assert len(self.scheduler.leases(worker)) >= self.slots[worker]

    @invariant()
    def what_lies_ready_is_as_much_as_it_may_be(self) -> None:
        beyond = self._most_beyond()
        held = {worker: len(self.scheduler.leases(worker)) for worker in self.slots}
        room = [
            worker
            for worker in self.slots.keys() - self.paused
            if held[worker] < self.slots[worker] + self.surplus[worker]
        ]
        if self.assigned and self.waiting and room:
            idlest = min(map(self.scheduler.tokens, room))
            assert any(
                held[worker] >= self.slots[worker] + min(beyond, self.surplus[worker])
                for worker in room
                if self.scheduler.tokens(worker) == idlest
            )


TestSchedulerLaws = SchedulerMachine.TestCase


def make(num_workers: int, slots: int) -> Scheduler:
    scheduler = Scheduler()
    for worker in range(num_workers):
        scheduler.add_worker(worker, slots)
    return scheduler


def test_everything_is_sampled_once_though_workers_are_lost() -> None:
    rng = random.Random(3)
    scheduler, times = make(3, 4), Counter[Hashable]()
    for key in range(500):
        scheduler.submit(Request(key, 10, key // 8))
    in_flight: list[Lease] = []
    while scheduler.num_waiting or in_flight:
        in_flight += scheduler.assign()
        if rng.random() < 0.1:
            worker = rng.randrange(3)
            lost = {lease.number for lease in scheduler.remove_worker(worker)}
            assert lost <= {lease.number for lease in in_flight if lease.worker == worker}
            scheduler.add_worker(worker, 4)
        lease = in_flight.pop(rng.randrange(len(in_flight)))
        if scheduler.finish(lease.number) is not None:
            times[lease.request.key] += 1
    assert times == dict.fromkeys(range(500), 1)


def test_where_a_worker_goes_more_may_lie_ready_at_the_others() -> None:
    scheduler = Scheduler()
    scheduler.add_worker("goes", slots=1)
    scheduler.add_worker("stays", slots=1, surplus=1)
    scheduler.pause("goes")
    for key in range(3):
        scheduler.submit(Request(key, 1))
    assert [lease.worker for lease in scheduler.assign()] == ["stays"]
    assert scheduler.assign() == []  # two wait for two workers
    scheduler.remove_worker("goes")
    assert [lease.worker for lease in scheduler.assign()] == ["stays"]


def test_a_worker_that_is_alone_has_its_surplus_while_anything_waits() -> None:
    scheduler = Scheduler()
    scheduler.add_worker("alone", slots=2, surplus=3)
    for key in range(4):
        scheduler.submit(Request(key, 1))
    assert len(scheduler.assign()) == 4
    for key in range(4, 8):
        scheduler.submit(Request(key, 1))
    assert len(scheduler.assign()) == 1  # as many as slots and surplus together
    assert scheduler.num_waiting == 3


def test_a_worker_whose_other_is_gone_for_now_leaves_something_for_it() -> None:
    scheduler = Scheduler()
    for worker in ("stays", "goes"):
        scheduler.add_worker(worker, slots=1, surplus=3)
    scheduler.remove_worker("goes")
    for key in range(5):
        scheduler.submit(Request(key, 1))
    assert len(scheduler.assign()) == 2  # three wait
    scheduler.add_worker("goes", slots=1, surplus=3)
    assert [lease.worker for lease in scheduler.assign()] == ["goes"]


def test_tokens_in_flight_are_balanced_and_not_only_their_number() -> None:
    scheduler = make(2, 8)
    for key, tokens in enumerate([100, 10, 10, 10]):
        scheduler.submit(Request(key, tokens))
    scheduler.assign()
    assert [scheduler.tokens(0), scheduler.tokens(1)] == [100, 30]


def test_the_lowest_rank_goes_first_and_then_the_oldest() -> None:
    scheduler = make(1, 1)
    for key, rank in (("late", 2), ("early", 1), ("early too", 1)):
        scheduler.submit(Request(key, 1, rank=(rank,)))
    order = []
    while leases := scheduler.assign():
        order += [lease.request.key for lease in leases]
        scheduler.finish(leases[0].number)
    assert order == ["early", "early too", "late"]


def test_a_chunk_that_was_lost_goes_before_others_of_its_rank() -> None:
    scheduler = make(1, 1)
    scheduler.submit(Request("first", 1))
    scheduler.submit(Request("second", 1))
    (lease,) = scheduler.assign()
    scheduler.give_back(lease.number)
    (again,) = scheduler.assign()
    assert (again.request.key, again.number > lease.number) == ("first", True)


def test_a_worker_keeps_to_the_queries_that_it_holds() -> None:
    scheduler = make(2, 2)
    for key in range(16):
        scheduler.submit(Request(key, 10, query=key // 4))
    held: dict[Hashable, set[Hashable]] = {0: set(), 1: set()}
    while leases := scheduler.assign():
        for lease in leases:
            held[lease.worker].add(lease.request.query)
            scheduler.finish(lease.number)
    assert not held[0] & held[1]
    assert len(held[0]) == len(held[1]) == 2


def test_the_next_chunk_of_a_trace_goes_back_where_its_prefix_is_if_that_is_as_idle() -> None:
    scheduler = make(2, 4)
    scheduler.submit(Request("a", 10, query="q"))
    (lease,) = scheduler.assign()
    scheduler.submit(Request("other", 10))  # lands on the other worker
    assert scheduler.assign()[0].worker != lease.worker
    scheduler.submit(Request("b", 10, query="q"))
    assert scheduler.assign()[0].worker == lease.worker


def test_a_prefix_does_not_keep_a_chunk_from_an_idle_worker() -> None:
    scheduler = make(2, 8)
    for key in range(8):
        scheduler.submit(Request(key, 10, query="q"))
    counts = Counter(lease.worker for lease in scheduler.assign())
    assert max(counts.values()) - min(counts.values()) <= 2


def test_a_worker_that_came_back_holds_nothing() -> None:
    scheduler = make(2, 1)
    scheduler.submit(Request("a", 10, query="q"))
    (lease,) = scheduler.assign()
    scheduler.remove_worker(lease.worker)
    scheduler.add_worker(lease.worker, 1)
    (again,) = scheduler.assign()
    assert again.worker != lease.worker  # the other one was there first


def test_a_worker_needs_a_slot() -> None:
    with pytest.raises(ConfigError, match="at least one slot, got 0"):
        Scheduler().add_worker("a", 0)
