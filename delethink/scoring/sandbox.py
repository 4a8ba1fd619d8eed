"""Sandbox for untrusted Python programs: the call that runs one.

A program runs inside the isolation of the machine (``delethink.scoring.isolation``), in a private
temporary folder, with an empty environment and limits on time, memory, output and files. Any
function with the signature of ``run_python`` can replace this sandbox.
"""

from __future__ import annotations

from delethink.scoring.pool import shared_pool
from delethink.scoring.programs import Sandbox, SandboxLimits, SandboxResult

__all__ = ["Sandbox", "SandboxLimits", "SandboxResult", "run_python"]


def run_python(code: str, stdin: str, limits: SandboxLimits) -> SandboxResult:
    """Run ``code`` with the text ``stdin`` on standard input, within the limits.

    All calls of a process share a verifier host. Threads may call at the same time.

    Raises:
        ConfigError: this machine cannot isolate code.
        SandboxError: the isolated process cannot be started.
    """
    return shared_pool().run_program(code, stdin, limits)
