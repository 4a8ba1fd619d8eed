"""``delethink serve`` as a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def serve_command(folder: Path, *arguments: str) -> Iterator[tuple[str, Path]]:
    """Runs the command, and gives the address that it prints."""
    log = folder / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "delethink.cli.main", "serve", "--port", "0", *arguments],
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        pause = threading.Event()
        while not (found := re.search(r"serving .* at (http\S+)", log.read_text("utf-8"))):
            assert process.poll() is None, log.read_text("utf-8")
            pause.wait(0.1)
        yield found[1], log
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(120)
        finally:
            process.kill()
    assert "Traceback" not in log.read_text("utf-8")
