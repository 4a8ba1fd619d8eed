"""Responses over ASGI: streams with comments in silences, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from contextlib import suppress
from typing import Any

from delethink.serve.api_errors import ApiError, as_api_error
from delethink.serve.events import SampledText
from delethink.serve.jobs import ChoiceEvent, ClientIdentity, Job, join_texts
from delethink.serve.service import ThinkingService
from delethink.serve.wire import ResponseWriter

AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]
EventQueue = asyncio.Queue[ChoiceEvent | None]

_KEEPALIVE = b": keepalive\n\n"
_DONE = b"data: [DONE]\n\n"
_DROP_TIME_S = 10.0  # for the rest of a body that is too large
_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # proxies pass on each piece at once
}


def encode_json(value: Any) -> bytes:
    """Return JSON as bytes; half a surrogate pair, which is no text, becomes an escape."""
    return json.dumps(value, separators=(",", ":")).encode()


async def send_json(
    send: Send, status: int, value: Any, headers: Mapping[str, str] | None = None
) -> None:
    """Send a whole response."""
    body = encode_json(value)
    own = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
    await _start(send, status, own)
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: ApiError) -> None:
    """Send an error as a whole response."""
    await send_json(send, error.status, error.body(), error.headers)


class TooLargeResponse:
    """ASGI response to a body that is too large, of which the rest is read and dropped.

    A connection that is closed while its client still sends is reset, and the client would never
    read the error.
    """

    def __init__(self, error: ApiError) -> None:
        self._error = error

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Send the error, then read on for a limited time."""
        body = encode_json(self._error.body())
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        await _start(send, self._error.status, {**headers, "Connection": "close"})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(_DROP_TIME_S):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _start(send: Send, status: int, headers: Mapping[str, str]) -> None:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Run work until it ends or the client leaves, and return whether it ended."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_until_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return False
        await task
        return True
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class JobResponse:
    """ASGI response with the events of a job.

    Args:
        service: owns the job.
        job: to listen to.
        writer: makes the pieces.
        identity: of the client.
        is_stream: send pieces instead of a whole response.
        include_usage: end a stream with its usage.
    """

    def __init__(
        self,
        service: ThinkingService,
        job: Job,
        writer: ResponseWriter,
        identity: ClientIdentity,
        *,
        is_stream: bool,
        include_usage: bool,
    ) -> None:
        self._service, self._job, self._writer = service, job, writer
        self._identity, self._is_stream = identity, is_stream
        self._include_usage = include_usage
        self._queue: EventQueue = job.listen()
        self.status = 200

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Send the response, and leave the job in any case."""
        loop, delivered = asyncio.get_running_loop(), False
        started = loop.time()
        work = self._send_stream(send) if self._is_stream else self._send_whole(send)
        try:
            delivered = await while_connected(receive, work)
        except (OSError, TimeoutError):  # the client left, or reads nothing
            pass
        finally:
            waited_s = loop.time() - started
            self._service.board.leave(self._job, self._queue, self._identity, waited_s, delivered)
            self._log(waited_s, delivered)

    def _log(self, waited_s: float, delivered: bool) -> None:
        usage = self._writer.usage()
        outcome = self.status if delivered else "left by its client"
        self._service.log(
            f"{self._writer.request_id}: {outcome} after {waited_s:.2f} s, "
            f"{usage['prompt_tokens']} + {usage['completion_tokens']} tokens"
        )

    def _failure(self) -> ApiError | None:
        """Return the error of the finished job."""
        error = self._job.error
        if error is None and self._writer.is_complete:
            return None
        if error is None or isinstance(error, asyncio.CancelledError):
            answer = ApiError(503, "the trace was cancelled, as the server is closing")
        else:
            answer = as_api_error(error)
        self.status = answer.status
        self._service.metrics.count_error(answer.status)
        return answer

    async def _send_whole(self, send: Send) -> None:
        while (item := await self._queue.get()) is not None:
            self._writer.read(item.index, item.event)
        failure = self._failure()
        if failure is not None:
            await send_error(send, failure)
        else:
            headers = {"X-Request-Id": self._writer.request_id}
            await send_json(send, 200, self._writer.whole(), headers)

    async def _send_stream(self, send: Send) -> None:
        settings = self._service.settings
        await _start(send, 200, {**_STREAM_HEADERS, "X-Request-Id": self._writer.request_id})
        waker = asyncio.Event()
        beat = asyncio.ensure_future(self._keep_alive(send, waker))
        try:
            is_over = False
            while not is_over:
                items = [await self._queue.get()]
                while not self._queue.empty():
                    items.append(self._queue.get_nowait())
                is_over = items[-1] is None
                body = self._body([item for item in items if item is not None])
                if is_over:
                    body += self._ending()
                if body:
                    waker.set()  # no comment is needed for a while
                    async with asyncio.timeout(settings.send_time_s):
                        await send({"type": "http.response.body", "body": body, "more_body": True})
        finally:
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send, waker: asyncio.Event) -> None:
        """Send a comment after each time without a piece."""
        while True:
            waker.clear()
            await asyncio.sleep(self._service.settings.keepalive_s)
            if not waker.is_set():
                await send({"type": "http.response.body", "body": _KEEPALIVE, "more_body": True})

    def _body(self, items: list[ChoiceEvent]) -> bytes:
        """Return the pieces of events; texts that wait for a slow client are joined."""
        pieces: list[dict[str, Any]] = []
        for item in _joined(items) if len(items) > 1 else items:
            pieces += self._writer.pieces(item.index, item.event)
        return b"".join(map(self._frame, pieces))

    def _frame(self, piece: Mapping[str, Any]) -> bytes:
        return b"data: " + encode_json(piece) + b"\n\n"

    def _ending(self) -> bytes:
        failure = self._failure()
        if failure is not None:
            return b"data: " + encode_json(failure.body()) + b"\n\n" + _DONE
        if self._include_usage:
            return b"data: " + encode_json(self._writer.usage_piece()) + b"\n\n" + _DONE
        return _DONE


def _joined(items: list[ChoiceEvent]) -> list[ChoiceEvent]:
    """Join the texts that follow each other in one phase of one choice."""
    groups: list[list[ChoiceEvent]] = []
    for item in items:
        last = groups[-1][-1] if groups else None
        if (
            last is not None
            and last.index == item.index
            and isinstance(last.event, SampledText)
            and isinstance(item.event, SampledText)
            and last.event.phase is item.event.phase
        ):
            groups[-1].append(item)
        else:
            groups.append([item])
    return [
        group[0]
        if len(group) == 1
        else ChoiceEvent(
            group[0].index,
            join_texts([item.event for item in group if isinstance(item.event, SampledText)]),
        )
        for group in groups
    ]


class ForwardedResponse:
    """ASGI response of the server behind this one, sent on as it comes."""

    def __init__(self, service: ThinkingService, body: Mapping[str, Any]) -> None:
        self._service, self._body = service, body

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Send the response; a client that leaves cancels the request."""
        await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        assert self._service.upstream is not None
        started = False
        try:
            async with self._service.upstream.forward_chat(self._body) as response:
                status, headers, chunks = response
                await _start(send, status, headers)
                started = True
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ApiError as error:
            if started:
                raise
            await send_error(send, error)
