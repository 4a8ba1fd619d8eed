"""Pure statistics of traces that were scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

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
