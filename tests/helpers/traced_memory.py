"""Memory that some code allocates, as Python's allocator counts it."""

import gc
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Traced:
    """Bytes still held when the code ended, and the most that was held at a time."""

    held: int
    peak: int


def traced_memory(code: Callable[[], Any], repeats: int = 3) -> Traced:
    """Return the least of several runs of `code`.

    Threads that other tests left behind allocate too, and cyclic garbage waits for the collector,
    which the tests call as rarely as the commands do. Both only ever add.
    """
    runs = [run_once(code) for _ in range(repeats)]
    return Traced(min(run.held for run in runs), min(run.peak for run in runs))


def run_once(code: Callable[[], Any]) -> Traced:
    thresholds = gc.get_threshold()
    gc.collect()
    gc.set_threshold(500)
    tracemalloc.start()
    try:
        kept = code()  # what it returns counts as held
        held, peak = tracemalloc.get_traced_memory()
        del kept
    finally:
        tracemalloc.stop()
        gc.set_threshold(*thresholds)
    return Traced(held, peak)
