"""LongCoT against Delethink: the thinking lengths beyond which Delethink is cheaper."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from delethink.cost.estimate import Lengths, Workload, estimate
from delethink.cost.flops import (
    LONGCOT,
    Cut,
    FloatArray,
    cut_traces,
    sampling_flops,
    training_flops,
)
from delethink.cost.hardware import Accelerator, Efficiency
from delethink.cost.shape import ModelShape

MAX_CROSSING_TOKENS = 10_000_000

Curve = Callable[[FloatArray], FloatArray]  # thinking tokens -> cost


def crossing(
    longcot: Curve, delethink: Curve, start: int, stop: int = MAX_CROSSING_TOKENS
) -> int | None:
    """Return the length in tokens beyond which Delethink is always cheaper.

    Delethink's cost has a step at each boundary, so the curves may cross several times. The last
    crossing counts.

    Returns:
        The last length at which Delethink is not cheaper; ``start`` if it is cheaper everywhere;
        ``None`` if it is not cheaper at ``stop``.
    """
    grid = np.unique(np.geomspace(start, stop, 4000).round())
    behind = np.flatnonzero(longcot(grid) <= delethink(grid))
    if behind.size == 0:
        return start
    if behind[-1] == grid.size - 1:
        return None
    near = np.arange(grid[behind[-1]], grid[behind[-1] + 1] + 1)
    return int(near[np.flatnonzero(longcot(near) <= delethink(near))[-1]])


class Crossings(NamedTuple):
    """Thinking tokens beyond which Delethink is always cheaper, for each quantity."""

    sampling_flops: int | None
    training_flops: int | None
    step_seconds: int | None


def crossings(
    shape: ModelShape, cut: Cut, device: Accelerator, efficiency: Efficiency, workload: Workload
) -> Crossings:
    """Return the crossings of LongCoT and Delethink from C tokens on."""

    def flops(count: Callable[..., FloatArray], method: Cut) -> Curve:
        query, group, cached = workload.query, workload.group, workload.prefix_cache
        return lambda n: count(shape, cut_traces(n, query, method, group, cached))

    def seconds(method: Cut) -> Curve:
        def curve(n: FloatArray) -> FloatArray:
            cost = estimate(shape, Lengths.constant(n), method, device, efficiency, workload)
            return np.nan_to_num(cost.step_seconds, nan=np.inf)  # NaN: does not fit

        return curve

    start = int(cut.context_size)
    return Crossings(
        crossing(flops(sampling_flops, LONGCOT), flops(sampling_flops, cut), start),
        crossing(flops(training_flops, LONGCOT), flops(training_flops, cut), start),
        crossing(seconds(LONGCOT), seconds(cut), start),
    )
