"""Execution of one program inside the isolation, with bounded time, memory, output and disk."""

from __future__ import annotations

import os
import resource
import secrets
import select
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from delethink.scoring.isolation import IsolatedProcess, Isolation, start_process

_POLL_INTERVAL_S = 0.05
_READ_BYTES = 1 << 16
_MAX_FILES = 1000
_MAX_DEPTH = 32  # of folders
_FOLDER_FILES = 4  # times the size of a file: bytes of all files of a program
_KILLED = -9

# Python starts without its ``site``, which would read the settings of each installed package.
_BOOT = """
import sys, builtins, _sitebuiltins
builtins.exit = _sitebuiltins.Quitter("exit", "Ctrl-D")
builtins.quit = _sitebuiltins.Quitter("quit", "Ctrl-D")
del builtins, _sitebuiltins
sys.path[:] = [{folder!r}, *sys.path, *{packages!r}]
sys.argv = ["main.py"]
with open("main.py", encoding="utf-8") as file:
    source = file.read()
del file
sys.setrecursionlimit(100_000)
sys.set_int_max_str_digits(0)  # an answer may be a long integer
sys.tracebacklimit = 100  # Python 3.13 takes ten seconds to print a deeper recursion
exec(compile(source, "main.py", "exec"), {{"__name__": "__main__", "__builtins__": __builtins__}})
"""


@dataclass(frozen=True)
class SandboxLimits:
    """Limits of a program."""

    seconds: float = 10.0  # wall-clock time; also CPU time, rounded up
    memory_mb: int = 1024  # address space
    file_mb: int = 16  # size of each written file, and of each output; four times that on disk


@dataclass(frozen=True)
class SandboxResult:
    """Result of a program."""

    status: Literal["ended", "timeout"]
    exit_code: int  # negative for a signal
    stdout: str
    stderr: str


Sandbox = Callable[[str, str, SandboxLimits], SandboxResult]


def run_program(
    code: str, stdin: str, limits: Mapping[str, Any], isolation: Isolation
) -> dict[str, Any]:
    """Run a Python program in a folder of its own.

    Args:
        code: source text.
        stdin: text on standard input.
        limits: the fields of ``SandboxLimits``.
        isolation: the isolation in force.

    Returns:
        The fields of ``SandboxResult``.

    Raises:
        OSError: the process or its folder cannot be created.
    """
    folder = os.path.realpath(tempfile.mkdtemp(prefix="delethink-code-"))
    try:
        Path(folder, "main.py").write_text(code, encoding="utf-8", errors="replace")
        memory = int(limits["memory_mb"]) << 20
        packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        process = start_process(
            isolation,
            [sys.executable, "-I", "-S", "-c", _BOOT.format(folder=folder, packages=packages)],
            folder,
            with_stderr=True,
        )
        _limit(process.pid, memory, limits)
        run = _Run(process, folder, limits)
        status = run.wait(stdin.encode(errors="replace"))
        code_of_exit = process.end()
        return {
            "status": "timeout" if status == "timeout" else "ended",
            "exit_code": _KILLED if status in ("timeout", "too much") else code_of_exit,
            "stdout": run.text(process.stdout),
            "stderr": run.text(process.stderr) + run.note,
        }
    finally:
        remove_folder(folder)


