"""A process that computes rewards for ``delethink.scoring.pool``, one after another.

It reads pickled calls from standard input and answers each with a line of JSON: a verifier that was
fooled into running something can then lie about its own score, but not reach into the trainer.
After the first function is loaded, the process gives up every right that a verifier has no use for.
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

from delethink.scoring import lockdown
from delethink.scoring.reward import traits_of

HEADER = struct.Struct("=Q")  # length of the pickled call that follows
_FILE_BYTES = 1 << 20


def main(parent: int, memory: int) -> None:
    """Answers calls until there are no more.

    Args:
        parent: the process to die with.
        memory: bytes of address space on top of what the loaded libraries take.
    """
    lockdown.die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    calls, answers = _private_pipes()
    shut = False
    while (call := _read(calls)) is not None:
        module, name, kwargs = call
        try:
            function, is_new = _load(module, name)
            if not shut:
                lockdown.limit_resources(_address_space() + memory, None, _FILE_BYTES)
                lockdown.shut(lockdown.python_folders(sys.path))
                shut = True
            if is_new:
                _say(answers, {"loaded": name})
            _say(answers, {"value": _compute(function, kwargs)})
        except MemoryError:
            _say(answers, {"memory": True})
            os._exit(1)  # what it left half done is not to be built upon
        except BaseException as error:  # math-verify's own time-out is no Exception
            _say(answers, {"error": f"{type(error).__name__}: {error}"[:500]})


def _private_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The two pipes under other numbers: what a verifier prints must not mix with answers."""
    calls, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    return calls, answers


def _read(calls: BinaryIO) -> tuple[str, str, dict[str, Any]] | None:
    header = calls.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    call: tuple[str, str, dict[str, Any]] = pickle.loads(calls.read(HEADER.unpack(header)[0]))
    return call


_loaded: dict[tuple[str, str], Callable[..., Any]] = {}


def _load(module: str, name: str) -> tuple[Callable[..., Any], bool]:
    if (module, name) in _loaded:
        return _loaded[module, name], False
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    prepare = traits_of(function).prepare
    if prepare is not None:
        prepare()
    _loaded[module, name] = function
    return function, True


def _compute(function: Callable[..., Any], kwargs: dict[str, Any]) -> float | None:
    value = function(**kwargs)
    if asyncio.iscoroutine(value):
        value = asyncio.run(value)
    return None if value is None else float(value)


def _say(answers: BinaryIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message).encode() + b"\n")
    answers.flush()


def _address_space() -> int:
    """Bytes of address space in use."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
