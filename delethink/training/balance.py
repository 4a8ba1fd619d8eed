"""Which process trains on which traces: pure arithmetic over costs.

Traces of a reasoner are very unlike: one of twelve chunks costs twelve times one of one, and a
process that is done waits for the slowest. Every process gets as many traces as any other, because
TRL's batches have one size, so only which ones is free. Processes keep step with each other at each
micro-batch, so what is made short is the sum over micro-batches of the slowest process's cost.

Sorted by cost, traces are cut into micro-batches of like traces over all processes. In each, rounds
of one trace for every process are dealt out, the costliest to whom has least so far. By induction
two processes then differ by no more than the widest of those rounds, which is a small part of a
trace, where plain list scheduling is bounded by a whole one (Graham 1969).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Order = list[list[int]]  # rows of each process, in the order of its micro-batches


class Load(NamedTuple):
    """How even the work of a batch is."""

    balance: float  # mean cost of a process / highest cost of one; 1 is even
    busy: float  # share of the time that processes work, if they wait at every micro-batch
    costs: list[float]  # of each process


def deal(costs: Sequence[float], num_processes: int, micro_batch_size: int) -> Order:
    """Deals the traces of an optimizer step out to processes.

    Args:
        costs: of each trace of the step, in any unit.
        num_processes: R.
        micro_batch_size: traces of a process in a micro-batch, B; R x B divides the number of
            traces.

    Returns:
        For each process the places of its traces in ``costs``. Each place is there once, every
        process has as many, and ``slowest`` is never higher than in the order given.
    """
    size = num_processes * micro_batch_size
    if not costs or len(costs) % size:
        raise ValueError(
            f"{len(costs)} traces are not cut into micro-batches of {num_processes} x "
            f"{micro_batch_size}"
        )
    ranked = sorted(range(len(costs)), key=lambda i: -costs[i])
    order: Order = [[] for _ in range(num_processes)]
    for first in range(0, len(costs), size):
        shares = _deal_rounds(ranked[first : first + size], costs, num_processes)
        for own, share in zip(order, shares, strict=True):
            own += share
    given = in_order(len(costs), num_processes)
    return min(given, order, key=lambda o: slowest(o, costs, micro_batch_size))


def in_order(num_traces: int, num_processes: int) -> Order:
    """The order given: the first traces to the first process."""
    share = num_traces // num_processes
    return [list(range(r * share, (r + 1) * share)) for r in range(num_processes)]


def slowest(order: Order, costs: Sequence[float], micro_batch_size: int) -> float:
    """The sum over micro-batches of the cost of the process that has most to do."""
    return sum(
        max(sum(costs[i] for i in own[first : first + micro_batch_size]) for own in order)
        for first in range(0, len(order[0]), micro_batch_size)
    )


def load(order: Order, costs: Sequence[float], micro_batch_size: int) -> Load:
    """How even an order is."""
    own = [sum(costs[i] for i in rows) for rows in order]
    mean = sum(own) / len(own)
    if not mean:  # nothing was sampled
        return Load(1.0, 1.0, own)
    return Load(mean / max(own), mean / slowest(order, costs, micro_batch_size), own)


def _deal_rounds(ranked: Sequence[int], costs: Sequence[float], num_processes: int) -> Order:
    """Rounds of one trace for every process, the costliest of a round to whom has least."""
    shares: Order = [[] for _ in range(num_processes)]
    done = [0.0] * num_processes
    for first in range(0, len(ranked), num_processes):
        behind = sorted(range(num_processes), key=lambda r: done[r])
        for r, i in zip(behind, ranked[first : first + num_processes], strict=True):
            shares[r].append(i)
            done[r] += costs[i]
    return shares
