"""The parts of a probe that need no model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delethink import ChunkSpec, StopReason
from delethink.types import Chunk, Trace, TraceStop

pytest.importorskip("torch")

from delethink.evaluation.probe import (
    Findings,
    ScoredBoundary,
    distance_edges,
    findings_page,
    first_carryover,
    last_window,
    longest_repeat,
    rechunk,
    reset_costs,
)

SPEC = ChunkSpec(8, 4, 10**6, 1)


def trace_of(output: tuple[int, ...], query: tuple[int, ...] = (1, 2)) -> Trace:
    chunk = Chunk(query, output, (0.0,) * len(output), StopReason.EOS)
    return Trace(query, (chunk,), TraceStop.COMPLETED)


@given(st.integers(0, 60), st.integers(2, 12), st.data())
def test_cutting_loses_no_token_and_keeps_to_the_rule(
    length: int, context: int, data: st.DataObject
) -> None:
    carry = data.draw(st.integers(0, context - 1))
    spec = ChunkSpec(context, carry, 10**6, min(1, carry))
    output = tuple(range(100, 100 + length))
    cuts = list(rechunk((1, 2), output, spec))
    assert tuple(token for _, part in cuts for token in part) == output
    for state, part in cuts:
        assert 0 < len(part) <= context - state.num_carried


def test_what_is_carried_and_what_the_last_context_held() -> None:
    trace = trace_of(tuple(range(100, 114)))
    assert first_carryover(trace, SPEC) == (100, 105, 106, 107)
    assert last_window(trace, SPEC) == (100, 109, 110, 111, 112, 113)
    assert first_carryover(trace_of((5, 6)), SPEC) is None
    assert last_window(trace_of(()), SPEC) == ()


def slow_repeat(ids: tuple[int, ...], apart: int) -> int:
    longest = 0
    for a in range(len(ids)):
        for b in range(a + apart, len(ids)):
            length = 0
            while b + length < len(ids) and ids[a + length] == ids[b + length]:
                length += 1
            longest = max(longest, length)
    return longest


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 12))
def test_the_longest_repeat(ids: list[int], apart: int) -> None:
    assert longest_repeat(tuple(ids), apart) == slow_repeat(tuple(ids), apart)


def boundary(trace: int, *gap: float, size: int = 4) -> ScoredBoundary:
    return ScoredBoundary(trace, 1, size, "carried", np.array(gap), 2 * np.array(gap))


def test_means_are_over_traces_and_not_over_tokens() -> None:
    (cost,) = [
        line
        for line in reset_costs([boundary(0, *[1.0] * 100), boundary(1, 3.0)])
        if (line.begin, line.end) == (0, 100)
    ]
    assert cost.gap.mean == 2.0
    assert cost.divergence.mean == 4.0
    assert cost.gap.low < 1 < 3 < cost.gap.high
    assert cost.gap.traces == 2


def test_a_single_trace_has_no_interval() -> None:
    assert {line.gap.low for line in reset_costs([boundary(4, 1.0, 1.0)])} == {float("-inf")}


def test_distances() -> None:
    assert distance_edges(1) == [0, 1]
    assert distance_edges(7) == [0, 1, 2, 4, 7]
    boundaries = [boundary(0, 1.0, 2.0, 4.0), boundary(1, 3.0), boundary(0, 9.0, size=2)]
    costs = reset_costs(boundaries)
    assert [(x.carryover_size, x.begin, x.end, x.gap.mean) for x in costs] == [
        (2, 0, 1, 9.0),
        (2, 0, 3, 9.0),
        (4, 0, 1, 2.0),
        (4, 1, 2, 2.0),
        (4, 2, 3, 4.0),
        (4, 0, 3, pytest.approx((7 / 3 + 3) / 2)),
    ]
    assert reset_costs([]) == []


def test_a_page_without_any_boundary_says_so() -> None:
    page = findings_page(Findings("toy", 8, 3, 1, 3, [], [0, 2, 5], 2, 0))
    assert "3 traces fit in the model's window; 1 longer ones were skipped" in page
    assert "0 are scored" in page
    assert "In 2 of 3 traces, a run of at least C / 4 = 2 tokens" in page
