"""A connection of its own between the driver and a worker, for what is said at every boundary.

A call of a Ray actor costs the driver several times what the same bytes over a socket do
(docs/rollouts.md has the figures). So Ray starts workers, watches over them and carries whatever is
rare, and chunks go here: jobs one way, reports the other. Both ends first show each other that they
know a secret, which they got by way of Ray, without saying it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import pickle
import secrets
import struct
from collections.abc import Awaitable, Callable
from typing import Any

SECRET_BYTES = 32

_HEAD = struct.Struct("<Q?")  # bytes that follow, and whether they are an error
_PROOF_BYTES = 32
_STRANGE_BYTES = 2 * _PROOF_BYTES  # the most that is taken of who has not shown the secret
_MEETING_S = 10.0  # that a stranger has for it
_LISTENING_S = 30.0  # for which the driver is waited for
_JOINED_BYTES = 2**16  # up to which a copy costs less than one more call of the system
_AHEAD_BYTES = 2**16  # received at a time where it is not known what comes

Take = Callable[[bytearray], None]


class Listener:
    """A worker's end: the first who knows the secret is let in, and nobody after.

    Args:
        take: told of each message that comes.
        report: the next message that goes; asked again as soon as it has gone.
        secret: 32 bytes.
    """

    def __init__(self, take: Take, report: Callable[[], Awaitable[bytes]], secret: bytes) -> None:
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a secret has {SECRET_BYTES} bytes, got {len(secret)}")
        self.take, self.report, self.secret = take, report, secret
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> int:
        """Listens at an address of this machine, for half a minute; returns the port.

        Raises:
            OSError: this machine has no such address.
        """
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Peer(self).frames, host, 0)
        loop.call_later(_LISTENING_S, self.close)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def is_open(self) -> bool:
        """Whether somebody may still come."""
        return self._server is not None

    def close(self) -> None:
        """Listens no more; who has come stays."""
        server, self._server = self._server, None
        if server is not None:
            server.close()


class Channel:
    """The driver's end. All of it runs in one event loop."""

    def __init__(self) -> None:
        self._frames = _Frames(self._answer, self._leave, most=_STRANGE_BYTES)
        self._secret, self._challenge = b"", b""
        self._met: asyncio.Future[None] | None = None
        self._hear: Take | None = None
        self._lose: Callable[[Exception], None] | None = None
        self._ended: Exception | None = None

    async def open(self, host: str, port: int, secret: bytes) -> None:
        """Connects, and makes sure of who is there.

        Raises:
            OSError: nobody is there, it cannot be reached, or it does not know the secret.
        """
        loop = asyncio.get_running_loop()
        self._secret, self._met = secret, loop.create_future()
        try:
            await loop.create_connection(lambda: self._frames, host, port)
            await self._met
        except BaseException:  # a time-out of the caller's, too: nobody would close it
            self.close()
            raise

    def attend(self, hear: Take, lose: Callable[[Exception], None]) -> None:
        """Listens from now on; what has come before was for nobody.

        Args:
            hear: told of each message.
            lose: told once why the connection has ended, unless it was closed here. What ``hear``
                raises ends it too.
        """
        self._hear, self._lose = hear, lose
        if self._ended is not None:
            asyncio.get_running_loop().call_soon(self._tell)

    def send(self, said: bytes) -> None:
        """Sends a message, unless the connection has ended."""
        self._frames.send(said)

    def close(self) -> None:
        """Ends the connection, and forgets what was not sent yet."""
        self._hear = self._lose = None
        self._frames.abort()

    def _answer(self, challenge: bytearray, is_error: bool) -> None:
        self._challenge = secrets.token_bytes(_PROOF_BYTES)
        self._frames.take = self._meet
        self._frames.send(_proof(self._secret, b"driver", challenge) + self._challenge)

    def _meet(self, proof: bytearray, is_error: bool) -> None:
        assert self._met is not None
        if not hmac.compare_digest(proof, _proof(self._secret, b"worker", self._challenge)):
            self._end(ConnectionError("who is there does not know the secret"))
            self._frames.abort()
            return
        self._frames.take, self._frames.most = self._take, None
        if not self._met.done():
            self._met.set_result(None)

    def _take(self, said: bytearray, is_error: bool) -> None:
        try:
            if is_error:
                raise pickle.loads(said)
            if self._hear is not None:
                self._hear(said)
        except Exception as error:  # of the worker, or of what it says
            self._end(error)
            self._frames.abort()

    def _leave(self, problem: Exception | None) -> None:
        self._end(problem or ConnectionError("has closed its connection"))

    def _end(self, why: Exception) -> None:
        if self._ended is not None:
            return
        self._ended = why
        if self._met is not None and not self._met.done():
            self._met.set_exception(why)
        self._tell()

    def _tell(self) -> None:
        if self._lose is not None and self._ended is not None:
            self._lose(self._ended)


