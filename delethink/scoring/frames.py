"""Frames of JSON on a pipe, read as hostile: length, form and time are bounded."""

from __future__ import annotations

import json
import os
import select
import struct
import time
from typing import Any

HEADER = struct.Struct("=I")  # length of the JSON after it, in bytes
_READ_BYTES = 1 << 16


class BrokenChannelError(Exception):
    """A pipe ended, or delivered something else than a frame."""


class FrameReader:
    """Reads frames from a pipe.

    Args:
        pipe: file descriptor.
        max_bytes: length of the longest frame.
    """

    def __init__(self, pipe: int, max_bytes: int) -> None:
        self._pipe, self._max_bytes = pipe, max_bytes
        self._poll = select.poll()  # select() refuses descriptors from 1,024
        self._poll.register(pipe, select.POLLIN)
        self._buffer = bytearray()

    def read(self, deadline: float | None = None) -> dict[str, Any]:
        """Return the next frame.

        Raises:
            TimeoutError: no frame was complete at ``deadline``, in seconds of ``time.monotonic``.
            BrokenChannelError: the pipe has ended, or the frame is too long or not a JSON object.
        """
        size = HEADER.unpack(self._take(HEADER.size, deadline))[0]
        if size > self._max_bytes:
            raise BrokenChannelError(f"a frame of {size} bytes, allowed are {self._max_bytes}")
        return parse_object(self._take(size, deadline))

    def _take(self, size: int, deadline: float | None) -> bytes:
        while len(self._buffer) < size:
            wait = None if deadline is None else max(0.0, 1000 * (deadline - time.monotonic()))
            if not self._poll.poll(wait):
                raise TimeoutError("no answer in time")
            data = os.read(self._pipe, _READ_BYTES)
            if not data:
                raise BrokenChannelError("the pipe has ended")
            self._buffer += data
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken


def frame(message: dict[str, Any]) -> bytes:
    """Return ``message`` as a frame."""
    body = json.dumps(message).encode()
    return HEADER.pack(len(body)) + body


def write_all(pipe: int, data: bytes) -> None:
    """Write all of ``data``.

    Raises:
        OSError: the reader is gone.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(pipe, rest) :]


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in ``body``.

    Raises:
        BrokenChannelError: it is something else.
    """
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        raise BrokenChannelError("an answer is not JSON") from None
    if not isinstance(message, dict):
        raise BrokenChannelError("an answer is not a JSON object")
    return message
