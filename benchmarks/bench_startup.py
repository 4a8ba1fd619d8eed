"""Start-up time and memory of the library and its command, against a bare interpreter.

Run it with ``python benchmarks/bench_startup.py``; it prints a small table.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

RUNS, HEAVY_RUNS = 10, 3  # commands loading torch take long
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


class Usage(NamedTuple):
    """Medians over fresh interpreters."""

    seconds: float
    mib: float  # peak memory


def measure(arguments: list[str], runs: int) -> Usage:
    """Return medians without the first run, which warms the disk cache."""
    found = [run(arguments) for _ in range(runs + 1)][1:]
    return Usage(*map(statistics.median, zip(*found, strict=True)))


def run(arguments: list[str]) -> Usage:
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *arguments], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} ended with {process.returncode}")
    return Usage(time.perf_counter() - began, usage.ru_maxrss / 1024)


def main() -> None:
    found = {
        name: measure(command, HEAVY_RUNS if name in HEAVY else RUNS)
        for name, command in (COMMANDS | HEAVY).items()
    }
    bare = next(iter(found.values())).seconds
    print(f"{'medians':<34}{'seconds':>9}{'ratio':>8}{'MiB':>8}")
    for name, used in found.items():
        print(f"{name:<34}{used.seconds:>9.3f}{used.seconds / bare:>8.1f}{used.mib:>8.0f}")


if __name__ == "__main__":
    main()
