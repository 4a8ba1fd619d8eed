"""What a process sets for itself before it samples or trains; each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

SET_UP = "from delethink.cli.process import set_up_process; set_up_process()"


def thresholds_after(before: str) -> tuple[int, ...]:
    """Python's thresholds once a process has set itself up."""
    code = f"import gc; {before}; {SET_UP}; print(gc.get_threshold())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return tuple(map(int, said.stdout.strip("()\n").split(", ")))


def test_garbage_is_looked_for_rarely() -> None:
    assert thresholds_after("pass")[0] > 10_000
