"""A server with an upstream that fails and clients that misbehave; every outcome is counted.

The upstream is a fake one, as no real server fails on command.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
from fake_upstream import FakeUpstream
from made_up_reasoner import EOS, TOKENIZER, MadeUpReasoner
from served import listening_app

from delethink import ChunkSpec, Sampling
from delethink.serve.app import make_app
from delethink.serve.service import ThinkingService
from delethink.serve.settings import ServeSettings
from delethink.serve.thinking import ThinkingModel
from delethink.serve.upstream import UpstreamServer

SPEC = ChunkSpec(30, 10, 5)
PROMPTS = [f"Number {i}." for i in range(6)]
FAULTS: tuple[Any, ...] = (429, 500, 503, 400, "garbage", "half", "nothing")
LARGE = 100 * 2**20  # bytes of a body
_PATIENCE_S = 90.0

ANSWERED, TOLD, LEFT, LOST, WRONG = "answered", "error told", "left", "lost", "wrong"


@dataclass
class Scene:
    """A running server, its upstream, and the answers of quiet times by prompt.

    Attributes:
        expected: thinking and content of each prompt.
        loop: of the server.
        idle_tasks: of the loop, before the first request.
    """

    upstream: FakeUpstream
    service: ThinkingService = None  # type: ignore[assignment]  # set when the upstream listens
    host: str = ""
    port: int = 0
    expected: dict[str, tuple[str, str]] = field(default_factory=dict)
    loop: asyncio.AbstractEventLoop | None = None
    idle_tasks: int = 0
    restarts: int = 0
    _running: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # the upstream

    def start_upstream(self, port: int = 0) -> None:
        """Let the upstream listen."""
        opened = listening_app(self.upstream.app(), port)
        self.upstream.url = f"{self._running.enter_context(opened)}/v1"

    def restart_upstream(self) -> None:
        """Stop the upstream, which ends its streams, and start it at the same address."""
        port = int(self.upstream.url.removesuffix("/v1").rpartition(":")[2])
        self._running.close()
        self.start_upstream(port)
        self.restarts += 1

    def close(self) -> None:
        """Stop the upstream."""
        self._running.close()

    def app(self) -> Any:
        """Return the server's application, which tells its loop."""
        inner = make_app(self.service)

        async def watched(scope: Any, receive: Any, send: Any) -> None:
            if self.loop is None:  # the first scope is that of the lifespan
                self.loop = asyncio.get_running_loop()
                self.idle_tasks = len(asyncio.all_tasks())
            await inner(scope, receive, send)

        return watched

    def connections(self) -> int:
        """Return the connections of clients that the server holds."""
        own = psutil.Process().net_connections("tcp")
        states = ("ESTABLISHED", "CLOSE_WAIT", "FIN_WAIT1", "FIN_WAIT2")
        return sum(c.laddr.port == self.port and c.status in states for c in own)

    def left_over(self) -> dict[str, int]:
        """Return what is still there: traces, tasks of the server and connections."""
        assert self.loop is not None
        admission = self.service.admission
        return {
            "running": admission.running,
            "waiting": admission.waiting,
            "jobs": len(self.service.board._tasks),
            "tasks": max(0, len(asyncio.all_tasks(self.loop)) - self.idle_tasks),
            "connections": self.connections(),
        }

    def settle(self) -> dict[str, int]:
        """Wait until nothing is left, or the patience ends, and return what is."""
        deadline = time.monotonic() + _PATIENCE_S
        while any((left := self.left_over()).values()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left


@contextlib.contextmanager
def scene(**settings: Any) -> Iterator[Scene]:
    """Runs server and upstream; the upstream can be stopped and started at its address."""
    made = Scene(FakeUpstream(MadeUpReasoner(1, 3, 4)))
    with contextlib.closing(made):
        made.start_upstream()
        server = UpstreamServer(
            made.upstream.url, None, TOKENIZER, eos_ids=(EOS,), retries=4, checks_options=False
        )

        async def negotiate() -> None:
            await server.negotiate((5,))
            await server.disconnect()

        asyncio.run(negotiate())
        model = ThinkingModel(server, TOKENIZER, server.max_model_tokens, eos_ids=(EOS,))
        given = {"keepalive_s": 0.2, "send_time_s": 1.0, **settings}
        own = ServeSettings("made-up", SPEC, 40, Sampling(0.0), **given)
        made.service = ThinkingService(own, model, server)
        with listening_app(made.app()) as url:
            host, _, port = url.removeprefix("http://").partition(":")
            made.host, made.port = host, int(port)
            for prompt in PROMPTS:
                outcome, text = asyncio.run(ask(made, prompt, stream=False))
                assert outcome == ANSWERED
                made.expected[prompt] = text
            made.settle()
            yield made


def _head(made: Scene, length: int | None, extra: str = "") -> bytes:
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {made.host}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\n{size}\r\n{extra}\r\n"
    ).encode()


def _body(prompt: str, *, stream: bool) -> bytes:
    messages = [{"role": "user", "content": prompt}]
    return json.dumps({"messages": messages, "stream": stream}).encode()