class _Run:
    """Feeds a process, and collects its output within the limits."""

    def __init__(self, process: IsolatedProcess, folder: str, limits: Mapping[str, Any]) -> None:
        self._process, self._folder = process, folder
        self._max_bytes = int(limits["file_mb"]) << 20
        self._deadline = time.monotonic() + float(limits["seconds"])
        self._output: dict[Any, bytearray] = {process.stdout: bytearray()}
        if process.stderr is not None:
            self._output[process.stderr] = bytearray()
        self._check_at = 0.0
        self.note = ""

    def text(self, stream: Any) -> str:
        return self._output.get(stream, bytearray()).decode(errors="replace")

    def wait(self, stdin: bytes) -> str:
        """Return ``"ended"``, ``"timeout"``, or ``"too much"`` for output or disk."""
        rest, pipe = memoryview(stdin), self._process.stdin
        os.set_blocking(pipe.fileno(), False)
        if not rest:
            pipe.close()
        open_pipes = set(self._output)
        while open_pipes:
            if time.monotonic() >= self._deadline:
                return "timeout"
            if self._is_disk_full():
                self.note = "\nthe program wrote too many or too large files"
                return "too much"
            ready, writable, _ = select.select(
                list(open_pipes), [] if pipe.closed else [pipe], [], _POLL_INTERVAL_S
            )
            if writable:
                rest = self._feed(pipe, rest)
            for stream in ready:
                data = os.read(stream.fileno(), _READ_BYTES)
                if not data:
                    open_pipes.discard(stream)
                self._output[stream] += data
                if len(self._output[stream]) > self._max_bytes:
                    del self._output[stream][self._max_bytes :]
                    self.note = "\nthe program printed too much"
                    return "too much"
        return "ended"

    @staticmethod
    def _feed(pipe: Any, rest: memoryview) -> memoryview:
        try:
            rest = rest[os.write(pipe.fileno(), rest[:_READ_BYTES]) :]
        except BlockingIOError:
            return rest
        except OSError:  # the program does not read
            rest = rest[:0]
        if not rest:
            with suppress(OSError):
                pipe.close()
        return rest

    def _is_disk_full(self) -> bool:
        if time.monotonic() < self._check_at:
            return False
        self._check_at = time.monotonic() + _POLL_INTERVAL_S
        return not _is_small(self._folder, _FOLDER_FILES * self._max_bytes)


def _limit(pid: int, memory: int, limits: Mapping[str, Any]) -> None:
    """Set limits that the program cannot raise, as it may not call ``setrlimit``."""
    if not hasattr(resource, "prlimit"):
        return
    seconds = int(float(limits["seconds"])) + 1
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, int(limits["file_mb"]) << 20),
    ):
        with suppress(OSError, ValueError):  # the process has ended, or has a lower limit
            resource.prlimit(pid, limit, (value, value))


def _is_small(folder: str, max_bytes: int) -> bool:
    """Return whether the tree has few files, few bytes and little depth."""
    files = size = 0
    waiting = [(folder, 0)]
    while waiting:
        name, depth = waiting.pop()
        with suppress(OSError), os.scandir(name) as entries:
            for entry in entries:
                files += 1
                if files > _MAX_FILES or depth > _MAX_DEPTH or size > max_bytes:
                    return False
                with suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append((entry.path, depth + 1))
                    else:
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
    return size <= max_bytes


def remove_folder(folder: str) -> None:
    """Remove a tree of any depth and any modes; leave what the kernel does not give up.

    Each level is moved up to the top, so that neither recursion nor the length of a path matters.
    """
    mark, number, is_shrinking = secrets.token_hex(8), count(), True
    with suppress(OSError):
        while is_shrinking and (names := os.listdir(folder)):
            is_shrinking = False
            for name in names:
                with suppress(OSError):
                    is_shrinking |= _flatten(folder, os.path.join(folder, name), mark, number)
        os.rmdir(folder)


def _flatten(folder: str, path: str, mark: str, number: Iterator[int]) -> bool:
    """Remove a file; move the contents of a folder into ``folder``, and remove the folder."""
    if not _is_folder(path):
        os.unlink(path)
        return True
    os.chmod(path, 0o700)
    for name in os.listdir(path):
        inner = os.path.join(path, name)
        if _is_folder(inner):
            os.chmod(inner, 0o700)  # else another user than root cannot move it
        os.rename(inner, os.path.join(folder, f"{mark}-{next(number)}"))
    os.rmdir(path)
    return True


def _is_folder(path: str) -> bool:
    return stat.S_ISDIR(os.lstat(path).st_mode)
