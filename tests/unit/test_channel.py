"""The connection between the driver and a worker, both ends of it over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delethink.errors import PolicyError
from delethink.serving import channel as channel_module
from delethink.serving.channel import SECRET_BYTES, Channel, Listener, _Frames

SECRET = b"s" * SECRET_BYTES
HOST = "127.0.0.1"
HEAD = 17  # bytes before each message


async def echo(request: bytes | bytearray) -> bytes:
    return bytes(request)


async def know_nothing() -> None:
    """Of why a connection ended."""


@contextlib.asynccontextmanager
async def connected(
    answer: Callable[[bytes | bytearray], Awaitable[bytes]] = echo,
    shown: bytes = SECRET,
    lost: Callable[[], Awaitable[None]] = know_nothing,
) -> AsyncIterator[tuple[Channel, Listener]]:
    listener = Listener(answer, SECRET)
    port = await listener.start(HOST)
    channel = Channel(lost)
    await channel.open(HOST, port, shown)
    try:
        yield channel, listener
    finally:
        channel.end(ConnectionError("the test is over"))
        listener.close()


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.sampled_from([0, 1, HEAD, 2**16, 2**16 + 1, 2**20 + 3]), max_size=6))
def test_requests_of_any_length_are_answered(sizes: list[int]) -> None:
    async def ask() -> None:
        async with connected() as (channel, _):
            requests = [bytes([i]) * size for i, size in enumerate(sizes)]
            assert await asyncio.gather(*map(channel.ask, requests)) == requests

    asyncio.run(ask())


@given(
    bodies=st.lists(st.binary(max_size=40), max_size=5),
    pieces=st.lists(st.integers(1, 30), min_size=1),
)
def test_messages_are_the_same_however_they_come_in_pieces(
    bodies: list[bytes], pieces: list[int]
) -> None:
    taken: list[tuple[int, bool, bytes]] = []
    frames = _Frames(lambda *message: taken.append(message), lambda: None)
    sent = b"".join(
        struct.pack("<QQ?", i, len(body), i % 2 == 0) + body for i, body in enumerate(bodies)
    )
    turn = 0
    while sent:
        buffer = frames.get_buffer(-1)
        size = min(len(buffer), pieces[turn % len(pieces)], len(sent))
        buffer[:size], sent = sent[:size], sent[size:]
        frames.buffer_updated(size)
        turn += 1
    assert taken == [(i, i % 2 == 0, body) for i, body in enumerate(bodies)]


def test_an_answer_does_not_wait_for_an_earlier_one() -> None:
    release = asyncio.Event()

    async def answer(request: bytes | bytearray) -> bytes:
        if request == b"slow":
            await release.wait()
        return bytes(request)

    async def ask() -> None:
        async with connected(answer) as (channel, _):
            slow = asyncio.create_task(channel.ask(b"slow"))
            assert await channel.ask(b"fast") == b"fast"
            assert not slow.done()
            release.set()
            assert await slow == b"slow"

    asyncio.run(ask())


def test_what_a_worker_raises_is_raised_here() -> None:
    class Unsendable(Exception):
        """Of a function, which no other process can load."""

    async def answer(request: bytes | bytearray) -> bytes:
        raise PolicyError("no") if request == b"known" else Unsendable("of here")

    async def ask() -> None:
        async with connected(answer) as (channel, _):
            with pytest.raises(PolicyError, match="^no$"):
                await channel.ask(b"known")
            with pytest.raises(RuntimeError, match="Unsendable: of here"):
                await channel.ask(b"other")

    asyncio.run(ask())


@pytest.mark.parametrize("shown", [b"x" * SECRET_BYTES, b"", b"s" * (SECRET_BYTES + 1)])
def test_who_does_not_know_the_secret_gets_no_answer(shown: bytes) -> None:
    asked = []

    async def answer(request: bytes | bytearray) -> bytes:
        asked.append(request)
        return b"secrets"

    async def ask() -> None:
        async with connected(answer, shown) as (channel, _):
            with pytest.raises(ConnectionError, match="has closed its connection"):
                await channel.ask(b"tell me")

    asyncio.run(ask())
    assert not asked


def test_who_shows_nothing_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "_SECRET_TIMEOUT_S", 0.05)

    async def wait() -> bytes:
        listener = Listener(echo, SECRET)
        reader, writer = await asyncio.open_connection(HOST, await listener.start(HOST))
        said = await reader.read()
        writer.close()
        listener.close()
        return said

    assert asyncio.run(wait()) == b""


def test_a_long_message_of_a_stranger_is_not_waited_for() -> None:
    """A head alone must not make a worker set memory aside."""

    async def wait() -> bytes:
        listener = Listener(echo, SECRET)
        reader, writer = await asyncio.open_connection(HOST, await listener.start(HOST))
        writer.write(struct.pack("<QQ?", 1, 2**62, True))
        said = await reader.read()
        writer.close()
        listener.close()
        return said

    assert asyncio.run(wait()) == b""


def test_what_is_known_of_an_end_is_told_to_all_who_wait_and_to_those_who_come_later() -> None:
    async def never(request: bytes | bytearray) -> bytes:
        await asyncio.Event().wait()
        return b""

    async def ask() -> None:
        async def account() -> None:
            channel.end(ConnectionError("the node burnt down"))

        listener = Listener(never, SECRET)
        port = await listener.start(HOST)
        channel = Channel(account)
        await channel.open(HOST, port, SECRET)
        waiting = [asyncio.create_task(channel.ask(b"")) for _ in range(3)]
        await asyncio.sleep(0)
        channel._frames._transport.abort()
        for task in waiting:
            with pytest.raises(ConnectionError, match="the node burnt down"):
                await task
        with pytest.raises(ConnectionError, match="the node burnt down"):
            await channel.ask(b"")
        listener.close()

    asyncio.run(ask())


def test_nobody_at_the_port_is_an_error_of_the_system() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))  # and not listening
        port = taken.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            asyncio.run(Channel(know_nothing).open(HOST, port, SECRET))


def test_a_secret_has_a_fixed_length() -> None:
    with pytest.raises(ValueError, match="32 bytes, got 3"):
        Listener(echo, b"abc")
