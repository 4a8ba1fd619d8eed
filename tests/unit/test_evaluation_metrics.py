"""Metrics of many samples: closed forms, laws, and the coverage of their intervals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delethink.evaluation.metrics import (
    avg_at_n,
    bootstrap_avg,
    compare_paired,
    maj_at_k,
    maj_at_n,
    majority,
    pass_at_k,
    proportion_interval,
    t_quantile,
)

scores = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=8)
several = st.lists(scores, min_size=1, max_size=12)


@given(several)
def test_avg_is_the_mean_over_problems_of_means_over_samples(
    scores_P: list[list[float]],
) -> None:
    found = avg_at_n(scores_P)
    assert found.value == pytest.approx(np.mean([np.mean(s) for s in scores_P]))
    assert 0 <= found.interval.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.interval.high <= 1


@given(scores, st.integers(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(one: list[float], k: int) -> None:
    if k > len(one):
        with pytest.raises(ValueError, match="at least"):
            pass_at_k([one], k)
        return
    subsets = list(itertools.combinations(one, k))
    assert pass_at_k([one], k).value == pytest.approx(np.mean([any(s) for s in subsets]))


@given(st.integers(1, 400), st.data())
def test_pass_at_k_equals_the_estimator_of_humaneval(n: int, data: st.DataObject) -> None:
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    # The published estimator, as lm-eval and HumanEval compute it.
    wrong = n - right
    expected = 1.0 if wrong < k else 1.0 - np.prod(1.0 - k / np.arange(wrong + 1, n + 1))
    found = pass_at_k([[1.0] * right + [0.0] * wrong], k).value
    assert found == pytest.approx(expected, abs=1e-9)
    exact = 1 - math.comb(wrong, k) / math.comb(n, k)
    assert found == pytest.approx(exact, abs=1e-9)


@given(several)
def test_pass_at_1_is_avg(scores_P: list[list[float]]) -> None:
    assert pass_at_k(scores_P, 1).value == pytest.approx(avg_at_n(scores_P).value)


def test_majority_takes_the_most_frequent_answer_and_shares_ties() -> None:
    assert majority(["7", "7", "8"], [1, 1, 0]) == 1
    assert majority(["7", "8", "8"], [1, 0, 0]) == 0
    assert majority(["7", "8"], [1, 0]) == 0.5
    assert majority([None, None, "8"], [0, 0, 1]) == 1  # no answer is no vote
    assert majority([None, None], [0, 0]) == 0


def test_maj_at_k_is_avg_for_one_vote_and_maj_at_n_for_all() -> None:
    votes = [["a", "a", "b", None], ["c", "d", "d", "d"]]
    right = [[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    assert maj_at_k(votes, right, 4).value == maj_at_n(votes, right).value == 0.5
    assert maj_at_k(votes, right, 1, draws=4000).value == pytest.approx(0.375, abs=0.03)


def test_students_t_quantiles_are_those_of_the_tables() -> None:
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 10: 2.22814, 29: 2.04523, 120: 1.97993}
    for degrees, value in table.items():
        assert t_quantile(0.975, degrees) == pytest.approx(value, rel=1e-5)
        assert t_quantile(0.025, degrees) == pytest.approx(-t_quantile(0.975, degrees))


@pytest.mark.parametrize(
    ("problems", "samples", "spread"),
    [(30, 4, (2.0, 2.0)), (30, 16, (0.5, 0.5)), (60, 8, (1.0, 3.0)), (256, 4, (2.0, 1.0))],
)
def test_intervals_cover_at_their_level_in_spite_of_clusters(
    problems: int, samples: int, spread: tuple[float, float]
) -> None:
    """Problems differ in difficulty (a beta distribution), so samples of one are alike."""
    rng, rounds = np.random.default_rng(7), 4000
    truth = spread[0] / sum(spread)
    difficulty = rng.beta(*spread, size=(rounds, problems))
    means = rng.binomial(samples, difficulty) / samples
    intervals = [proportion_interval(one, samples) for one in means]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.93 <= covered <= 0.97
    # What ignores the clusters does not: it takes all samples for independent.
    naive = 1.96 * np.sqrt(truth * (1 - truth) / (problems * samples))
    assert np.mean(np.abs(means.mean(1) - truth) <= naive) < 0.93


def test_paired_intervals_cover_and_the_p_value_is_uniform_where_nothing_differs() -> None:
    rng, rounds = np.random.default_rng(11), 2000
    covered, small = [], []
    for _ in range(rounds):
        difficulty = rng.beta(1, 1, size=30)
        a, b = (rng.random((30, 8)) < difficulty[:, None] for _ in range(2))
        found = compare_paired(a.astype(float).tolist(), b.astype(float).tolist())
        covered.append(found.interval.low <= 0 <= found.interval.high)
        small.append(found.p_value < 0.05)
    assert 0.93 <= np.mean(covered) <= 0.97
    assert 0.03 <= np.mean(small) <= 0.07


def test_an_interval_does_not_collapse_where_every_problem_came_out_alike() -> None:
    assert proportion_interval(np.ones(30), 4).low < 0.9
    assert proportion_interval(np.zeros(30), 4).high > 0.1


def test_no_difference_and_not_enough_data_are_told_apart() -> None:
    rng = np.random.default_rng(0)
    half = [[float(x) for x in rng.random(64) < 0.5] for _ in range(4000)]
    other = [[float(x) for x in rng.random(64) < 0.5] for _ in range(4000)]
    assert compare_paired(half, other).verdict == "no difference"
    assert compare_paired(half[:5], other[:5]).verdict == "not enough data"
    zeros, ones = [[0.0]] * 30, [[1.0]] * 30
    assert compare_paired(zeros, ones).verdict == "better"
    assert compare_paired(ones, zeros).verdict == "worse"
    assert compare_paired(zeros[:3], zeros[:3]).verdict == "not enough data"


@given(several)
def test_a_comparison_with_the_sides_swapped_is_its_negative(scores_P: list[list[float]]) -> None:
    if len(scores_P) < 2:
        return
    other = scores_P[::-1]
    a, b = compare_paired(scores_P, other), compare_paired(other, scores_P)
    assert a.value == pytest.approx(-b.value)
    assert a.interval.low == pytest.approx(-b.interval.high)
    assert a.p_value == pytest.approx(b.p_value)


def test_the_bootstrap_is_that_of_drawn_indices() -> None:
    rng = np.random.default_rng(3)
    right = rng.random((12, 32)) < rng.beta(1, 1, size=(12, 1))
    drawn = [np.mean([np.mean(one[rng.integers(0, 32, 16)]) for one in right]) for _ in range(4000)]
    found = bootstrap_avg(right.astype(float).tolist(), k=16, resamples=5000, seed=1)
    assert found.mean == pytest.approx(right.mean(), abs=0.003)
    assert found.sd == pytest.approx(np.std(drawn), rel=0.06)
    assert found == bootstrap_avg(right.astype(float).tolist(), k=16, resamples=5000, seed=1)


def test_the_bootstrap_of_the_papers_size_has_the_sd_that_it_reports() -> None:
    """256 samples of 30 problems, avg@128: the paper states a standard deviation below 0.004."""
    rng = np.random.default_rng(5)
    right = rng.random((30, 256)) < rng.beta(0.5, 0.5, size=(30, 1))
    found = bootstrap_avg(right.astype(float).tolist(), k=128)
    shares = right.mean(1)
    exact = math.sqrt((shares * (1 - shares) / 128).sum()) / 30
    assert found.sd == pytest.approx(exact, rel=0.05)
    assert found.sd < 0.008
