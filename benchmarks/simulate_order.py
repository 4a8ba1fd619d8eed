#!/usr/bin/env python3
"""Compares the time for a batch of traces by the order of its chunks, in virtual time.

Chunks take equally long within 20 %, slots do not slow each other down, and nothing fails. The
table gives the time to the last trace over the lower bound (total work over slots, or the longest
trace).
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import cast

from delethink.engines.scheduler import Request, Scheduler, rank
from delethink.policy import SchedulingHint

WORKERS, SLOTS, GROUP, SEED = 2, 64, 8, 1
LENGTHS: dict[str, tuple[int, Callable[[random.Random], int]]] = {
    "uniform, 1 to 12": (12, lambda rng: rng.randint(1, 12)),
    "Pareto 1.1, at most 23": (23, lambda rng: min(23, 1 + int(rng.paretovariate(1.1)))),
    "Pareto 1.5, at most 23": (23, lambda rng: min(23, int(rng.paretovariate(1.5)))),
    "geometric, mean 3.5, at most 12": (12, lambda rng: min(12, 1 + int(rng.expovariate(1 / 3)))),
}


@dataclass(eq=False, slots=True, kw_only=True)
class Chunk(Request):
    """The next chunk of a trace."""

    trace: int


def makespan(lengths: list[int], make_chunk: Callable[[int, int], Chunk]) -> float:
    """Return the end of the last trace; ``make_chunk(trace, chunks so far)`` is its next chunk."""
    rng, scheduler, order = random.Random(SEED), Scheduler(), itertools.count()
    for worker in range(WORKERS):
        scheduler.add_worker(worker, SLOTS)
    done, now = [0] * len(lengths), 0.0
    ends: list[tuple[float, int, Hashable, Chunk]] = []
    for trace in range(len(lengths)):
        scheduler.submit(make_chunk(trace, 0))
    while scheduler.num_waiting or ends:
        for worker, chunk in scheduler.assign():
            end = now + rng.uniform(0.8, 1.2)
            heapq.heappush(ends, (end, next(order), worker, cast(Chunk, chunk)))
        now, _, worker, chunk = heapq.heappop(ends)
        scheduler.release(worker, chunk)
        done[chunk.trace] += 1
        if done[chunk.trace] < lengths[chunk.trace]:
            scheduler.submit(make_chunk(chunk.trace, done[chunk.trace]))
    return now


def main() -> None:
    """Print the table."""
    print("| lengths in chunks | traces per slot | breadth | depth | lengths known |")
    print("| --- | --- | --- | --- | --- |")
    for name, (most, draw) in LENGTHS.items():
        for ratio in (2, 4, 8):
            rng = random.Random(SEED)
            lengths = [draw(rng) for _ in range(WORKERS * SLOTS * ratio)]
            bound = max(sum(lengths) / (WORKERS * SLOTS), max(lengths))

            def make_chunk(trace: int, chunks: int, order: str) -> Chunk:
                known = float(lengths[trace]) if order == "known" else None  # noqa: B023
                hint = SchedulingHint(None, chunks, most, known)  # noqa: B023
                own = rank(hint, "depth" if order == "depth" else "breadth")
                return Chunk(1000, trace // GROUP, own, trace=trace)

            times = [
                makespan(lengths, lambda trace, chunks, o=order: make_chunk(trace, chunks, o))
                / bound
                for order in ("breadth", "depth", "known")
            ]
            print(f"| {name} | {ratio} | " + " | ".join(f"{time:.2f}" for time in times) + " |")


if __name__ == "__main__":
    main()