class _Peer:
    """Who has connected to a listener."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._challenge = secrets.token_bytes(_PROOF_BYTES)
        self.frames = _Frames(self._meet, self._leave, self._greet, most=_STRANGE_BYTES)
        self._patience: asyncio.TimerHandle | None = None
        self._reporting: asyncio.Task[None] | None = None

    def _greet(self) -> None:
        self._patience = asyncio.get_running_loop().call_later(_MEETING_S, self.frames.abort)
        self.frames.send(self._challenge)

    def _meet(self, said: bytearray, is_error: bool) -> None:
        proof, challenge = said[:_PROOF_BYTES], said[_PROOF_BYTES:]
        secret = self._listener.secret
        known = hmac.compare_digest(proof, _proof(secret, b"driver", self._challenge))
        if not (known and self._listener.is_open):
            self.frames.abort()
            return
        self._listener.close()
        self._end_patience()
        self.frames.send(_proof(secret, b"worker", challenge))
        self.frames.take, self.frames.most = self._hear, None
        self._reporting = asyncio.create_task(self._report_on())

    def _hear(self, said: bytearray, is_error: bool) -> None:
        try:
            self._listener.take(said)
        except Exception as error:  # the driver's to judge
            self._fail(error)

    async def _report_on(self) -> None:
        try:
            while True:
                self.frames.send(await self._listener.report())
        except Exception as error:  # the driver's to judge
            self._fail(error)

    def _fail(self, problem: Exception) -> None:
        self.frames.send(_pickled(problem), is_error=True)
        self.frames.close()

    def _end_patience(self) -> None:
        if self._patience is not None:
            self._patience.cancel()

    def _leave(self, problem: Exception | None) -> None:
        self._end_patience()
        if self._reporting is not None:
            self._reporting.cancel()


class _Frames(asyncio.BufferedProtocol):
    """Messages of any length over a connection; a long one is received where it will lie.

    Args:
        take: told of each message, and whether it is an error.
        leave: told once that the connection has ended, and why where that is known.
        begin: told once that there is a connection.
        most: the bytes of a message beyond which the connection is ended, where there is a bound.
    """

    def __init__(
        self,
        take: Callable[[bytearray, bool], None],
        leave: Callable[[Exception | None], None],
        begin: Callable[[], None] = lambda: None,
        most: int | None = None,
    ) -> None:
        self.take, self.most = take, most
        self._leave, self._begin = leave, begin
        self._transport: Any = None
        self._is_closed = False
        self._ahead = bytearray(_AHEAD_BYTES)
        self._body: bytearray | None = None  # of a message whose head has come
        self._is_error = False
        self._filled = 0  # of the body, or else of what lies ahead

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave(exc)

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
        while len(ahead) >= _HEAD.size and not self._is_closed:
            length, self._is_error = _HEAD.unpack_from(ahead)
            if self.most is not None and length > self.most:
                self.abort()
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
        self._is_closed = True
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Ends the connection at once."""
        self._is_closed = True
        if self._transport is not None:
            self._transport.abort()


def _proof(secret: bytes, whose: bytes, challenge: bytes | bytearray) -> bytes:
    """That one end knows the secret, for this connection alone."""
    return hmac.digest(secret, whose + challenge, "sha256")


def _pickled(problem: Exception) -> bytes:
    """An error, or what it says where it cannot be sent."""
    with contextlib.suppress(Exception):
        sent = pickle.dumps(problem)
        pickle.loads(sent)  # some can be written and not read
        return sent
    return pickle.dumps(RuntimeError(f"{type(problem).__name__}: {problem}"))
