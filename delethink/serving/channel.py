"""A connection of its own between the driver and a worker, for what is said at every border.

A call to a Ray actor takes the driver over a millisecond of a core, spread over six threads; the
same bytes over a socket take a quarter of that (docs/rollouts.md). So Ray starts workers, watches
over them and carries whatever is rare, and chunks go here: jobs one way, reports the other. Who
connects must show a secret first, which both ends got by way of Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import pickle
import struct
from collections.abc import Awaitable, Callable
from typing import Any

SECRET_BYTES = 32

_HEAD = struct.Struct("<Q?")  # bytes that follow, and whether they are an error
_SECRET_TIMEOUT_S = 10.0
_JOINED_BYTES = 2**16  # up to which a copy costs less than one more call of the system
_AHEAD_BYTES = 2**16  # received at a time where it is not known what comes

Take = Callable[[bytearray], None]


class Listener:
    """A worker's end.

    Args:
        take: told of each message that comes.
        report: the next message that goes; asked again as soon as it has gone.
        secret: 32 bytes, which who connects must show.
    """

    def __init__(self, take: Take, report: Callable[[], Awaitable[bytes]], secret: bytes) -> None:
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a secret has {SECRET_BYTES} bytes, got {len(secret)}")
        self._take, self._report, self._secret = take, report, secret
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> int:
        """Listens at an address of this machine; returns the port, which the system chooses."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Peer(self._take, self._report, self._secret).frames, host, 0
        )
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def close(self) -> None:
        """Listens no more."""
        if self._server is not None:
            self._server.close()


class Channel:
    """The driver's end. All of it runs in one event loop."""

    def __init__(self) -> None:
        self._frames = _Frames(self._take, self._leave)
        self._hear: Take | None = None
        self._lose: Callable[[Exception], None] | None = None
        self._ended: Exception | None = None

    async def open(self, host: str, port: int, secret: bytes) -> None:
        """Connects.

        Raises:
            OSError: nobody is there, or it cannot be reached.
        """
        await asyncio.get_running_loop().create_connection(lambda: self._frames, host, port)
        self._frames.send(secret)

    def attend(self, hear: Take, lose: Callable[[Exception], None]) -> None:
        """Listens from now on; what has come before was for nobody.

        Args:
            hear: told of each message.
            lose: told once why the connection has ended, unless it was closed here.
        """
        self._hear, self._lose = hear, lose
        if self._ended is not None:
            asyncio.get_running_loop().call_soon(lose, self._ended)

    def send(self, said: bytes) -> None:
        """Sends a message, unless the connection has ended."""
        self._frames.send(said)

    def close(self) -> None:
        """Ends the connection."""
        self._hear = self._lose = None
        self._frames.close()

    def _take(self, said: bytearray, is_error: bool) -> None:
        if is_error:
            self._end(pickle.loads(said))
        elif self._hear is not None:
            self._hear(said)

    def _leave(self) -> None:
        self._end(ConnectionError("has closed its connection"))

    def _end(self, why: Exception) -> None:
        if self._ended is None:
            self._ended = why
            if self._lose is not None:
                self._lose(why)


class _Peer:
    """Who has connected to a listener."""

    def __init__(self, take: Take, report: Callable[[], Awaitable[bytes]], secret: bytes) -> None:
        self._take, self._report, self._secret = take, report, secret
        self.frames = _Frames(self._meet, self._leave, most=SECRET_BYTES)
        self._patience = asyncio.get_running_loop().call_later(_SECRET_TIMEOUT_S, self.frames.close)
        self._reporting: asyncio.Task[None] | None = None

    def _meet(self, shown: bytearray, is_error: bool) -> None:
        self._patience.cancel()
        if not hmac.compare_digest(shown, self._secret):
            self.frames.close()
            return
        self.frames.take, self.frames.most = self._hear, None
        self._reporting = asyncio.create_task(self._report_on())

    def _hear(self, said: bytearray, is_error: bool) -> None:
        try:
            self._take(said)
        except Exception as problem:  # the driver's to judge
            self._fail(problem)

    async def _report_on(self) -> None:
        try:
            while True:
                self.frames.send(await self._report())
        except Exception as problem:  # the driver's to judge
            self._fail(problem)

    def _fail(self, problem: Exception) -> None:
        self.frames.send(_pickled(problem), is_error=True)
        self.frames.close()

    def _leave(self) -> None:
        self._patience.cancel()
        if self._reporting is not None:
            self._reporting.cancel()


class _Frames(asyncio.BufferedProtocol):
    """Messages of any length over a connection; a long one is received where it will lie.

    Args:
        take: told of each message, and whether it is an error.
        leave: told once that the connection has ended.
        most: the bytes of a message beyond which the connection is ended, where there is a bound.
    """

    def __init__(
        self,
        take: Callable[[bytearray, bool], None],
        leave: Callable[[], None],
        most: int | None = None,
    ) -> None:
        self.take, self.leave, self.most = take, leave, most
        self._transport: Any = None
        self._ahead = bytearray(_AHEAD_BYTES)
        self._body: bytearray | None = None  # of a message whose head has come
        self._is_error = False
        self._filled = 0  # of the body, or else of what lies ahead

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.leave()

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._ahead if self._body is None else self._body)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._body is None:
            self._sort(memoryview(self._ahead)[: self._filled])
        elif self._filled == len(self._body):
            body, self._body, self._filled = self._body, None, 0
            self.take(body, self._is_error)

    def _sort(self, ahead: memoryview) -> None:
        """Takes out whole messages, and begins the one that is not whole."""
        while len(ahead) >= _HEAD.size:
            length, self._is_error = _HEAD.unpack_from(ahead)
            if self.most is not None and length > self.most:
                self.close()
                return
            body, ahead = ahead[_HEAD.size :][:length], ahead[_HEAD.size :][length:]
            if len(body) < length:
                self._body, self._filled = bytearray(length), len(body)
                self._body[: len(body)] = body
                return
            self.take(bytearray(body), self._is_error)
        self._filled = len(ahead)
        self._ahead[: self._filled] = bytes(ahead)

    def send(self, said: bytes, is_error: bool = False) -> None:
        """Sends a message, unless the connection has ended."""
        if self._transport is None or self._transport.is_closing():
            return
        head = _HEAD.pack(len(said), is_error)
        if len(said) <= _JOINED_BYTES:
            self._transport.write(head + said)
        else:
            self._transport.write(head)
            self._transport.write(said)

    def close(self) -> None:
        """Ends the connection, once what was sent has gone."""
        if self._transport is not None:
            self._transport.close()


def _pickled(problem: Exception) -> bytes:
    """An error, or what it says where it cannot be sent."""
    with contextlib.suppress(Exception):
        sent = pickle.dumps(problem)
        pickle.loads(sent)  # some can be written and not read
        return sent
    return pickle.dumps(RuntimeError(f"{type(problem).__name__}: {problem}"))
