"""Warm process inside the isolation: loads rewards once, and forks for each call.

The process reads calls on standard input and answers on standard output, in frames of JSON. A fork
has neither pipe. It writes its result to a pipe of its own, which only this process reads, and
cannot signal this process. An answer that ends or garbles its fork costs that call only.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import pickle
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NoReturn

from delethink.scoring.expressions import allow_only_expressions
from delethink.scoring.frames import (
    BrokenChannelError,
    FrameReader,
    frame,
    parse_object,
    write_all,
)
from delethink.scoring.isolation import confine, python_folders
from delethink.scoring.reasons import MAX_REASON_CHARACTERS, describe
from delethink.scoring.reward import traits_of

MAX_CALL_BYTES = 1 << 30
_MAX_RESULT_BYTES = 1 << 16
_POLL_INTERVAL_S = 0.01


def serve() -> None:
    """Answer calls until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if find_spec("sandlock") is not None:
        import sandlock  # noqa: F401 - before the forks, which confine themselves
    calls = FrameReader(0, MAX_CALL_BYTES)
    functions: dict[tuple[str, str], Callable[..., Any]] = {}
    while True:
        try:
            call = calls.read()
        except BrokenChannelError:
            return
        key = call["module"], call["name"]
        if call.get("load"):
            try:
                functions[key] = load_function(*key)
                answer: dict[str, Any] = {"loaded": True}
            except BaseException as error:  # a module may raise anything
                answer = {"error": describe(error)}
        else:
            answer = _run_forked(functions[key], call)
        write_all(1, frame({"id": call["id"]} | answer))


def load_function(module: str, name: str) -> Callable[..., Any]:
    """Import a reward function and run its preparation."""
    function: Callable[..., Any] = getattr(import_module(module), name)
    if (prepare := traits_of(function).prepare) is not None:
        prepare()
    return function


def call_function(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> float | None:
    """Return the value of a reward, also of an asynchronous one."""
    value = function(**kwargs)
    if asyncio.iscoroutine(value):
        value = asyncio.run(value)
    return None if value is None else float(value)


def _run_forked(function: Callable[..., Any], call: Mapping[str, Any]) -> dict[str, Any]:
    """Run one call in a fork; return its value, or why there is none."""
    try:
        kwargs = pickle.loads(base64.b64decode(call["kwargs"]))
        if (warm_up := traits_of(function).warm_up) is not None:
            warm_up(kwargs)
    except BaseException as error:  # the data of the task is at fault, not the model's output
        return {"broken": describe(error)}
    reader, writer = os.pipe()
    key = secrets.token_hex(16)  # a result without it is forged
    child = os.fork()
    if child == 0:
        _run_and_exit(function, kwargs, call["control"], writer, key)
    os.close(writer)
    began = time.monotonic()
    deadline = began + call["timeout"]
    body, in_time = _read_result(reader, deadline)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(reader)
    if not in_time:
        return {"timeout": True}
    try:
        result = parse_object(body)
    except BrokenChannelError:
        cause = f"signal {-status}" if status < 0 else f"exit code {status}"
        return {"died": f"it ended without a result, with {cause}"}
    if result.pop("key", None) != key or len(result) != 1:
        return {"died": "it wrote a result of its own"}
    kind, value = result.popitem()
    if kind == "value" and is_value(value):
        return {"value": value, "seconds": time.monotonic() - began}
    if kind == "value":
        return {"error": f"a reward must be finite, got {value}"[:MAX_REASON_CHARACTERS]}
    return {"memory": True} if kind == "memory" else {"error": str(value)[:MAX_REASON_CHARACTERS]}


def is_value(value: object) -> bool:
    """Return whether ``value`` may be that of a reward: ``None`` or a finite number."""
    return value is None or (isinstance(value, int | float) and math.isfinite(value))


def _read_result(reader: int, deadline: float) -> tuple[bytes, bool]:
    """Read until the end of the pipe; return the bytes, and whether that was in time."""
    body = b""
    os.set_blocking(reader, False)
    while len(body) <= _MAX_RESULT_BYTES:
        if time.monotonic() > deadline:
            return body, False
        with suppress(BlockingIOError):
            data = os.read(reader, _MAX_RESULT_BYTES)
            if not data:
                return body, True
            body += data
            continue
        time.sleep(_POLL_INTERVAL_S / 10)
    return b"", True


def _run_and_exit(
    function: Callable[..., Any],
    kwargs: Mapping[str, Any],
    is_control: bool,
    writer: int,
    key: str,
) -> NoReturn:
    """Run the call in the fork, and write its result."""
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.dup2(writer, 3)
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))
        confine(python_folders(sys.path), [os.getcwd()])
        traits = traits_of(function)
        if is_control:
            kwargs = traits.control(kwargs) if traits.control else {**kwargs, "text": ""}
        if traits.only_expressions:
            allow_only_expressions()
        value = call_function(function, kwargs)
        result: dict[str, Any] = {"value": value}
        if is_control and traits.control and not (value or 0.0) > 0:
            result = {"error": "a right answer scores 0"}
    except MemoryError:
        result = {"memory": True}
    except BaseException as error:  # the code under test may raise anything
        result = {"error": describe(error)}
    try:
        write_all(3, json.dumps({**result, "key": key}).encode())
    finally:
        os._exit(0)
