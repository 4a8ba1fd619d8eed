"""The scheduler in virtual time: small clusters whose makespan can be worked out by hand."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation import (
    Cluster,
    Faults,
    Outcome,
    ServiceTimes,
    Workload,
    bounds,
    simulate,
)
from traced_memory import traced_memory

from delethink.chunking import ChunkSpec
from delethink.engines.scheduler import Rank
from delethink.errors import ConfigError

SPEC = ChunkSpec(100, 50, 8, head_size=0)
TIMES = ServiceTimes(step_seconds=0.01, sequence_seconds=0.001, prefill_seconds=0.0001)
NO_PROMPTS = ServiceTimes(step_seconds=0.01, sequence_seconds=0.0, prefill_seconds=0.0)


def breadth(trace: int, done: int) -> Rank:
    return (done,)


def cluster(workers: int = 2, batch: int = 4, **more: object) -> Cluster:
    values = {"slots": batch + 1, "times": TIMES} | more
    return Cluster(workers, batch, **values)  # type: ignore[arg-type]


def lengths(number: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [min(SPEC.budget, int(40 / (1 - rng.random()))) for _ in range(number)]


def test_one_chunk_takes_its_prompt_and_its_tokens() -> None:
    done = simulate(Workload(SPEC, [100], 20), cluster(1, round_trip=0.5), breadth)
    assert done.makespan == pytest.approx(20 * 0.0001 + 100 * 0.011 + 0.5)
    assert done.lower_bound == pytest.approx(done.makespan)


def test_a_trace_continues_from_boundary_to_boundary() -> None:
    done = simulate(Workload(SPEC, [175], 20), cluster(1, round_trip=0.5), breadth)
    prompts = 20 + 50 + 50  # the query is in the cache from the second chunk on
    assert done.completions == 3
    assert done.makespan == pytest.approx(prompts * 0.0001 + 175 * 0.011 + 3 * 0.5)


def test_full_batches_reach_the_bound() -> None:
    """Chunks of one size, as many as fit: nothing can be lost but round trips."""
    spec = ChunkSpec.longcot(100)
    work = Workload(spec, [100] * 64, 20)
    some = cluster(2, batch=8, slots=8, times=NO_PROMPTS, round_trip=0.0)
    done = simulate(work, some, breadth)
    assert done.ratio == pytest.approx(1.0)


def test_a_batch_shares_its_engine() -> None:
    """One chunk of 30 tokens beside one of 100: the second is faster once it is alone."""
    done = simulate(Workload(SPEC, [30, 100], 1), cluster(1, round_trip=0.0), breadth)
    assert done.makespan == pytest.approx(2 * 0.0001 + 30 * 0.012 + 70 * 0.011)


@given(
    number=st.integers(1, 60),
    workers=st.integers(1, 5),
    batch=st.integers(1, 6),
    margin=st.integers(0, 3),
    seed=st.integers(0, 1000),
    faulty=st.booleans(),
)
def test_every_trace_ends_once_and_no_schedule_beats_the_bound(
    number: int, workers: int, batch: int, margin: int, seed: int, faulty: bool
) -> None:
    faults = Faults(every=3.0, hang_timeout=2.0, restart=1.0) if faulty else None
    some = cluster(workers, batch, slots=batch + margin, faults=faults)
    work = Workload(SPEC, lengths(number, seed), 20, group_size=4)
    done = simulate(work, some, breadth, seed)
    assert done.ended == [1] * number
    assert done.completions == sum(len(work.chunks(length)) for length in work.lengths)
    assert done.left_over == 0
    assert done.ratio >= 1 - 1e-9


def same(done: Outcome) -> tuple[object, ...]:
    return done.makespan, done.rescheduled, done.failures, done.course


def test_it_is_the_same_every_time() -> None:
    some = cluster(3, faults=Faults(every=2.0, hang_timeout=2.0, restart=1.0))
    work = Workload(SPEC, lengths(200), 20, 8)
    first, again = simulate(work, some, breadth, 1), simulate(work, some, breadth, 1)
    assert same(first) == same(again)
    assert first.failures > 3
    assert first.rescheduled > 0
    assert same(simulate(work, some, breadth, 2)) != same(first)


def test_a_cluster_that_fails_now_and_then_stays_near_the_bound() -> None:
    work = Workload(SPEC, lengths(12_000), 20, 8)
    some = cluster(16, faults=Faults(every=20.0, hang_timeout=5.0, restart=5.0))
    done = simulate(work, some, breadth)
    assert done.failures >= 5
    assert done.ratio < 1.05


def test_memory_is_bounded_by_traces_and_not_by_chunks() -> None:
    def peak(max_chunks: int) -> int:
        spec = ChunkSpec(100, 50, max_chunks, head_size=0)
        work = Workload(spec, [spec.budget] * 200, 20)

        def run() -> None:
            assert simulate(work, cluster(4), breadth, 0, 1e9).completions == 200 * max_chunks

        return traced_memory(run).peak

    assert peak(60) < 1.2 * peak(4)


def test_a_slow_driver_is_part_of_the_makespan() -> None:
    work = Workload(SPEC, [20] * 100, 1)
    done = simulate(work, cluster(10, driver_seconds=1.0), breadth)
    assert done.driver_busy == pytest.approx(100.0)
    assert done.makespan >= 99.0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: cluster(0), "num_workers must be at least 1, got 0"),
        (lambda: cluster(1, batch=0), "batch_size must be at least 1, got 0"),
        (
            lambda: Workload(SPEC, [451], 1),
            "a trace of 451 tokens is longer than the budget of 450",
        ),
        (lambda: Workload(SPEC, [5, 0], 1), "every trace needs at least one token"),
        (lambda: Workload(SPEC, [], 1), "every trace needs at least one token"),
    ],
)
def test_mistakes_are_explained(make: object, said: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=said):
        make()


def test_the_bound_counts_each_query_once_and_each_carryover() -> None:
    work = Workload(SPEC, [150] * 8, 20, group_size=4)
    spread, alone = bounds(work, cluster(2, batch=4, round_trip=0.5))
    assert spread == pytest.approx((8 * 150 * 0.014 / 4 + (8 * 50 + 2 * 20) * 0.0001) / 2)
    assert alone == pytest.approx(150 * 0.011 + (50 + 20) * 0.0001 + 2 * 0.5)
