"""LongCoT against Delethink: growth, crossings, and the cheapest chunk sizes."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import product
from typing import NamedTuple

import numpy as np

from delethink.cost.estimate import Cost, Lengths, Workload, estimate
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


class Polynomial(NamedTuple):
    """FLOPs as an exact polynomial of the thinking length n: constant, n, n^2."""

    constant: Fraction
    linear: Fraction
    quadratic: Fraction

    def __str__(self) -> str:
        terms = [
            f"{float(value):.4g}{power}"
            for value, power in zip(reversed(self), (" n^2", " n", ""), strict=True)
            if value
        ]
        return " + ".join(terms).replace("+ -", "- ") or "0"


def flops_polynomial(shape: ModelShape, cut: Cut, query: int) -> Polynomial:
    """Return the training FLOPs of a trace as a polynomial of its length, at full chunks.

    Once every window is full, the exact sum is a polynomial of degree two at most. Three lengths
    determine the coefficients, and a fourth one verifies the degree.

    Raises:
        ArithmeticError: the fourth length disagrees, which means a bug in the sums.
    """
    longcot = np.isinf(cut.context_size)
    windows = [mixer.window or 0 for mixer, _ in shape.mixers]
    first = max(windows) + 1 if longcot else int(cut.context_size)
    step = 1024 if longcot else int(cut.context_size - cut.carryover_size)
    lengths = [first + i * step for i in range(4)]
    chunks = cut_traces(np.array(lengths, float), query, cut)
    costs = [Fraction(int(value)) for value in training_flops(shape, chunks)]
    third = costs[3] - 3 * costs[2] + 3 * costs[1] - costs[0]
    if abs(third) > costs[3] * Fraction(1, 10**12):  # float64 rounds to 53 bits
        raise ArithmeticError(f"FLOPs of {shape.name} are no polynomial of the length")
    second = (costs[2] - 2 * costs[1] + costs[0]) / 2
    quadratic = Fraction(second, step * step) if abs(second) * 10**12 > costs[2] else Fraction(0)
    slope = Fraction(costs[1] - costs[0], step)
    linear = slope - quadratic * (lengths[1] + lengths[0])
    constant = costs[0] - linear * lengths[0] - quadratic * lengths[0] ** 2
    return Polynomial(constant, linear, quadratic)


class Growth(NamedTuple):
    """Cost at S n thinking tokens, relative to n tokens."""

    factor: int
    thinking: float
    flops: float
    memory: float
    training: float
    sampling: float


def growth(
    shape: ModelShape,
    cut: Cut,
    device: Accelerator,
    efficiency: Efficiency,
    workload: Workload,
    base: float,
    factors: tuple[int, ...] = (1, 2, 4, 8, 16, 32),
) -> list[Growth]:
    """Return the growth of a method's costs (the table in section 4.3 of the paper).

    ``base`` is n in tokens. Memory is the KV cache of a trace.
    """
    lengths = Lengths.constant(base * np.array(factors, float))
    cost = estimate(shape, lengths, cut, device, efficiency, workload)
    columns = (cost.flops, cost.cache_bytes, cost.training_seconds, cost.sampling_seconds)
    ratios = [column / column[0] for column in columns]
    return [
        Growth(factor, base * factor, *(float(ratio[i]) for ratio in ratios))
        for i, factor in enumerate(factors)
    ]


class SizeChoice(NamedTuple):
    """Chunk sizes and their cost."""

    context_size: int
    carryover_size: int
    cost: Cost


# The paper's ablations lose accuracy below these sizes or did not try them (sections 6.4 and E).
MIN_CONTEXT_TOKENS, MIN_CARRYOVER_TOKENS = 4096, 1024


def cheapest_cuts(
    shape: ModelShape,
    lengths: Lengths,
    device: Accelerator,
    efficiency: Efficiency,
    workload: Workload,
    head: int = 0,
    keep: int = 5,
) -> list[SizeChoice]:
    """Return the chunk sizes with the shortest steps, cheapest first.

    C comes from a grid up to the mean length. Accuracy is not estimated and has to be measured, so
    sizes below the smallest ones in the paper's ablations are left out.
    """
    mean = float(lengths.mean)
    sizes = [int(b * 2**i) for i in range(21) for b in (1024, 1536) if b * 2**i <= mean]
    contexts = [c for c in sizes if c >= MIN_CONTEXT_TOKENS]
    pairs = [
        (context, carry)
        for context, eighth in product(contexts, range(1, 8))
        if (carry := context * eighth // 8) >= max(MIN_CARRYOVER_TOKENS, head)
    ]
    if not pairs:
        return []
    grid = np.array(pairs, float)
    cut = Cut(grid[:, 0], grid[:, 1], 0, head)
    many = Lengths(lengths.values[None, :], np.full(len(pairs), float(lengths.longest)))
    seconds = estimate(shape, many, cut, device, efficiency, workload).step_seconds
    order = np.argsort(np.nan_to_num(seconds, nan=np.inf))[:keep]
    found = []
    for context, carry in (pairs[i] for i in order if np.isfinite(seconds[i])):
        cost = estimate(shape, lengths, Cut(context, carry, 0, head), device, efficiency, workload)
        found.append(SizeChoice(context, carry, cost))
    return found
