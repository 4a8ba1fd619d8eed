"""Tests of the protocol: hierarchical bootstrap over held-out problems, and Holm's correction.

    result = paired_bootstrap(first, second)     # scores [seeds][problems][samples]
    result.p_above(-0.05), result.p_below(-0.05), result.interval()

Seeds are strata: each resample keeps all of them, so a verdict is about these seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

MARGIN = 0.05  # largest loss in accuracy that still matches
ALPHA = 0.01  # largest corrected p of a decision
RESAMPLES = 10_000

Array = npt.NDArray[np.float64]
Verdict = Literal["holds", "does not hold", "not decided"]


@dataclass(frozen=True)
class Resampled:
    """A statistic and its bootstrap resamples."""

    value: float
    draws: Array  # [resamples]
    problems: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the percentile interval."""
        tail = (1 - level) / 2
        low, high = np.quantile(self.draws, [tail, 1 - tail])
        return float(low), float(high)

    def p_above(self, bound: float) -> float:
        """Return the p of "the statistic is above ``bound``"."""
        return float((1 + np.sum(self.draws <= bound)) / (1 + len(self.draws)))

    def p_below(self, bound: float) -> float:
        """Return the p of "the statistic is below ``bound``"."""
        return float((1 + np.sum(self.draws >= bound)) / (1 + len(self.draws)))


def paired_bootstrap(
    first: Any, second: Any, resamples: int = RESAMPLES, seed: int = 0
) -> Resampled:
    """Resample the mean of ``first`` minus ``second`` over problems, then over samples.

    Args:
        first: scores [seeds, problems, samples].
        second: scores of the same seeds and problems; the number of samples may differ.
        resamples: number of resamples.
        seed: seed of the resamples.

    Raises:
        ValueError: the shapes do not pair.
    """
    return combined_bootstrap([(1.0, first), (-1.0, second)], resamples, seed)


def combined_bootstrap(
    terms: Sequence[tuple[float, Any]], resamples: int = RESAMPLES, seed: int = 0
) -> Resampled:
    """Resample a weighted sum of mean scores over the same problems.

    Args:
        terms: a weight, and scores [seeds, problems, samples]. A resample draws the same problems
            for every term and seed, and the samples of each anew.
        resamples: number of resamples.
        seed: seed of the resamples.

    Raises:
        ValueError: the terms have other seeds or problems.
    """
    scores = [(weight, np.asarray(values, float)) for weight, values in terms]
    shapes = {values.shape[:2] for _, values in scores}
    if len(shapes) != 1 or any(values.ndim != 3 for _, values in scores):
        found = ", ".join(str(values.shape) for _, values in scores)
        raise ValueError(f"scores must have the same seeds and problems, got the shapes {found}")
    num_seeds, num_problems = (int(size) for size in shapes.pop())
    rng = np.random.default_rng(seed)
    strata = np.arange(num_seeds)[:, np.newaxis, np.newaxis]
    draws = np.zeros(resamples)
    # Terms with one sample of each problem need no draw of samples, so they are one sum.
    single = sum((w * v[:, :, 0].mean(0) for w, v in scores if v.shape[2] == 1), start=np.zeros(1))
    single = np.broadcast_to(single, num_problems)
    several = [(weight, values) for weight, values in scores if values.shape[2] > 1]
    for i in range(resamples):
        drawn = rng.integers(num_problems, size=num_problems)
        draws[i] = single[drawn].mean()
        for weight, values in several:
            # One draw of as many samples as there are, for each drawn problem and seed.
            picked = rng.integers(values.shape[2], size=(num_seeds, num_problems, values.shape[2]))
            draws[i] += weight * values[strata, drawn[None, :, None], picked].mean()
    value = sum(weight * float(values.mean()) for weight, values in scores)
    return Resampled(value, draws, num_problems)


def prediction_interval(scores: Any, level: float = 0.99) -> tuple[float, float]:
    """Return the interval of the mean score if the same problems are sampled anew.

    Args:
        scores: 0 or 1 [problems, samples]; the new run has as many samples.
        level: least probability that the new mean lies inside.
    """
    values = np.asarray(scores, float)
    mean = float(values.mean())
    # The variance within problems is unknown with one sample each; it is at most that of all.
    half = float(norm.isf((1 - level) / 2)) * math.sqrt(2 * mean * (1 - mean) / values.size)
    # At least one score, as a mean is a multiple of it.
    half = max(half, 1 / values.size)
    return mean - half, mean + half


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return the p-values corrected by Holm's step-down method."""
    corrected, largest, left = {}, 0.0, len(p_values)
    for name, p in sorted(p_values.items(), key=lambda item: item[1]):
        largest = max(largest, min(1.0, left * p))
        corrected[name] = largest
        left -= 1
    return {name: corrected[name] for name in p_values}


@dataclass(frozen=True)
class ClaimTest:
    """One test of a claim: a statistic is above a bound."""

    claim: int
    name: str  # unique over all claims and families
    result: Resampled
    bound: float
    counts: bool = True  # for the verdict of the claim

    @property
    def p_values(self) -> dict[str, float]:
        """Return the p of the test and of its refutation."""
        return {
            f"{self.name}, above": self.result.p_above(self.bound),
            f"{self.name}, below": self.result.p_below(self.bound),
        }

    def verdict(self, corrected: Mapping[str, float]) -> Verdict:
        """Return the decision at the corrected p-values of all tests."""
        if corrected[f"{self.name}, above"] < ALPHA:
            return "holds"
        return "does not hold" if corrected[f"{self.name}, below"] < ALPHA else "not decided"

    def deciding_problems(self, num_tests: int) -> int | None:
        """Return the number of problems that would decide if the difference stays.

        ``None`` if the difference is at its bound. The strictest step of Holm's method is assumed.
        """
        error = float(np.std(self.result.draws))
        distance = abs(self.result.value - self.bound)
        if not distance:
            return None
        needed = float(norm.isf(ALPHA / num_tests)) * error / distance
        return math.ceil(self.result.problems * max(1.0, needed**2))


def correct(tests: Sequence[ClaimTest]) -> dict[str, float]:
    """Return Holm's correction over all tests, in both directions."""
    return holm({name: p for test in tests for name, p in test.p_values.items()})


def claim_verdict(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict of a claim from those of its tests in all families."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if verdicts and set(verdicts) == {"holds"} else "not decided"
