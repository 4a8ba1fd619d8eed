"""Intervals: values worked out by hand, and the laws an interval obeys."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delethink.evaluation.metrics import mean_interval, wilson


def test_wilson_against_a_published_value() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 by the score method.
    low, high = wilson(81, 263)
    assert low == pytest.approx(0.2553, abs=5e-5)
    assert high == pytest.approx(0.3662, abs=5e-5)


def test_wilson_does_not_collapse_at_the_ends() -> None:
    assert wilson(0, 10).high == pytest.approx(0.2775, abs=5e-5)
    assert wilson(10, 10).low == pytest.approx(0.7225, abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_proportion_and_stays_in_bounds(counts: tuple[int, int]) -> None:
    successes, n = counts
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n + 1e-12
    assert successes / n - 1e-12 <= high <= 1


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="need 0 <= successes"):
        wilson(successes, n)


def test_mean_interval_by_hand() -> None:
    low, high = mean_interval([1.0, 3.0])  # mean 2, standard deviation sqrt(2)
    assert (low, high) == pytest.approx((2 - 1.96, 2 + 1.96), abs=1e-3)
    assert mean_interval([4.0]) == (4.0, 4.0)
