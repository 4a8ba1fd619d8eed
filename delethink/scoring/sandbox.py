"""Sandbox for untrusted Python programs: limits, result, and the call that runs one.

A program runs inside the isolation of the machine (``delethink.scoring.isolation``), in a private
temporary folder, with an empty environment and limits on time, memory, output and files. Any
function with the signature of ``run_python`` can replace this sandbox.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


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


def run_python(code: str, stdin: str, limits: SandboxLimits) -> SandboxResult:
    """Run ``code`` with the text ``stdin`` on standard input, within the limits.

    All calls of a process share a verifier host. Threads may call at the same time.

    Raises:
        ConfigError: this machine cannot isolate code.
        SandboxError: the isolated process cannot be started.
    """
    from delethink.scoring.pool import shared_pool

    return shared_pool().run_program(code, stdin, limits)
