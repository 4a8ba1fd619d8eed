"""A reward that evaluates model output and, for some of it, attacks the channel of its verdict."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

from delethink.scoring.frames import frame
from delethink.scoring.reward import evaluates_output

RIGHT = "right"
# Their value is 0, as the same call works on a harmless output.
FAULTS = (
    *(
        "noise",
        "partial",
        "forged",
        "own_result",
        "starts",
        "flood",
        "exit",
        "crash",
        "kill_parent",
        "kill_group",
    ),
    *("raise", "value", "memory", "fork", "close", "read", "recurse", "long_reason"),
)
SLOW_FAULTS = ("sleep", "stop", "spin", "eat_memory")
_DESCRIPTORS = range(65)


class OddError(BaseException):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@evaluates_output()
def faulty(text: str) -> float | None:
    """Do as the text says: a behaviour and a seed. An empty text is harmless."""
    if not text:
        return 0.5
    behaviour, seed = text.split()
    if behaviour == RIGHT:
        return float(seed)
    found = _misbehave(behaviour, random.Random(seed))
    return 1.0 if found is None else float(found)  # type: ignore[arg-type]


@evaluates_output()
def broken(text: str) -> float:
    """Fail, also on a harmless output."""
    raise ValueError("no such table")


@evaluates_output(control=lambda kwargs: {"text": "gold"})
def blind(text: str) -> float:
    """Score everything 0, also a right answer; fail for one."""
    if text == "fail":
        raise ValueError("no such answer")
    return 0.0


@evaluates_output(control=lambda kwargs: {"text": "gold"})
def busy(text: str) -> float:
    """Take longer than the limit, and long for a right answer too."""
    time.sleep(1.5 if text == "gold" else 60)
    return 1.0


def _write(data: bytes, end: bool) -> None:
    """Write to every descriptor; then end the process or go on."""
    for number in _DESCRIPTORS:
        with suppress(OSError):
            os.set_blocking(number, False)
            os.write(number, data)
    if end:
        os._exit(0)


def _misbehave(behaviour: str, rng: random.Random) -> object:
    end = rng.random() < 0.5
    forged = frame({"id": rng.randrange(2000), "value": 1.0, "status": "ok"})
    if behaviour == "noise":
        _write(rng.randbytes(rng.randrange(1, 5000)), end)
    elif behaviour == "partial":
        _write(forged[: rng.randrange(1, len(forged))], end)
    elif behaviour == "forged":
        _write(forged * rng.randrange(1, 4), end)
    elif behaviour == "own_result":
        _write(json.dumps({"value": 1.0}).encode(), True)
    elif behaviour == "starts":
        _write(b"".join(frame({"id": n, "loaded": True}) for n in range(50)), end)
    elif behaviour == "flood":
        for _ in range(1000):
            os.write(3, bytes(1 << 16))
    elif behaviour == "exit":
        os._exit(rng.randrange(256))
    elif behaviour == "crash":
        ctypes.string_at(0)
    elif behaviour == "kill_parent":
        os.kill(os.getppid(), rng.choice([signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM]))
    elif behaviour == "kill_group":
        os.kill(0, signal.SIGKILL)
    elif behaviour == "raise":
        raise rng.choice([SystemExit(0), KeyboardInterrupt(), GeneratorExit(), OddError()])
    elif behaviour == "value":
        return rng.choice([float("nan"), float("inf"), "a word", 10**400, [], 1j])
    elif behaviour == "memory":
        return len(bytearray(10**13))
    elif behaviour == "fork":
        os.fork()
    elif behaviour == "close":
        os.closerange(0, 65)
    elif behaviour == "read":
        raise ValueError(b"".join(_read(number) for number in _DESCRIPTORS))
    elif behaviour == "recurse":
        sys.setrecursionlimit(10**9)
        json.loads("[" * 10**6)
    elif behaviour == "long_reason":
        raise ValueError("\udcff\0\x1b[31m" * 10**6)
    else:
        _use_time(behaviour)
    return None


def _read(number: int) -> bytes:
    with suppress(OSError):
        os.set_blocking(number, False)
        return os.read(number, 1 << 16)
    return b""


def _use_time(behaviour: str) -> None:
    if behaviour == "sleep":
        time.sleep(1000)
    elif behaviour == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif behaviour == "spin":
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        while True:
            pass
    elif behaviour == "eat_memory":
        kept = []
        while True:
            kept.append(bytearray(b"x") * 10_000_000)


def outputs(count: int, slow_share: float, seed: int) -> Iterator[tuple[str, float]]:
    """Yield texts and their right values: half harmless, the others hostile."""
    rng = random.Random(seed)
    for number in range(count):
        if rng.random() < slow_share:
            yield f"{rng.choice(SLOW_FAULTS)} {number}", 0.0
        elif rng.random() < 0.5:
            yield f"{rng.choice(FAULTS)} {number}", 0.0
        else:
            yield f"{RIGHT} {number}", float(number)


@evaluates_output
def asks_a_server(text: str) -> float:
    """Call a server, in the decorator's form without parentheses."""
    socket.create_connection(("127.0.0.1", 9), timeout=5).close()
    return 1.0
