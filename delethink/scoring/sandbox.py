"""Runs a Python program that nobody has read.

The program runs as a process group of its own, in a private temporary folder, with an environment
that inherits nothing, under limits on CPU time, wall-clock time, memory and file size. The kernel
keeps it from the network, from starting processes, from signalling others and from every file but
the interpreter's and its own (``lockdown.py``). docs/guide/tasks_and_rewards.md lists the limits of
that protection; a stronger sandbox is any function with the signature of ``run_python``.
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
lockdown.die_with_parent({parent})
lockdown.limit_resources({memory}, {cpu}, {file})
lockdown.shut(lockdown.python_folders(), [{folder!r}])
for name in [name for name in sys.modules if name.partition(".")[0] == "delethink"]:
    del sys.modules[name]
sys.path[0] = {folder!r}
sys.argv = ["main.py"]
del lockdown, name
with open("main.py", encoding="utf-8") as file:
    source = file.read()
sys.setrecursionlimit(100_000)
sys.tracebacklimit = 100  # Python 3.13 takes ten seconds to write down a recursion of that depth
exec(compile(source, "main.py", "exec"), {{"__name__": "__main__", "__builtins__": __builtins__}})
"""


@dataclass(frozen=True)
class Limits:
    """How far a program may go."""

    seconds: float = 10.0  # of wall-clock time; of CPU time as much, rounded up
    memory_mb: int = 1024  # of address space
    file_mb: int = 16  # of each file that it writes, standard output among them


@dataclass(frozen=True)
class Ran:
    """What a program did."""

    status: Literal["ended", "timeout"]
    exit_code: int  # negative: the signal that ended it
    stdout: str
    stderr: str


Sandbox = Callable[[str, str, Limits], Ran]


def check() -> None:
    """Whether the fences that code needs can be put up here.

    Raises:
        ConfigError: the kernel has none.
    """
    if lacks := lockdown.missing():
        raise ConfigError(
            f"this machine cannot keep code from {' and '.join(lacks)}: the code reward needs "
            "Linux 5.13 or newer on x86-64 or arm64; elsewhere name a "
            "stronger sandbox with args.sandbox"
        )


def run_python(code: str, stdin: str, limits: Limits) -> Ran:
    """Runs ``code`` with ``stdin`` on its standard input; waits no longer than the limits say.

    Raises:
        ConfigError: this machine has not the fences.
        OSError: no process or no temporary folder could be made.
    """
    check()
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
        return Ran(status, process.returncode, _read(out, limits), _read(err, limits))


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Waits, then kills the group in any case; whether the program ended in time by itself."""
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


def _read(file: IO[bytes], limits: Limits) -> str:
    file.seek(0)
    return file.read(limits.file_mb << 20).decode(errors="replace")
