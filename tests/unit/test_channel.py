"""The connection between the driver and a worker, both ends of it over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delethink.engines import channel as channel_module
from delethink.engines.channel import SECRET_BYTES, Channel, Listener, Take, _Frames
from delethink.errors import PolicyError

SECRET = b"s" * SECRET_BYTES
HOST = "127.0.0.1"
SIZES = [0, 1, 9, 2**16 - 9, 2**16 - 8, 2**16, 2**16 + 1, 2**20 + 3]
Report = Callable[[], Awaitable[bytes]]


def loops() -> list[Any]:
    """Those that a worker may run on: Ray takes uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return [asyncio.new_event_loop]
    return [asyncio.new_event_loop, uvloop.new_event_loop]


@pytest.fixture(params=loops(), ids=lambda loop: loop.__module__.split(".")[0])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Runs a test on each kind of event loop."""

    def run(work: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(work)

    return run


Run = Callable[[Coroutine[Any, Any, Any]], Any]


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
    take: Take = ignore, report: Report = never
) -> AsyncIterator[tuple[Channel, Driver]]:
    listener = Listener(take, report, SECRET)
    channel, driver = Channel(), Driver()
    await channel.open(HOST, await listener.start(HOST), SECRET)
    driver.attend(channel)
    try:
        yield channel, driver
    finally:
        channel.close()
        listener.close()


@pytest.mark.parametrize("loop", loops(), ids=lambda loop: loop.__module__.split(".")[0])
@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=6))
def test_messages_of_any_length_come_both_ways_in_order(loop: Any, sizes: list[int]) -> None:
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

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(talk())


@given(
    bodies=st.lists(st.binary(max_size=40) | st.sampled_from([b"x" * size for size in SIZES[3:7]])),
    pieces=st.lists(st.integers(1, 30) | st.integers(1, 2**17), min_size=1),
)
@settings(deadline=None)
def test_messages_are_the_same_however_they_come_in_pieces(
    bodies: list[bytes], pieces: list[int]
) -> None:
    taken: list[tuple[bytes, bool]] = []
    frames = _Frames(lambda said, is_error: taken.append((bytes(said), is_error)), ignore)
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


def test_what_a_worker_raises_over_a_message_ends_the_connection_with_it(run: Run) -> None:
    def take(said: bytearray) -> None:
        raise PolicyError("no such job")

    async def talk() -> None:
        async with connected(take) as (channel, driver):
            channel.send(b"job")
            await driver.until(lambda: bool(driver.lost))
            (problem,) = driver.lost
            assert isinstance(problem, PolicyError)
            assert str(problem) == "no such job"

    run(talk())


def test_what_a_worker_cannot_send_of_an_error_is_told_in_words(run: Run) -> None:
    class Unsendable(Exception):
        """Of a function, which no other process can load."""

    async def report() -> bytes:
        raise Unsendable("of here")

    async def talk() -> None:
        async with connected(report=report) as (_, driver):
            await driver.until(lambda: bool(driver.lost))
            assert str(driver.lost[0]) == "Unsendable: of here"

    run(talk())


def test_a_report_that_the_driver_does_not_understand_ends_the_connection_with_why(
    run: Run,
) -> None:
    async def report() -> bytes:
        await asyncio.sleep(0.05)
        return b"of another version"

    async def talk() -> None:
        async with connected(report=report) as (channel, driver):

            def hear(said: bytearray) -> None:
                raise ModuleNotFoundError("No module named 'vllm'")

            channel.attend(hear, driver.lose)
            await driver.until(lambda: bool(driver.lost))
            await asyncio.sleep(0.1)
            assert [str(problem) for problem in driver.lost] == ["No module named 'vllm'"]

    run(talk())


def test_who_does_not_know_the_secret_is_told_nothing_and_not_listened_to(run: Run) -> None:
    taken: list[bytearray] = []

    async def report() -> bytes:
        return b"for the driver alone"

    async def talk() -> None:
        listener = Listener(taken.append, report, SECRET)
        port = await listener.start(HOST)
        channel, driver = Channel(), Driver()
        with pytest.raises(ConnectionError):
            await channel.open(HOST, port, b"x" * SECRET_BYTES)
        driver.attend(channel)
        channel.send(b"do this")
        await asyncio.sleep(0.05)
        assert listener.is_open  # for who knows it
        listener.close()
        assert not driver.heard

    run(talk())
    assert not taken


def test_the_secret_is_not_told_to_who_does_not_know_it(run: Run) -> None:
    heard = bytearray()

    async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(struct.pack("<Q?", 32, False) + b"c" * 32)
        heard.extend(await reader.readexactly(9 + 64))
        writer.write(struct.pack("<Q?", 32, False) + bytes(heard[9:41]))
        heard.extend(await reader.read())
        writer.close()

    async def talk() -> None:
        server = await asyncio.start_server(pretend, HOST, 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ConnectionError, match="does not know the secret"):
            await Channel().open(HOST, port, SECRET)
        server.close()

    run(talk())
    assert SECRET not in heard
    assert len(heard) == 9 + 64


def test_nobody_is_let_in_after_the_first(run: Run) -> None:
    """Two would share the reports, and each believe that it has all."""

    async def talk() -> None:
        listener = Listener(ignore, never, SECRET)
        port = await listener.start(HOST)
        early, writer = await asyncio.open_connection(HOST, port)  # waits at the door meanwhile
        challenge = (await early.readexactly(9 + 32))[9:]
        channel = Channel()
        await channel.open(HOST, port, SECRET)
        proof = channel_module._proof(SECRET, b"driver", challenge)
        writer.write(struct.pack("<Q?", 64, False) + proof + bytes(32))
        with contextlib.suppress(ConnectionError):
            assert await early.read() == b""
        writer.close()
        with pytest.raises(ConnectionError):
            await Channel().open(HOST, port, SECRET)
        channel.close()

    run(talk())


def test_who_shows_nothing_is_sent_away(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "_MEETING_S", 0.05)
    run(says(b""))


def test_a_long_message_of_a_stranger_is_not_waited_for(run: Run) -> None:
    """A head alone must not make a worker set memory aside."""
    run(says(struct.pack("<Q?", 2**62, False)))


async def says(stranger: bytes) -> None:
    """Who says so is told the challenge and nothing else, and the connection is ended."""
    listener = Listener(ignore, never, SECRET)
    reader, writer = await asyncio.open_connection(HOST, await listener.start(HOST))
    writer.write(stranger)
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionError):
            assert len(await reader.read()) == 9 + 32
    writer.close()
    listener.close()


def test_nobody_is_waited_for_for_ever(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "_LISTENING_S", 0.05)

    async def come_late() -> None:
        listener = Listener(ignore, never, SECRET)
        port = await listener.start(HOST)
        await asyncio.sleep(0.1)
        with pytest.raises(ConnectionRefusedError):
            await Channel().open(HOST, port, SECRET)

    run(come_late())


def test_a_worker_asks_nobody_for_reports_once_the_driver_has_gone(run: Run) -> None:
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

    run(talk())


def test_an_end_before_somebody_listened_is_told_once_somebody_does(run: Run) -> None:
    def take(said: bytearray) -> None:
        raise PolicyError("not now")

    async def talk() -> None:
        listener = Listener(take, never, SECRET)
        channel, driver = Channel(), Driver()
        await channel.open(HOST, await listener.start(HOST), SECRET)
        channel.send(b"job")
        await asyncio.sleep(0.1)
        driver.attend(channel)
        await driver.until(lambda: bool(driver.lost))
        assert [str(problem) for problem in driver.lost] == ["not now"]
        channel.send(b"too late")

    run(talk())


def test_what_was_not_sent_is_forgotten_when_a_worker_is_given_up() -> None:
    """A node that was cut off reads nothing, and would keep the memory for as long as TCP waits."""

    async def talk() -> None:
        listener = Listener(ignore, never, SECRET)
        channel = Channel()
        await channel.open(HOST, await listener.start(HOST), SECRET)
        transport = channel._frames._transport
        for _ in range(64):
            channel.send(bytes(2**20))
        channel.close()
        await asyncio.sleep(0)
        assert transport.get_write_buffer_size() == 0

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
