"""Pure statistics of traces that were scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]

_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


def wilson(successes: float, n: int) -> Interval:
    """Wilson's score interval of a proportion (J. Am. Stat. Assoc. 22, 1927).

    It stays within 0..1 and keeps its coverage near both ends, where the normal interval collapses.
    For one trace a problem, so that all ``n`` are independent.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n and n >= 1, got {successes} of {n}")
    p = successes / n
    scale = 1 + _Z95**2 / n
    centre = (p + _Z95**2 / (2 * n)) / scale
    half = _Z95 / scale * math.sqrt(p * (1 - p) / n + _Z95**2 / (4 * n * n))
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def mean_interval(values: Sequence[float]) -> Interval:
    """The normal interval of a mean, for lengths and chunk counts."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return Interval(mean, mean)
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    half = _Z95 * math.sqrt(variance / n)
    return Interval(mean - half, mean + half)


# What follows takes scores_P: for each problem, the scores (0 or 1) of its samples. Samples of one
# problem are alike, so every interval is over problems, which are the independent draws.

Scores = Sequence[Sequence[float]]  # scores_P[p][s]; problems may have different numbers of samples


class Estimate(NamedTuple):
    """A number and its 95 % confidence interval."""

    value: float
    interval: Interval


def avg_at_n(scores_P: Scores) -> Estimate:
    """Mean over problems of the mean over samples: the expected accuracy of one sample (avg@n).

    Raises:
        ValueError: no problem, or a problem without samples.
    """
    means = _problem_means(scores_P)
    return Estimate(float(means.mean()), proportion_interval(means, _mean_samples(scores_P)))


def pass_at_k(scores_P: Scores, k: int) -> Estimate:
    """The chance that at least one of ``k`` samples is right, unbiased: 1 - C(n-c, k) / C(n, k).

    Chen et al., Evaluating Large Language Models Trained on Code (arXiv 2107.03374), equation 1.

    Raises:
        ValueError: a problem has fewer than ``k`` samples, or a score is neither 0 nor 1.
    """
    values = np.array([_pass_at_k(len(s), _count_right(s), k) for s in scores_P])
    if not values.size:
        raise ValueError("pass@k of no problem")
    return Estimate(float(values.mean()), proportion_interval(values, _mean_samples(scores_P)))


def _pass_at_k(n: int, right: int, k: int) -> float:
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs a problem to have at least {k} samples, got {n}")
    wrong = n - right
    return 1.0 - math.prod((wrong - i) / (n - i) for i in range(k)) if wrong >= k else 1.0


def maj_at_n(votes_P: Sequence[Sequence[str | None]], scores_P: Scores) -> Estimate:
    """How often the most frequent answer of a problem is right (maj@n, self-consistency).

    Wang et al., Self-Consistency Improves Chain of Thought Reasoning (arXiv 2203.11171). Where
    several answers are equally frequent, one is taken at random, so that they count in equal parts;
    samples without an answer (``None``) do not vote, and without any vote a problem counts 0.

    Args:
        votes_P: votes_P[p][s], the answer of a sample in a form in which equal ones are equal.
        scores_P: of the same samples.
    """
    pairs = zip(votes_P, scores_P, strict=True)
    values = np.array([majority(votes, scores) for votes, scores in pairs])
    if not values.size:
        raise ValueError("maj@n of no problem")
    return Estimate(float(values.mean()), proportion_interval(values, 1.0))


def majority(votes: Sequence[str | None], scores: Sequence[float]) -> float:
    """The expected score of a problem's most frequent answer."""
    of_answer: dict[str, list[float]] = {}
    for vote, score in zip(votes, scores, strict=True):
        if vote is not None:
            of_answer.setdefault(vote, []).append(score)
    if not of_answer:
        return 0.0
    most = max(map(len, of_answer.values()))
    winners = [sum(s) / len(s) for s in of_answer.values() if len(s) == most]
    return sum(winners) / len(winners)


def maj_at_k(
    votes_P: Sequence[Sequence[str | None]], scores_P: Scores, k: int, draws: int = 100
) -> Estimate:
    """maj@k for a ``k`` below the number of samples: the mean over random subsets of ``k``.

    Args:
        votes_P: as in ``maj_at_n``.
        scores_P: of the same samples.
        k: size of a subset.
        draws: subsets of a problem, always the same ones.
    """
    rng = np.random.default_rng(k)
    values = []
    for votes, scores in zip(votes_P, scores_P, strict=True):
        if len(votes) < k:
            raise ValueError(f"maj@{k} needs a problem to have at least {k} samples")
        picks = [rng.permutation(len(votes))[:k] for _ in range(draws if k < len(votes) else 1)]
        one = [majority([votes[i] for i in pick], [scores[i] for i in pick]) for pick in picks]
        values.append(sum(one) / len(one))
    interval = proportion_interval(np.array(values), _mean_samples(scores_P))
    return Estimate(float(np.mean(values)), interval)


