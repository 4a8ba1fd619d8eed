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
    Boundary,
    Findings,
    as_page,
    by_distance,
    carried_at,
    cut,
    distance_edges,
    last_window,
    lines_of,
    longest_repeat,
    over_traces,
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
    cuts = list(cut((1, 2), output, spec))
    assert tuple(token for _, part in cuts for token in part) == output
    for state, part in cuts:
        assert 0 < len(part) <= context - state.num_carried


def test_what_is_carried_and_what_the_last_context_held() -> None:
    trace = trace_of(tuple(range(100, 114)))
    assert carried_at(trace, SPEC) == (100, 105, 106, 107)
    assert last_window(trace, SPEC) == (100, 109, 110, 111, 112, 113)
    assert carried_at(trace_of((5, 6)), SPEC) is None
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


def test_means_are_over_traces_and_not_over_tokens() -> None:
    point = over_traces({0: [1.0] * 100, 1: [3.0]})
    assert point.mean == 2.0
    assert point.low < 1 < 3 < point.high
    assert point.traces == 2
    assert over_traces({4: [1.0]}).low == float("-inf")
    with pytest.raises(ValueError, match="no trace"):
        over_traces({})


def boundary(trace: int, *gap: float, size: int = 4, condition: str = "carried") -> Boundary:
    return Boundary(trace, 1, size, condition, np.array(gap), 2 * np.array(gap))  # type: ignore[arg-type]


def test_distances() -> None:
    assert distance_edges(1) == [0, 1]
    assert distance_edges(7) == [0, 1, 2, 4, 7]
    boundaries = [boundary(0, 1.0, 2.0, 4.0), boundary(1, 3.0), boundary(0, 9.0, size=2)]
    points = by_distance(boundaries, 4, "carried", "gap", [0, 1, 2, 3])
    assert [p and p.mean for p in points] == [2.0, 2.0, 4.0]
    assert by_distance(boundaries, 4, "none", "gap", [0, 1]) == [None]
    lines = lines_of(boundaries)
    assert [(x.carryover_size, x.begin, x.end) for x in lines if x.gap.mean == 9.0] == [
        (2, 0, 1),
        (2, 0, 3),
    ]
    assert lines_of([]) == []


def test_a_page_without_any_boundary_says_so() -> None:
    page = as_page(Findings("toy", 8, 3, 1, 3, [], [0, 2, 5], 2, 0))
    assert "3 traces were read; 1 more are longer than the model's window" in page
    assert "0 are scored" in page
    assert "In 2 of 3 traces a run of at least C / 4 = 2 tokens" in page
