"""Processes that tests wait for, and that must be gone in the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import psutil

_PATIENCE_S = 300  # a busy machine may take that long, and a test never fails by the clock before


def wait_until(done: Callable[[], bool]) -> None:
    """Polls, and fails where it never comes true."""
    deadline = time.monotonic() + _PATIENCE_S
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that run; who is dead and only not yet waited for does not."""
    found = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def assert_gone(processes: Iterable[psutil.Process]) -> None:
    """Waits for their end."""
    processes = list(processes)
    wait_until(lambda: not alive(processes))


def started() -> set[psutil.Process]:
    """All that this process has started, but for Python's own tracker of shared memory.

    That one is started by whichever test shares memory first, and stays as long as the process.
    """
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if not any("resource_tracker" in word for word in process.cmdline()):
                found.add(process)
        except psutil.NoSuchProcess:
            continue
    return found


def engine_of(pid: int) -> psutil.Process:
    """The engine process of a vLLM worker: by far the largest of its children."""
    children = psutil.Process(pid).children(recursive=True)
    return max(children, key=lambda child: child.memory_info().rss)