def proportion_interval(values_P: Floats, samples: float = 1.0) -> Interval:
    """95 % interval of the mean of values in 0..1, one a problem, which are independent.

    Wilson's interval with the effective number of trials that the spread between problems implies,
    n* = p(1 - p) / Var(mean), and Student's t in place of the normal quantile, after Korn and
    Graubard (Survey Methodology 24, 1998). It is the t interval over problems where that is sound,
    stays within 0..1, and does not collapse where every problem came out alike: n* is then the
    number of problems.

    Args:
        values_P: a value for each problem.
        samples: samples behind a value; bounds n*.
    """
    problems = len(values_P)
    if problems < 1:
        raise ValueError("an interval of no problem")
    p = float(np.mean(values_P))
    if problems == 1:
        return wilson(min(max(p, 0.0), 1.0), 1)
    variance = float(np.var(values_P, ddof=1)) / problems
    trials = p * (1 - p) / variance if variance > 1e-15 else float(problems)
    trials = min(max(trials, problems - 1.0), problems * max(samples, 1.0))
    quantile = t_quantile(0.975, problems - 1)
    scale = 1 + quantile**2 / trials
    centre = (p + quantile**2 / (2 * trials)) / scale
    half = quantile / scale * math.sqrt(p * (1 - p) / trials + quantile**2 / (4 * trials**2))
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


class Difference(NamedTuple):
    """A paired comparison: second setting minus first, on the same problems.

    ``verdict`` is ``"better"`` or ``"worse"`` (of the second), ``"no difference"`` (the whole
    interval lies within the margin) or ``"not enough data"`` (neither can be said).
    """

    value: float
    interval: Interval
    p_value: float  # two-sided
    problems: int
    verdict: str


def compare_paired(first_P: Scores, second_P: Scores, margin: float = 0.02) -> Difference:
    """Compares two settings problem by problem, with Student's t over the differences.

    What problems have in common drops out, so the interval is narrower than those of the two
    accuracies suggest. Where every problem differs by the same amount, which says nothing of the
    spread, the interval is that of as many trials without a single exception (Wilson).

    Args:
        first_P: scores of the first setting; a problem's list may be as long as it likes.
        second_P: of the second, in the same order of problems.
        margin: the difference that would matter.

    Raises:
        ValueError: fewer than two problems, or different numbers of them.
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
        p_value = 1.0 if abs(mean) < 1e-12 else min(1.0, 2.0 ** (1 - n))  # the sign test's
    else:
        half = t_quantile(0.975, n - 1) * error
        p_value = 2 * (1 - t_cdf(abs(mean) / error, n - 1))
    interval = Interval(max(-1.0, mean - half), min(1.0, mean + half))
    return Difference(mean, interval, p_value, n, _verdict(interval, margin))


def _verdict(interval: Interval, margin: float) -> str:
    if -margin <= interval.low and interval.high <= margin:
        return "no difference"
    if interval.low > 0:
        return "better"
    if interval.high < 0:
        return "worse"
    return "not enough data"


class Bootstrap(NamedTuple):
    """What resampling the samples of each problem gives; problems stay as they are."""

    mean: float
    sd: float
    interval: Interval  # 2.5 % and 97.5 % quantiles: of sampling noise alone
    k: int
    resamples: int


def bootstrap_avg(scores_P: Scores, k: int, resamples: int = 5000, seed: int = 0) -> Bootstrap:
    """avg@k as the paper reports it: ``k`` samples of a problem drawn with replacement, often.

    The number of right ones among k draws with replacement is binomial, so it is drawn as such, for
    all resamples at once: the same distribution as drawing indices.

    Args:
        scores_P: scores, 0 or 1.
        k: samples of a problem in a resample (128 in the paper).
        resamples: how many (5,000 in the paper).
        seed: of the draws.

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


def t_cdf(t: float, degrees: int) -> float:
    """Student's distribution function, exact for whole degrees of freedom.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    if degrees < 1:
        raise ValueError(f"Student's t needs at least 1 degree of freedom, got {degrees}")
    angle = math.atan(abs(t) / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for i in range((degrees - odd) // 2):
        total += term
        term *= cosine**2 * (2 * i + 1 + odd) / (2 * i + 2 + odd)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + math.copysign(inside / 2, t) if t else 0.5


@cache
def t_quantile(p: float, degrees: int) -> float:
    """The ``p`` quantile of Student's distribution, by bisection."""
    if not 0 < p < 1:
        raise ValueError(f"a quantile is taken between 0 and 1, got {p}")
    if p < 0.5:
        return -t_quantile(1 - p, degrees)
    low, high = 0.0, 1.0
    while t_cdf(high, degrees) < p:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, degrees) < p else (low, middle)
    return high


def _problem_means(scores_P: Scores) -> Floats:
    if not len(scores_P) or not all(len(scores) for scores in scores_P):
        raise ValueError("every problem needs a sample")
    return np.array([sum(scores) / len(scores) for scores in scores_P], float)


def _mean_samples(scores_P: Scores) -> float:
    return sum(map(len, scores_P)) / len(scores_P)


def _count_right(scores: Sequence[float]) -> int:
    if any(score not in (0, 1) for score in scores):
        raise ValueError("right samples are counted by scores of 0 or 1")
    return int(sum(scores))
