"""How long the library takes to load and the command to answer, against a bare interpreter.

Run it with ``python scripts/bench_startup.py``; it prints a small table.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 10
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import delethink": ["-c", "import delethink"],
    "import delethink.envs, .rewards": ["-c", "import delethink.envs, delethink.rewards"],
    "delethink --help": ["-m", "delethink.cli.main", "--help"],
}


def seconds(arguments: list[str]) -> float:
    """The median wall-clock time of a fresh interpreter."""
    taken = []
    for _ in range(RUNS + 1):  # the first one warms the disk cache
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def main() -> None:
    medians = {name: seconds(arguments) for name, arguments in COMMANDS.items()}
    bare = next(iter(medians.values()))
    print(f"{'median of ' + str(RUNS):<34}{'seconds':>9}{'ratio':>8}")
    for name, median in medians.items():
        print(f"{name:<34}{median:>9.3f}{median / bare:>8.1f}")


if __name__ == "__main__":
    main()
