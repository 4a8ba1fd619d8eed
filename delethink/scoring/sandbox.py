"""Sandbox for untrusted Python programs.

A program runs in its own process group and a private temporary folder, with an empty environment
and limits on CPU time, wall-clock time, memory and file size. The kernel denies the network, new
processes, signals to other processes, and all files but the interpreter's and the program's own
(``lockdown.py``). docs/guide/tasks_and_rewards.md lists the remaining risks. Any function with the
signature of ``run_python`` can replace this sandbox.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from delethink.errors import ConfigError
from delethink.scoring import lockdown

_BOOT = """
import sys
sys.path.insert(0, {library!r})
from delethink.scoring import lockdown
lockdown.exit_with_parent({parent})
lockdown.limit_resources({memory}, {cpu}, {file})
lockdown.lock_down(lockdown.python_folders(), [{folder!r}])
for name in [name for name in sys.modules if name.partition(".")[0] == "delethink"]:
    del sys.modules[name]
sys.path[0] = {folder!r}
sys.argv = ["main.py"]
del lockdown, name
with open("main.py", encoding="utf-8") as file:
    source = file.read()
sys.setrecursionlimit(100_000)
sys.tracebacklimit = 100  # Python 3.13 takes ten seconds to print a deeper recursion
exec(compile(source, "main.py", "exec"), {{"__name__": "__main__", "__builtins__": __builtins__}})
"""


@dataclass(frozen=True)
class SandboxLimits:
    """Limits of a program."""

    seconds: float = 10.0  # wall-clock time; also CPU time, rounded up
    memory_mb: int = 1024  # address space
    file_mb: int = 16  # size of each written file, standard output included


@dataclass(frozen=True)
class SandboxResult:
    """Result of a program."""

    status: Literal["ended", "timeout"]
    exit_code: int  # negative for a signal
    stdout: str
    stderr: str


Sandbox = Callable[[str, str, SandboxLimits], SandboxResult]


def check_sandbox() -> None:
    """Check that the kernel can isolate code.

    Raises:
        ConfigError: the kernel lacks seccomp or Landlock.
    """
    if lacks := lockdown.missing():
        raise ConfigError(
            f"this machine cannot keep code from {' and '.join(lacks)}: the code reward needs "
            "Linux 5.13 or newer on x86-64 or arm64; on other machines, set args.sandbox to a "
            "sandbox of your own"
        )


def run_python(code: str, stdin: str, limits: SandboxLimits) -> SandboxResult:
    """Run ``code`` with the text ``stdin`` on standard input, within the limits.

    Raises:
        ConfigError: this machine cannot isolate code.
        OSError: the process or the temporary folder cannot be created.
    """
    check_sandbox()
    with (
        tempfile.TemporaryDirectory(prefix="delethink-code-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        Path(folder, "main.py").write_text(code, encoding="utf-8", errors="replace")
        given.write(stdin.encode(errors="replace"))
        given.seek(0)
        boot = _BOOT.format(
            library=lockdown.LIBRARY,
            parent=os.getpid(),
            memory=limits.memory_mb << 20,
            cpu=int(limits.seconds) + 1,
            file=limits.file_mb << 20,
            folder=os.path.realpath(folder),
        )
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", boot],
            stdin=given,
            stdout=out,
            stderr=err,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        in_time = _wait(process, limits.seconds)
        status: Literal["ended", "timeout"] = "ended" if in_time else "timeout"
        return SandboxResult(status, process.returncode, _read(out, limits), _read(err, limits))


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for the program, kill its process group, and return whether it ended in time."""
    deadline = time.monotonic() + seconds
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
        return process.returncode != -signal.SIGXCPU
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(file: IO[bytes], limits: SandboxLimits) -> str:
    file.seek(0)
    return file.read(limits.file_mb << 20).decode(errors="replace")
