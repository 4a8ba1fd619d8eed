"""Which process trains on which traces: pure arithmetic over costs.

Traces of a reasoner are very unlike: one of twelve chunks costs twelve times one of one, and a
process that is done waits for the slowest. Every process gets as many traces as any other, because
TRL's batches have one size, so only which ones is free.

Sorted by cost, traces are dealt out in rounds of one for every process, the costliest of a round to
whom has least so far. By induction two processes then never differ by more than the widest round
did, a small part of a trace, where list scheduling is bounded by a whole one (Graham 1969). Each
micro-batch holds traces of like cost, in all processes.
"""

from __future__ import annotations

from collections.abc import Sequence

Order = list[list[int]]  # places of each process's traces in the batch


def deal(costs: Sequence[float], num_processes: int) -> Order:
    """Deals the traces of an optimizer step out to processes.

    Args:
        costs: of each trace of the step, in any unit.
        num_processes: a divisor of the number of traces.

    Returns:
        For each process the places of its traces in ``costs``, the costliest first. Each place is
        there once, every process has as many, and the highest cost of a process is not above that
        of the order given.
    """
    if not costs or len(costs) % num_processes:
        raise ValueError(f"{len(costs)} traces do not divide by {num_processes} processes")
    ranked = sorted(range(len(costs)), key=lambda i: -costs[i])
    order: Order = [[] for _ in range(num_processes)]
    totals = [0.0] * num_processes
    for first in range(0, len(ranked), num_processes):
        behind = sorted(range(num_processes), key=lambda process: totals[process])
        for process, i in zip(behind, ranked[first : first + num_processes], strict=True):
            order[process].append(i)
            totals[process] += costs[i]
    given = in_order(len(costs), num_processes)
    return given if max(loads(given, costs)) <= max(totals) else order


def in_order(num_traces: int, num_processes: int) -> Order:
    """The order given: the first traces to the first process."""
    share = num_traces // num_processes
    return [list(range(p * share, (p + 1) * share)) for p in range(num_processes)]


def loads(order: Order, costs: Sequence[float]) -> list[float]:
    """The cost of each process."""
    return [sum(costs[i] for i in own) for own in order]


def balance(costs: Sequence[float]) -> float:
    """Mean cost of a process over the highest cost of one: 1 is even, and 1 / R is one for all."""
    highest = max(costs)
    return sum(costs) / len(costs) / highest if highest else 1.0