async def _read(made: Scene, *parts: bytes, slow_s: float = 0.0) -> bytes:
    """Sends parts, and returns everything that comes back."""
    reader, writer = await asyncio.open_connection(made.host, made.port)
    answered = bytearray()
    try:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(2000 if slow_s else 65536):
                answered += piece
                await asyncio.sleep(slow_s)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return bytes(answered)


def read_answer(raw: bytes) -> tuple[str, tuple[str, str]]:
    """Return the outcome that a client sees, with thinking and content."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    found = re.match(rb"HTTP/1.1 (\d+)", head)
    text = rest.decode("utf-8", "replace")
    if found is None:
        return LOST, ("", "")
    if b"text/event-stream" in head:
        thinking, content, has_error = "", "", False
        for line in re.findall(r"^data: (\{.*\})", text, re.MULTILINE):
            piece = json.loads(line)
            has_error = has_error or bool(piece.get("error", {}).get("message"))
            for choice in piece.get("choices", []):
                thinking += choice["delta"].get("reasoning", "")
                content += choice["delta"].get("content", "")
        if has_error:
            return TOLD, ("", "")
        return (ANSWERED if "data: [DONE]" in text else LOST), (thinking, content)
    try:
        value = json.loads(text)
    except ValueError:
        return (TOLD if int(found[1]) == 400 else LOST), ("", "")  # of uvicorn, without JSON
    if int(found[1]) != 200:
        return (TOLD if value["error"]["message"] else LOST), ("", "")
    message = value["choices"][0]["message"]
    return ANSWERED, (message["reasoning"], message["content"])


async def ask(
    made: Scene, prompt: str, *, stream: bool, slow_s: float = 0.0
) -> tuple[str, tuple[str, str]]:
    """Ask for a prompt over a connection of its own, and compare with quiet times."""
    body = _body(prompt, stream=stream)
    outcome, text = read_answer(await _read(made, _head(made, len(body)), body, slow_s=slow_s))
    if outcome == ANSWERED and text != made.expected.get(prompt, text):
        return WRONG, text
    return outcome, text


async def _leave(made: Scene, sends: float, reads: int) -> str:
    """Send a share of a request, read some bytes, and leave."""
    body = _body(PROMPTS[0], stream=True)
    whole = _head(made, len(body)) + body
    reader, writer = await asyncio.open_connection(made.host, made.port)
    writer.write(whole[: round(len(whole) * sends)])
    await writer.drain()
    if reads:
        await reader.read(reads)
    writer.transport.abort()
    return LEFT


async def _send(made: Scene, body: bytes, extra: str = "") -> str:
    return read_answer(await _read(made, _head(made, len(body), extra), body))[0]


async def _send_large(made: Scene, *, chunked: bool) -> str:
    block = b"x" * 2**20
    parts = [b"%x\r\n%s\r\n" % (len(block), block) if chunked else block] * (LARGE // len(block))
    head = _head(made, None if chunked else LARGE)
    return read_answer(await _read(made, head, *parts))[0]


async def client(made: Scene, kind: str, number: int) -> str:
    """Act as a client of a kind, and return what became of its request."""
    prompt = PROMPTS[number % len(PROMPTS)]
    if kind in ("whole", "stream", "slow stream"):
        slow_s = 0.01 if kind == "slow stream" else 0.0
        return (await ask(made, prompt, stream=kind != "whole", slow_s=slow_s))[0]
    if kind == "leaves in its request":
        return await _leave(made, 0.7, 0)
    if kind == "leaves before the answer":
        return await _leave(made, 1.0, 0)
    if kind == "leaves in the stream":
        return await _leave(made, 1.0, 400)
    if kind == "bad JSON":
        return await _send(made, b'{"messages": [')
    if kind == "wrong types":
        wrong = [{"messages": 5}, {"messages": [7]}, {"messages": [{}], "n": "x"}, [], None, 3]
        return await _send(made, json.dumps(wrong[number % len(wrong)]).encode())
    if kind == "no HTTP":
        return read_answer(await _read(made, b"\x16\x03\x01 hello\r\n\r\n"))[0]
    assert kind in ("100 MB", "100 MB in chunks"), kind
    return await _send_large(made, chunked=kind != "100 MB")


GOOD_KINDS = ("whole", "stream", "slow stream")
BAD_KINDS = (
    *("leaves in its request", "leaves before the answer", "leaves in the stream"),
    *("bad JSON", "wrong types", "no HTTP"),
)


async def crowd(made: Scene, kinds: list[str]) -> Counter[tuple[str, str]]:
    """Let clients of these kinds come at once, and count kinds with outcomes."""
    outcomes = await asyncio.gather(*(client(made, kind, i) for i, kind in enumerate(kinds)))
    return Counter(zip(kinds, outcomes, strict=True))


def shuffled_faults(seed: int, count: int, share: float) -> list[Any]:
    """Return what happens to so many requests upstream; ``None`` is no fault."""
    pick = random.Random(seed)
    return [pick.choice(FAULTS) if pick.random() < share else None for _ in range(count)]


@contextlib.contextmanager
def restarting(made: Scene, every_s: float = 0.3) -> Iterator[None]:
    """Restart the upstream again and again, at least once."""
    over = threading.Event()

    def turn() -> None:
        while True:
            made.restart_upstream()
            if over.wait(every_s):
                return

    thread = threading.Thread(target=turn)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
