"""Statistics of scored traces: accuracies, their intervals, and paired comparisons.

Pure functions of scores. They need NumPy and, for Student's t distribution, SciPy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from delethink.errors import MissingExtraError

_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution

Scores = Sequence[Sequence[float]]
"""``scores_P[p][s]``: score (0 or 1) of sample s of problem p; numbers of samples may differ."""


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> Interval:
        """Both ends of the interval."""
        return Interval(self.low, self.high)


def wilson(successes: float, n: int) -> Interval:
    """Return Wilson's score interval of a proportion (J. Am. Stat. Assoc. 22, 1927).

    The interval stays within 0..1 and keeps its coverage near both ends, unlike the normal one.
    All ``n`` trials must be independent, as with a single trace per problem.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n and n >= 1, got {successes} of {n}")
    return _score_interval(successes / n, n, _Z95)


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the normal interval of a mean, for lengths and chunk counts."""
    mean, n = fmean(values), len(values)
    half = _Z95 * stdev(values) / math.sqrt(n) if n > 1 else 0.0
    return Interval(mean - half, mean + half)


# Samples of one problem are correlated and problems are independent: the intervals of the
# functions below are over problems.


def clustered_mean(values_P: Sequence[Sequence[float]]) -> Estimate:
    """Return the mean over problems of means over samples, with Student's t interval.

    The interval of a single problem has no width.
    """
    means = _problem_means(values_P)
    mean, n = float(means.mean()), len(means)
    half = t_quantile(0.975, n - 1) * float(means.std(ddof=1)) / n**0.5 if n > 1 else 0.0
    return Estimate(mean, mean - half, mean + half)


def avg_at_n(scores_P: Scores) -> Estimate:
    """Return avg@n, the expected accuracy of one sample.

    Raises:
        ValueError: no problem, or a problem without samples.
    """
    return _estimate(_problem_means(scores_P), fmean(map(len, scores_P)))


def pass_at_k(scores_P: Scores, k: int) -> Estimate:
    """Return pass@k, the unbiased chance of a right sample among ``k``: 1 - C(n-c, k) / C(n, k).

    Chen et al., Evaluating Large Language Models Trained on Code (arXiv 2107.03374), equation 1.

    Raises:
        ValueError: a problem has fewer than ``k`` samples, or a score is neither 0 nor 1.
    """
    values = []
    for scores in scores_P:
        n, right = len(scores), _count_right(scores)
        if not 1 <= k <= n:
            raise ValueError(f"pass@{k} needs at least {k} samples of each problem, got {n}")
        values.append(1 - math.comb(n - right, k) / math.comb(n, k))
    return _estimate(np.array(values), fmean(map(len, scores_P)))


def maj_at_n(votes_P: Sequence[Sequence[str | None]], scores_P: Scores) -> Estimate:
    """Return maj@n (self-consistency): the share of problems whose most frequent answer is right.

    Wang et al., Self-Consistency Improves Chain of Thought Reasoning (arXiv 2203.11171). Tied
    answers count in equal parts, samples without an answer (``None``) do not vote, and a problem
    without votes counts 0. ``votes_P[p][s]`` is the answer of a sample; equal answers have equal
    texts.
    """
    pairs = zip(votes_P, scores_P, strict=True)
    return _estimate(np.array([majority(votes, scores) for votes, scores in pairs]))


def majority(votes: Sequence[str | None], scores: Sequence[float]) -> float:
    """Return the expected score of the most frequent answer to a problem."""
    scores_of: dict[str, list[float]] = {}
    for vote, score in zip(votes, scores, strict=True):
        if vote is not None:
            scores_of.setdefault(vote, []).append(score)
    if not scores_of:
        return 0.0
    most = max(map(len, scores_of.values()))
    return fmean(fmean(s) for s in scores_of.values() if len(s) == most)


def maj_at_k(
    votes_P: Sequence[Sequence[str | None]], scores_P: Scores, k: int, draws: int = 100
) -> Estimate:
    """Return maj@k for ``k`` below the number of samples, as the mean over random subsets.

    Each problem gets ``draws`` subsets, always the same ones for the same ``k``.
    """
    rng = np.random.default_rng(k)
    values = []
    for votes, scores in zip(votes_P, scores_P, strict=True):
        if len(votes) < k:
            raise ValueError(f"maj@{k} needs at least {k} samples of each problem")
        picks = [rng.permutation(len(votes))[:k] for _ in range(draws if k < len(votes) else 1)]
        means = [majority([votes[i] for i in pick], [scores[i] for i in pick]) for pick in picks]
        values.append(fmean(means))
    return _estimate(np.array(values), fmean(map(len, scores_P)))


def _estimate(values_P: npt.NDArray[np.float64], samples: float = 1.0) -> Estimate:
    interval = proportion_interval(values_P, samples)
    return Estimate(float(values_P.mean()), *interval)


def proportion_interval(values_P: npt.NDArray[np.float64], samples: float = 1.0) -> Interval:
    """Return the 95 % interval of the mean of independent values in 0..1.

    Wilson's interval with Student's t quantile and the effective number of trials
    n* = p(1 - p) / Var(mean), after Korn and Graubard (Survey Methodology 24, 1998). With equal
    values, n* is the number of problems, so the interval keeps a width. ``samples``, the number of
    samples behind each value, is an upper bound of n* per problem.
    """
    problems = len(values_P)
    if problems < 1:
        raise ValueError("an interval needs at least one problem")
    p = float(np.mean(values_P))
    if problems == 1:
        return wilson(min(max(p, 0.0), 1.0), 1)
    variance = float(np.var(values_P, ddof=1)) / problems
    trials = p * (1 - p) / variance if variance > 1e-15 else float(problems)
    trials = min(max(trials, problems - 1.0), problems * max(samples, 1.0))
    return _score_interval(p, trials, t_quantile(0.975, problems - 1))


def _score_interval(p: float, trials: float, quantile: float) -> Interval:
    """Return the score interval of a proportion ``p`` of ``trials``."""
    scale = 1 + quantile**2 / trials
    centre = (p + quantile**2 / (2 * trials)) / scale
    half = quantile / scale * math.sqrt(p * (1 - p) / trials + quantile**2 / (4 * trials**2))
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


@dataclass(frozen=True)
class Difference:
    """Second setting minus first, on the same problems.

    ``verdict`` is ``"better"`` or ``"worse"`` (of the second), ``"no difference"`` (the whole
    interval lies within the margin) or ``"not enough data"``.
    """

    value: float
    interval: Interval
    p_value: float  # two-sided
    problems: int
    verdict: str


def compare_paired(first_P: Scores, second_P: Scores, margin: float = 0.02) -> Difference:
    """Compare two settings problem by problem, with Student's t over the differences.

    Pairing removes the spread shared by both settings, so the interval is narrower than those of
    the two accuracies suggest. If all differences are equal, their spread is unknown, and the
    half-width is Wilson's upper bound for no success in as many trials.

    Args:
        first_P: scores of the first setting.
        second_P: scores of the second setting on the same problems, in the same order; numbers of
            samples may differ.
        margin: smallest difference of interest.

    Raises:
        ValueError: fewer than two problems, or different numbers of problems.
    """
    if len(first_P) != len(second_P) or len(first_P) < 2:
        raise ValueError(
            "a paired comparison needs the same problems, at least 2: "
            f"got {len(first_P)} and {len(second_P)}"
        )
    differences = _problem_means(second_P) - _problem_means(first_P)
    n = len(differences)
    mean = float(differences.mean())
    error = math.sqrt(float(differences.var(ddof=1)) / n)
    if error < 1e-12:
        half = wilson(0, n).high
        p_value = 1.0 if abs(mean) < 1e-12 else min(1.0, 2.0 ** (1 - n))  # sign test
    else:
        half = t_quantile(0.975, n - 1) * error
        p_value = 2 * float(_special().stdtr(n - 1, -abs(mean) / error))
    low, high = max(-1.0, mean - half), min(1.0, mean + half)
    if -margin <= low and high <= margin:
        verdict = "no difference"
    else:
        verdict = "better" if low > 0 else "worse" if high < 0 else "not enough data"
    return Difference(mean, Interval(low, high), p_value, n, verdict)


@dataclass(frozen=True)
class Bootstrap:
    """Result of resampling the samples of each problem; the problems stay the same."""

    mean: float
    sd: float
    interval: Interval  # 2.5 % and 97.5 % quantiles of the sampling noise
    k: int
    resamples: int


def bootstrap_avg(scores_P: Scores, k: int, resamples: int = 5000, seed: int = 0) -> Bootstrap:
    """Return avg@k by bootstrap, as the paper reports accuracies.

    The number of right samples among k draws with replacement is binomial, so binomial numbers are
    drawn for all resamples at once. The distribution is the same as with drawn indices. The paper
    draws k = 128 samples of each problem in 5,000 resamples.

    Raises:
        ValueError: a score is neither 0 nor 1.
    """
    shares = np.array([_count_right(scores) / len(scores) for scores in scores_P])
    if not shares.size or k < 1 or resamples < 1:
        raise ValueError("a bootstrap needs a problem, k >= 1 and resamples >= 1")
    rng = np.random.default_rng(seed)
    means = rng.binomial(k, shares, size=(resamples, shares.size)).mean(1) / k
    low, high = np.quantile(means, [0.025, 0.975])
    sd = float(means.std(ddof=1)) if resamples > 1 else 0.0
    return Bootstrap(float(means.mean()), sd, Interval(float(low), float(high)), k, resamples)


def t_quantile(p: float, degrees: int) -> float:
    """Return the ``p`` quantile of Student's t distribution."""
    return float(_special().stdtrit(degrees, p))


def _special() -> Any:
    """Return ``scipy.special``, imported late because other statistics work without SciPy."""
    try:
        import scipy.special
    except ImportError:
        raise MissingExtraError("scipy", "eval") from None
    return scipy.special


def _problem_means(scores_P: Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    if not len(scores_P) or not all(len(scores) for scores in scores_P):
        raise ValueError("every problem needs a sample")
    return np.array([fmean(scores) for scores in scores_P])


def _count_right(scores: Sequence[float]) -> int:
    if any(score not in (0, 1) for score in scores):
        raise ValueError("a right sample has the score 1 and a wrong one 0, nothing in between")
    return int(sum(scores))
