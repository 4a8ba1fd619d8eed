"""The replication's tests: known answers of the bootstrap, Holm's correction, and verdicts."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "recipes" / "replication"))

import inference


def scores(p: float, seed: int, seeds: int = 3, problems: int = 400, samples: int = 1):
    return np.random.default_rng(seed).random((seeds, problems, samples)) < p


def test_the_interval_of_one_seed_is_that_of_the_paired_differences() -> None:
    first, second = scores(0.8, 1, seeds=1), scores(0.6, 2, seeds=1)
    result = inference.paired_bootstrap(first, second, resamples=4000)
    differences = (first.astype(float) - second)[0, :, 0]
    half = 1.96 * differences.std() / 20
    low, high = result.interval()
    assert result.value == pytest.approx(differences.mean())
    assert low == pytest.approx(differences.mean() - half, abs=0.01)
    assert high == pytest.approx(differences.mean() + half, abs=0.01)


def test_seeds_are_strata_so_their_difference_adds_nothing() -> None:
    # Each seed has one score on every problem: nothing varies within a stratum.
    first = np.array([0.0, 1.0, 1.0])[:, None, None] * np.ones((3, 50, 1))
    result = inference.paired_bootstrap(first, np.zeros((3, 50, 1)), resamples=200)
    assert result.value == pytest.approx(2 / 3)
    assert np.ptp(result.draws) < 1e-12


def test_problems_are_drawn_together_for_all_seeds() -> None:
    # The seeds agree on every problem, so three of them say no more than one.
    one = scores(0.5, 3, seeds=1)
    same, zero = np.repeat(one, 3, axis=0), np.zeros((3, 400, 1))
    spread = inference.paired_bootstrap(same, zero, resamples=4000).draws.std()
    assert spread == pytest.approx(0.5 / 20, rel=0.1)


def test_samples_of_a_problem_are_drawn_too() -> None:
    # All problems are alike, so the only spread is that of their four samples.
    values = np.tile(np.array([0.0, 0.0, 1.0, 1.0]), (1, 100, 1))
    spread = inference.paired_bootstrap(values, np.zeros((1, 100, 1)), resamples=4000).draws.std()
    assert spread == pytest.approx(0.5 / np.sqrt(400), rel=0.1)


def test_p_values_count_resamples() -> None:
    result = inference.Resampled(0.5, np.arange(1, 100) / 100, 10)
    assert result.p_above(0.1) == pytest.approx(11 / 100)
    assert result.p_below(0.1) == pytest.approx(91 / 100)
    assert result.p_above(0.0) == pytest.approx(1 / 100)


def test_another_sampling_of_the_same_problems_is_inside_the_prediction_interval() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        skill = rng.beta(0.5, 0.5, (300, 1))  # problems that differ: the interval is conservative
        low, high = inference.prediction_interval(rng.binomial(1, skill))
        inside += low <= rng.binomial(1, skill).mean() <= high
    assert inside >= 0.99 * 400
    low, high = inference.prediction_interval(rng.binomial(1, 0.5, (300, 1)))
    assert not low <= 0.7 <= high
    assert inference.prediction_interval(np.zeros((4, 1))) == (-0.25, 0.25)


def test_shapes_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="same seeds and problems"):
        inference.paired_bootstrap(np.zeros((3, 4, 1)), np.zeros((3, 5, 1)))


def test_holm_as_in_a_textbook() -> None:
    # 0.01, 0.04, 0.03, 0.005: multiplied by 4, 3, 2, 1 in rising order, never falling.
    found = inference.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(found) == ["a", "b", "c", "d"]
    assert inference.holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    ("first", "bound", "expected"),
    [(0.9, 0.0, "holds"), (0.3, -0.05, "does not hold"), (0.6, 0.0, "not decided")],
)
def test_verdicts_of_clear_and_unclear_differences(first, bound, expected) -> None:
    result = inference.paired_bootstrap(scores(first, 5), scores(0.6, 6), resamples=2000)
    test = inference.ClaimTest(2, "a test", result, bound)
    assert test.verdict(inference.correct([test])) == expected


def test_four_times_the_problems_decide_at_half_the_distance() -> None:
    draws = np.random.default_rng(0).normal(0, 1, 100_000)
    near, far = (
        inference.ClaimTest(1, "t", inference.Resampled(v, v + draws, 100), 0.0) for v in (0.5, 1.0)
    )
    assert near.deciding_problems(10) / far.deciding_problems(10) == pytest.approx(4, rel=0.02)
    # One-sided 0.001 has z = 3.09.
    assert far.deciding_problems(10) == pytest.approx(100 * 3.09**2, rel=0.02)


def test_a_claim_needs_all_its_tests() -> None:
    assert inference.claim_verdict(["holds", "holds"]) == "holds"
    assert inference.claim_verdict(["holds", "not decided"]) == "not decided"
    assert inference.claim_verdict(["holds", "does not hold"]) == "does not hold"
    assert inference.claim_verdict([]) == "not decided"
