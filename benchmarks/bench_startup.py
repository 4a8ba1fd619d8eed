"""How long the library takes to load and the command to answer, against a bare interpreter.

Run it with ``python benchmarks/bench_startup.py``; it prints a small table.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

RUNS, RUNS_OF_HEAVY = 10, 3  # what loads torch takes long
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import delethink": ["-c", "import delethink"],
    "import delethink.envs, .rewards": ["-c", "import delethink.envs, delethink.rewards"],
    "delethink --help": ["-m", "delethink.cli.main", "--help"],
}
VLLM = "import vllm.v1.engine.async_llm"
THRESHOLD = "import gc; gc.set_threshold(50_000)"
HEAVY = {
    "import delethink.training.grpo": ["-c", "import delethink.training.grpo"],
    "from trl import GRPOTrainer": ["-c", "from trl import GRPOTrainer"],
    "import vllm.v1.engine.async_llm": ["-c", VLLM],
    "the same after gc.set_threshold(50_000)": ["-c", f"{THRESHOLD}; {VLLM}"],
}


class Taken(NamedTuple):
    """Medians over fresh interpreters."""

    seconds: float
    mib: float  # of memory, at most


def measure(arguments: list[str], runs: int) -> Taken:
    """The first run, which warms the disk cache, does not count."""
    found = [run(arguments) for _ in range(runs + 1)][1:]
    return Taken(*map(statistics.median, zip(*found, strict=True)))


def run(arguments: list[str]) -> Taken:
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *arguments], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} ended with {process.returncode}")
    return Taken(time.perf_counter() - began, usage.ru_maxrss / 1024)


def main() -> None:
    found = {
        name: measure(command, RUNS_OF_HEAVY if name in HEAVY else RUNS)
        for name, command in (COMMANDS | HEAVY).items()
    }
    bare = next(iter(found.values())).seconds
    print(f"{'medians':<34}{'seconds':>9}{'ratio':>8}{'MiB':>8}")
    for name, taken in found.items():
        print(f"{name:<34}{taken.seconds:>9.3f}{taken.seconds / bare:>8.1f}{taken.mib:>8.0f}")


if __name__ == "__main__":
    main()
