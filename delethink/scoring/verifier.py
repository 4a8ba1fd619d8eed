"""Process for computing rewards one after another, started by ``delethink.scoring.pool``.

The process reads pickled calls from standard input and answers each with a line of JSON. A verifier
tricked into running foreign code can therefore lie about its own score, but cannot reach the
trainer. After loading the first function, the process gives up all rights a verifier does not need.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import pickle
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

from delethink.scoring.reward import traits_of
from delethink.scoring.sandbox import exit_with_parent, limit_resources, lock_down, python_folders

HEADER = struct.Struct("=Q")  # length in bytes of the pickled call after it
_MAX_FILE_BYTES = 1 << 20


def run_verifier(parent: int, memory: int) -> None:
    """Answer calls until standard input ends.

    Args:
        parent: id of the parent process; this process is killed when the parent ends.
        memory: bytes of address space in addition to the loaded libraries.
    """
    exit_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    calls, answers = _private_pipes()
    functions: dict[tuple[str, str], Callable[..., Any]] = {}
    while len(header := calls.read(HEADER.size)) == HEADER.size:
        module, name, kwargs = pickle.loads(calls.read(HEADER.unpack(header)[0]))
        try:
            if (module, name) not in functions:
                function = getattr(importlib.import_module(module), name)
                if (prepare := traits_of(function).prepare) is not None:
                    prepare()
                if not functions:
                    limit_resources(_address_space() + memory, None, _MAX_FILE_BYTES)
                    lock_down(python_folders(sys.path))
                functions[module, name] = function
                _write(answers, {"loaded": name})
            value = functions[module, name](**kwargs)
            if asyncio.iscoroutine(value):
                value = asyncio.run(value)
            _write(answers, {"value": None if value is None else float(value)})
        except MemoryError:
            _write(answers, {"memory": True})
            os._exit(1)  # the interpreter's state is unreliable after a failed allocation
        except BaseException as error:  # math-verify's own timeout is not an Exception
            _write(answers, {"error": f"{type(error).__name__}: {error}"[:500]})


def _private_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Move the pipes to other descriptors, to separate prints of a verifier from answers."""
    calls, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    return calls, answers


def _write(answers: BinaryIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message).encode() + b"\n")
    answers.flush()


def _address_space() -> int:
    """Return the bytes of address space in use."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
