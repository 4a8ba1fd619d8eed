"""Traces dealt out to processes: laws for all costs."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delethink.training.data_parallel import (
    Padding,
    balanced_assignment,
    contiguous_assignment,
    load_balance,
    rank_costs,
)


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[float], int]:
    """Costs of the traces of a step, and processes that divide them."""
    processes, each = draw(st.integers(1, 8)), draw(st.integers(1, 12))
    cost = st.one_of(st.integers(0, 12).map(float), st.floats(0, 1e15))
    return draw(st.lists(cost, min_size=processes * each, max_size=processes * each)), processes


@given(steps())
def test_every_trace_is_dealt_out_once_and_to_all_as_many(step: tuple[list[float], int]) -> None:
    costs, processes = step
    order = balanced_assignment(costs, processes)
    assert sorted(chain(*order)) == list(range(len(costs)))
    assert {len(own) for own in order} == {len(costs) // processes}


@given(steps())
def test_the_slowest_is_never_slower_than_in_the_order_given(step: tuple[list[float], int]) -> None:
    costs, processes = step
    given_order = contiguous_assignment(len(costs), processes)
    assert max(rank_costs(balanced_assignment(costs, processes), costs)) <= max(
        rank_costs(given_order, costs)
    )


@given(steps())
def test_nobody_is_slower_than_the_mean_by_more_than_the_widest_round(
    step: tuple[list[float], int],
) -> None:
    costs, processes = step
    ranked = sorted(costs, reverse=True)
    rounds = [ranked[i : i + processes] for i in range(0, len(ranked), processes)]
    widest = max(max(each) - min(each) for each in rounds)
    highest, mean = (
        max(rank_costs(balanced_assignment(costs, processes), costs)),
        sum(costs) / processes,
    )
    assert highest <= mean + widest + 1e-9 * sum(costs)


@given(steps())
def test_balance_is_between_one_for_all_and_even(step: tuple[list[float], int]) -> None:
    costs, processes = step
    value = load_balance(rank_costs(balanced_assignment(costs, processes), costs))
    assert 1 / processes - 1e-9 <= value <= 1 + 1e-9


def test_unlike_traces_end_up_beside_each_other() -> None:
    costs = [12.0, 11.0, 10.0, 9.0, 1.0, 1.0, 1.0, 1.0]
    order = balanced_assignment(costs, 2)
    assert sorted(rank_costs(order, costs)) == [23.0, 23.0]
    assert all(costs[a] >= costs[b] for own in order for a, b in pairwise(own))
    assert load_balance(rank_costs(contiguous_assignment(8, 2), costs)) == pytest.approx(23 / 42)


def test_traces_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="9 traces do not divide by 2 ranks"):
        balanced_assignment([1.0] * 9, 2)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 7))
def test_rows_without_a_trace_end_each_step(steps: int, traces: int, fillers: int) -> None:
    padding, values = Padding(traces, traces + fillers), list(range(steps * traces))
    rows = padding.pad(values, -1)
    assert len(rows) == steps * (traces + fillers)
    assert padding.unpad(rows) == values
    assert [padding.trace(i) for i in range(len(rows))] == [None if v < 0 else v for v in rows]
