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
from delethink.serving.channel import SECRET_BYTES, Channel, Listener, Take, _Frames

SECRET = b"s" * SECRET_BYTES
HOST = "127.0.0.1"
SIZES = [0, 1, 9, 2**16 - 9, 2**16 - 8, 2**16, 2**16 + 1, 2**20 + 3]
Report = Callable[[], Awaitable[bytes]]


async def never() -> bytes:
    await asyncio.Event().wait()
    return b""


def ignore(said: bytearray) -> None:
    """Of a worker that takes nothing."""


class Driver:
    """What the driver's end was told, in order."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.lost: list[Exception] = []
        self.news = asyncio.Event()

    def attend(self, channel: Channel) -> None:
        channel.attend(self.hear, self.lose)

    def hear(self, said: bytearray) -> None:
        self.heard.append(bytes(said))
        self.news.set()

    def lose(self, why: Exception) -> None:
        self.lost.append(why)
        self.news.set()

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not done():
                self.news.clear()
                await self.news.wait()


@contextlib.asynccontextmanager
async def connected(
    take: Take = ignore, report: Report = never, shown: bytes = SECRET
) -> AsyncIterator[tuple[Channel, Driver]]:
    listener = Listener(take, report, SECRET)
    channel, driver = Channel(), Driver()
    await channel.open(HOST, await listener.start(HOST), shown)
    driver.attend(channel)
    try:
        yield channel, driver
    finally:
        channel.close()
        listener.close()


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=6))
def test_messages_of_any_length_come_both_ways_in_order(sizes: list[int]) -> None:
    async def talk() -> None:
        inbox: asyncio.Queue[bytes] = asyncio.Queue()

        def take(said: bytearray) -> None:
            inbox.put_nowait(bytes(said))

        async with connected(take, inbox.get) as (channel, driver):  # it sends back what it gets
            sent = [bytes([i]) * size for i, size in enumerate(sizes)]
            for said in sent:
                channel.send(said)
            await driver.until(lambda: len(driver.heard) == len(sent))
            assert driver.heard == sent
            assert not driver.lost

    asyncio.run(talk())


@given(
    bodies=st.lists(st.binary(max_size=40) | st.sampled_from([b"x" * size for size in SIZES[3:7]])),
    pieces=st.lists(st.integers(1, 30) | st.integers(1, 2**17), min_size=1),
)
@settings(deadline=None)
def test_messages_are_the_same_however_they_come_in_pieces(
    bodies: list[bytes], pieces: list[int]
) -> None:
    taken: list[tuple[bytes, bool]] = []
    frames = _Frames(lambda said, is_error: taken.append((bytes(said), is_error)), lambda: None)
    sent = b"".join(struct.pack("<Q?", len(body), i % 2) + body for i, body in enumerate(bodies))
    at, turn = 0, 0
    while at < len(sent):
        buffer = frames.get_buffer(-1)
        size = min(len(buffer), max(pieces[turn % len(pieces)], 4096), len(sent) - at)
        if len(bodies) < 4 and sum(map(len, bodies)) < 1000:  # small ones in small pieces, too
            size = min(size, pieces[turn % len(pieces)])
        buffer[:size] = sent[at : at + size]
        del buffer
        frames.buffer_updated(size)
        at, turn = at + size, turn + 1
    assert taken == [(body, i % 2 == 1) for i, body in enumerate(bodies)]


def test_what_a_worker_raises_over_a_message_ends_the_connection_with_it() -> None:
    def take(said: bytearray) -> None:
        raise PolicyError("no such job")

    async def talk() -> None:
        async with connected(take) as (channel, driver):
            channel.send(b"job")
            await driver.until(lambda: bool(driver.lost))
            (problem,) = driver.lost
            assert isinstance(problem, PolicyError)
            assert str(problem) == "no such job"

    asyncio.run(talk())


def test_what_a_worker_cannot_send_of_an_error_is_told_in_words() -> None:
    class Unsendable(Exception):
        """Of a function, which no other process can load."""

    async def report() -> bytes:
        raise Unsendable("of here")

    async def talk() -> None:
        async with connected(report=report) as (_, driver):
            await driver.until(lambda: bool(driver.lost))
            assert str(driver.lost[0]) == "Unsendable: of here"

    asyncio.run(talk())


@pytest.mark.parametrize("shown", [b"x" * SECRET_BYTES, b"", b"s" * (SECRET_BYTES + 1)])
def test_who_does_not_know_the_secret_is_told_nothing_and_not_listened_to(shown: bytes) -> None:
    taken: list[bytearray] = []

    async def report() -> bytes:
        return b"a secret"

    async def talk() -> None:
        async with connected(taken.append, report, shown) as (channel, driver):
            channel.send(b"do this")
            await driver.until(lambda: bool(driver.lost))
            assert isinstance(driver.lost[0], ConnectionError)
            assert not driver.heard

    asyncio.run(talk())
    assert not taken


def test_who_shows_nothing_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "_SECRET_TIMEOUT_S", 0.05)
    assert asyncio.run(said_to(b"")) == b""


def test_a_long_message_of_a_stranger_is_not_waited_for() -> None:
    """A head alone must not make a worker set memory aside."""
    assert asyncio.run(said_to(struct.pack("<Q?", 2**62, False))) == b""


async def said_to(stranger: bytes) -> bytes:
    """What who says so hears, until the other end closes the connection."""
    listener = Listener(ignore, never, SECRET)
    reader, writer = await asyncio.open_connection(HOST, await listener.start(HOST))
    writer.write(stranger)
    async with asyncio.timeout(5):
        said = await reader.read()
    writer.close()
    listener.close()
    return said


def test_a_worker_asks_nobody_for_reports_once_the_driver_has_gone() -> None:
    ended = asyncio.Event()

    async def report() -> bytes:
        try:
            return await never()
        except asyncio.CancelledError:
            ended.set()
            raise

    async def talk() -> None:
        async with connected(report=report) as (channel, driver):
            await asyncio.sleep(0.05)
            channel.close()
            async with asyncio.timeout(5):
                await ended.wait()
            assert not driver.lost  # who closed it knows

    asyncio.run(talk())


def test_an_end_before_somebody_listened_is_told_once_somebody_does() -> None:
    async def talk() -> None:
        listener = Listener(ignore, never, SECRET)
        channel, driver = Channel(), Driver()
        await channel.open(HOST, await listener.start(HOST), b"x" * SECRET_BYTES)
        await asyncio.sleep(0.05)
        driver.attend(channel)
        await driver.until(lambda: bool(driver.lost))
        assert str(driver.lost[0]) == "has closed its connection"
        channel.send(b"too late")
        listener.close()

    asyncio.run(talk())


def test_nobody_at_the_port_is_an_error_of_the_system() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))  # and not listening
        port = taken.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            asyncio.run(Channel().open(HOST, port, SECRET))


def test_a_secret_has_a_fixed_length() -> None:
    with pytest.raises(ValueError, match="32 bytes, got 3"):
        Listener(ignore, never, b"abc")
