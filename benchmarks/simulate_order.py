#!/usr/bin/env python3
"""How long a batch of traces takes by the order in which its chunks are sampled, in virtual time.

Chunks take equally long but for 20 % either way, slots do not slow each other down, and nothing
fails: what is left is the order alone. The table gives the time to the last trace over the lower
bound (total work over slots, or the longest trace).
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

from delethink.engines.pool import rank_of
from delethink.engines.scheduler import Request, Scheduler
from delethink.policy import SchedulingHint

WORKERS, SLOTS, GROUP, SEED = 2, 64, 8, 1
LENGTHS: dict[str, tuple[int, Callable[[random.Random], int]]] = {
    "uniform, 1 to 12": (12, lambda rng: rng.randint(1, 12)),
    "Pareto 1.1, at most 23": (23, lambda rng: min(23, 1 + int(rng.paretovariate(1.1)))),
    "Pareto 1.5, at most 23": (23, lambda rng: min(23, int(rng.paretovariate(1.5)))),
    "geometric, mean 3.5, at most 12": (12, lambda rng: min(12, 1 + int(rng.expovariate(1 / 3)))),
}


def makespan(lengths: list[int], progress: Callable[[int, int], Request]) -> float:
    """When the last trace ends; ``progress(trace, chunks so far)`` is its next request."""
    rng, scheduler = random.Random(SEED), Scheduler()
    for worker in range(WORKERS):
        scheduler.add_worker(worker, SLOTS)
    done, now = [0] * len(lengths), 0.0
    ends: list[tuple[float, int, int]] = []
    for trace in range(len(lengths)):
        scheduler.submit(progress(trace, 0))
    while scheduler.num_waiting or ends:
        for lease in scheduler.assign(now):
            trace = int(str(lease.request.key))
            heapq.heappush(ends, (now + rng.uniform(0.8, 1.2), lease.number, trace))
        now, number, trace = heapq.heappop(ends)
        scheduler.finish(number)
        done[trace] += 1
        if done[trace] < lengths[trace]:
            scheduler.submit(progress(trace, done[trace]))
    return now


def main() -> None:
    """Prints the table."""
    print("| lengths in chunks | traces per slot | breadth | depth | lengths known |")
    print("| --- | --- | --- | --- | --- |")
    for name, (most, draw) in LENGTHS.items():
        for ratio in (2, 4, 8):
            rng = random.Random(SEED)
            lengths = [draw(rng) for _ in range(WORKERS * SLOTS * ratio)]
            bound = max(sum(lengths) / (WORKERS * SLOTS), max(lengths))

            def request(trace: int, chunks: int, order: str) -> Request:
                known = float(lengths[trace]) if order == "known" else None  # noqa: B023
                progress = SchedulingHint(None, chunks, most, known)  # noqa: B023
                rank = rank_of(progress, "depth" if order == "depth" else "breadth")
                return Request(trace, 1000, trace // GROUP, rank)

            times = [
                makespan(lengths, lambda trace, chunks, o=order: request(trace, chunks, o)) / bound
                for order in ("breadth", "depth", "known")
            ]
            print(f"| {name} | {ratio} | " + " | ".join(f"{time:.2f}" for time in times) + " |")


if __name__ == "__main__":
    main()
