"""A connection of its own between the driver and a worker, for what is said at every border.

A call to a Ray actor takes the driver over a millisecond of a core, spread over six threads; the
same bytes over a socket take a quarter of that (docs/rollouts.md). So Ray starts workers, watches
over them and carries whatever is rare, and chunks go here. Who connects must show a secret first,
which both ends got by way of Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import pickle
import struct
from collections.abc import Awaitable, Callable
from typing import Any

SECRET_BYTES = 32

_HEAD = struct.Struct("<QQ?")  # number of the request, bytes that follow, whether it went well
_SECRET_TIMEOUT_S = 10.0
_JOINED_BYTES = 2**16  # up to which a copy costs less than one more call of the system

Take = Callable[[int, bool, bytearray], None]  # number of the request, whether it went well, bytes
Answering = Callable[[bytes | bytearray], Awaitable[bytes]]


class Listener:
    """A worker's end: answers whoever shows the secret.

    Args:
        answer: what is done with a request; several may be under way.
        secret: 32 bytes.
    """

    def __init__(self, answer: Answering, secret: bytes) -> None:
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a secret has {SECRET_BYTES} bytes, got {len(secret)}")
        self._answer, self._secret = answer, secret
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> int:
        """Listens at an address of this machine; returns the port, which the system chooses."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Peer(self._answer, self._secret).frames, host, 0
        )
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def close(self) -> None:
        """Listens no more."""
        if self._server is not None:
            self._server.close()


class Channel:
    """The driver's end. All of it runs in one event loop.

    Args:
        lost: waited for where the connection ends by itself; it may ``end`` the channel with more
            than is known here.
    """

    def __init__(self, lost: Callable[[], Awaitable[None]]) -> None:
        self._lost = lost
        self._frames = _Frames(self._take, self._leave)
        self._answers: dict[int, asyncio.Future[bytearray]] = {}
        self._numbers = itertools.count(1)
        self._ended: Exception | None = None
        self._ending: asyncio.Task[None] | None = None

    async def open(self, host: str, port: int, secret: bytes) -> None:
        """Connects.

        Raises:
            OSError: nobody is there, or it cannot be reached.
        """
        await asyncio.get_running_loop().create_connection(lambda: self._frames, host, port)
        self._frames.send(next(self._numbers), secret)

    async def ask(self, request: bytes) -> bytearray:
        """The answer to a request; several may be under way.

        Raises:
            ConnectionError: the connection has ended; or what it was ended with.
            Exception: whatever the other end raised.
        """
        if self._ended is not None:
            raise self._ended
        number = next(self._numbers)
        answer: asyncio.Future[bytearray] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        self._frames.send(number, request)
        try:
            return await answer
        finally:
            self._answers.pop(number, None)

    def end(self, why: Exception) -> None:
        """Tells all who wait that nothing will come, and why; what was told first counts."""
        self._ended = self._ended or why
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(self._ended)
        self._frames.close()

    def _take(self, number: int, went_well: bool, said: bytearray) -> None:
        answer = self._answers.get(number)
        if answer is None or answer.done():
            return
        if went_well:
            answer.set_result(said)
        else:
            answer.set_exception(pickle.loads(said))

    def _leave(self) -> None:
        if self._ended is None:
            self._ending = asyncio.create_task(self._account())

    async def _account(self) -> None:
        await self._lost()
        self.end(ConnectionError("has closed its connection"))


class _Peer:
    """Who has connected to a listener."""

    def __init__(self, answer: Answering, secret: bytes) -> None:
        self._answer, self._secret = answer, secret
        self._tasks: set[asyncio.Task[None]] = set()
        self.frames = _Frames(self._meet, self._leave, most=SECRET_BYTES)
        self._patience = asyncio.get_running_loop().call_later(_SECRET_TIMEOUT_S, self.frames.close)

    def _meet(self, number: int, went_well: bool, shown: bytearray) -> None:
        self._patience.cancel()
        if hmac.compare_digest(shown, self._secret):
            self.frames.take, self.frames.most = self._begin, None
        else:
            self.frames.close()

    def _begin(self, number: int, went_well: bool, request: bytearray) -> None:
        task = asyncio.create_task(self._do(number, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _do(self, number: int, request: bytearray) -> None:
        try:
            went_well, said = True, await self._answer(request)
        except Exception as problem:  # the driver's to judge
            went_well, said = False, _pickled(problem)
        self.frames.send(number, said, went_well)

    def _leave(self) -> None:
        self._patience.cancel()


class _Frames(asyncio.BufferedProtocol):
    """Messages of any length over a connection, each received where it will lie.

    Args:
        take: told of each message.
        leave: told once that the connection has ended.
        most: the bytes of a message for which the connection is ended, where there is a bound.
    """

    def __init__(self, take: Take, leave: Callable[[], None], most: int | None = None) -> None:
        self.take, self.leave, self.most = take, leave, most
        self._transport: Any = None
        self._head = bytearray(_HEAD.size)
        self._body: bytearray | None = None  # None while a head is received
        self._filled = 0
        self._number, self._went_well = 0, True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.leave()

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._head if self._body is None else self._body)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._filled < len(self._head if self._body is None else self._body):
            return
        self._filled = 0
        if self._body is None:
            self._number, length, self._went_well = _HEAD.unpack(self._head)
            if self.most is not None and length > self.most:
                self.close()
                return
            self._body = bytearray(length)
            if length:
                return
        body, self._body = self._body, None
        self.take(self._number, self._went_well, body)

    def send(self, number: int, said: bytes, went_well: bool = True) -> None:
        """Sends a message, unless the connection has ended."""
        if self._transport is None or self._transport.is_closing():
            return
        head = _HEAD.pack(number, len(said), went_well)
        if len(said) <= _JOINED_BYTES:
            self._transport.write(head + said)
        else:
            self._transport.write(head)
            self._transport.write(said)

    def close(self) -> None:
        """Ends the connection."""
        if self._transport is not None:
            self._transport.close()


def _pickled(problem: Exception) -> bytes:
    """An error, or what it says where it cannot be sent."""
    with contextlib.suppress(Exception):
        sent = pickle.dumps(problem)
        pickle.loads(sent)  # some can be written and not read
        return sent
    return pickle.dumps(RuntimeError(f"{type(problem).__name__}: {problem}"))
