"""Draws a report in another process now and then, while its run goes on.

The process has the lowest priority and no GPU. Whatever happens there neither stops nor slows the
run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

UPDATE_INTERVAL_S = 60.0


class ReportProcess:
    """Draws a report in the background.

    Args:
        module: name of the module that draws, run as a program with the folder as its argument.
        folder: of the run.
        log: receives a line if the process cannot be started.
    """

    def __init__(self, module: str, folder: Path, log: Callable[[str], None]) -> None:
        self._module, self._folder, self._log = module, folder, log
        self._process: subprocess.Popen[bytes] | None = None
        self._updated = time.monotonic()

    def update(self) -> None:
        """Start to draw, if the last drawing is long ago and has ended."""
        if time.monotonic() - self._updated < UPDATE_INTERVAL_S:
            return
        if self._process is not None and self._process.poll() is None:
            return
        self._updated = time.monotonic()
        command = ["nice", "-n", "19", sys.executable, "-m", self._module, str(self._folder)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        nowhere = subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(
                command, env=environment, stdin=nowhere, stdout=nowhere, stderr=nowhere
            )
        except OSError as error:
            self._log(f"report.html is not updated: {error}")

    def wait(self, timeout_s: float) -> int | None:
        """Return the exit code of the last drawing; ``None`` if there was none."""
        return None if self._process is None else self._process.wait(timeout_s)

    def close(self) -> None:
        """Stop a drawing that has not ended. Safe to call twice."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
