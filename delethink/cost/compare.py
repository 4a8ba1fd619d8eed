"""LongCoT against Delethink: how each grows, where they cross, which cut is cheapest."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import product
from typing import NamedTuple

import numpy as np

from delethink.cost.estimate import Cost, Job, Lengths, estimate
from delethink.cost.flops import LONGCOT, Cut, Floats, cut_traces, sampling_flops, training_flops
from delethink.cost.hardware import Accelerator, Efficiency
from delethink.cost.shape import ModelShape

FARTHEST = 10_000_000  # tokens: where the search for a crossing ends

Curve = Callable[[Floats], Floats]  # thinking tokens -> cost


def crossing(longcot: Curve, delethink: Curve, start: int, stop: int = FARTHEST) -> int | None:
    """The length beyond which Delethink is cheaper for good, in tokens.

    Delethink's cost has a step at each boundary, so the curves may cross several times: the last
    one counts.

    Returns:
        The last length at which it is not cheaper; ``start`` where it is cheaper from there on;
        ``None`` where it is not by ``stop``.
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
    """Thinking tokens beyond which Delethink is cheaper for good, by what is counted."""

    sampling_flops: int | None
    training_flops: int | None
    step_seconds: int | None


def crossings(
    shape: ModelShape, cut: Cut, device: Accelerator, efficiency: Efficiency, job: Job
) -> Crossings:
    """Where the curves of LongCoT and Delethink cross; from C on."""
    start = int(cut.context_size)

    def flops(work: Callable[..., Floats], way: Cut) -> Curve:
        return lambda n: work(shape, cut_traces(n, job.query, way, job.group, job.prefix_cache))

    def seconds(way: Cut) -> Curve:
        def curve(n: Floats) -> Floats:
            cost = estimate(shape, Lengths.constant(n), way, device, efficiency, job)
            return np.nan_to_num(cost.step_seconds, nan=np.inf)  # does not fit

        return curve

    return Crossings(
        crossing(flops(sampling_flops, LONGCOT), flops(sampling_flops, cut), start),
        crossing(flops(training_flops, LONGCOT), flops(training_flops, cut), start),
        crossing(seconds(LONGCOT), seconds(cut), start),
    )


class Polynomial(NamedTuple):
    """FLOPs as a polynomial of the thinking length n, exactly: constant, n, n^2."""

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
    """Training FLOPs (three passes) of a trace, as a polynomial of its length at full chunks.

    The exact sum is a polynomial of degree two at most, once every window is full: its coefficients
    follow from three lengths, and a fourth one proves the degree.

    Raises:
        ArithmeticError: it is none, which would be a mistake in the sums.
    """
    whole = np.isinf(cut.context_size)
    windows = [mixer.window or 0 for mixer, _ in shape.mixers]
    first = max(windows) + 1 if whole else int(cut.context_size)
    step = 1024 if whole else int(cut.context_size - cut.carryover_size)
    lengths = [first + i * step for i in range(4)]
    chunks = cut_traces(np.array(lengths, float), query, cut)
    costs = [Fraction(int(value)) for value in training_flops(shape, chunks)]
    third = costs[3] - 3 * costs[2] + 3 * costs[1] - costs[0]
    if abs(third) > costs[3] * Fraction(1, 10**12):  # the sums are rounded to 53 bits
        raise ArithmeticError(f"FLOPs of {shape.name} are no polynomial of the length")
    second = (costs[2] - 2 * costs[1] + costs[0]) / 2
    quadratic = Fraction(second, step * step) if abs(second) * 10**12 > costs[2] else Fraction(0)
    slope = Fraction(costs[1] - costs[0], step)
    linear = slope - quadratic * (lengths[1] + lengths[0])
    constant = costs[0] - linear * lengths[0] - quadratic * lengths[0] ** 2
    return Polynomial(constant, linear, quadratic)


class Growth(NamedTuple):
    """What happens to a method's costs when thinking grows from n to n S: cost(n S) / cost(n)."""

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
    job: Job,
    base: float,
    factors: tuple[int, ...] = (1, 2, 4, 8, 16, 32),
) -> list[Growth]:
    """The table of section 4.3 of the paper in numbers, for a model; ``base`` is its n, in tokens.

    Memory is that of a trace's cache.
    """
    lengths = Lengths.constant(base * np.array(factors, float))
    cost = estimate(shape, lengths, cut, device, efficiency, job)
    columns = (cost.flops, cost.cache_bytes, cost.training_seconds, cost.sampling_seconds)
    ratios = [column / column[0] for column in columns]
    return [
        Growth(factor, base * factor, *(float(ratio[i]) for ratio in ratios))
        for i, factor in enumerate(factors)
    ]


class Choice(NamedTuple):
    """A cut and what it costs."""

    context_size: int
    carryover_size: int
    cost: Cost


# Below these the paper's own ablations lose accuracy or were not tried (sections 6.4 and E).
SMALLEST_CONTEXT, SMALLEST_CARRYOVER = 4096, 1024


def cheapest_cuts(
    shape: ModelShape,
    lengths: Lengths,
    device: Accelerator,
    efficiency: Efficiency,
    job: Job,
    smallest_context: int = SMALLEST_CONTEXT,
    smallest_carryover: int = SMALLEST_CARRYOVER,
    head: int = 0,
    keep: int = 5,
) -> list[Choice]:
    """The cuts with the shortest steps, cheapest first: C from a grid up to the mean length.

    It knows nothing of accuracy: what a model can do with a context and a carryover of a size has
    to be measured. So it keeps to at least the sizes at which the paper saw no loss.
    """
    mean = float(lengths.mean)
    sizes = [int(b * 2**i) for i in range(21) for b in (1024, 1536) if b * 2**i <= mean]
    contexts = [c for c in sizes if c >= smallest_context]
    pairs = [
        (context, carry)
        for context, eighth in product(contexts, range(1, 8))
        if (carry := context * eighth // 8) >= max(smallest_carryover, head, 1)
    ]
    if not pairs:
        return []
    grid = np.array(pairs, float)
    cut = Cut(grid[:, 0], grid[:, 1], 0, head)
    many = Lengths(lengths.values[None, :], np.full(len(pairs), float(lengths.longest)))
    seconds = estimate(shape, many, cut, device, efficiency, job).step_seconds
    order = np.argsort(np.nan_to_num(seconds, nan=np.inf))[:keep]
    found = []
    for context, carry in (pairs[i] for i in order if np.isfinite(seconds[i])):
        cost = estimate(shape, lengths, Cut(context, carry, 0, head), device, efficiency, job)
        found.append(Choice(context, carry, cost))
    return found
