"""Running requests: who may start, who listens, and which trace a retry finds again."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from delethink.serve.api_errors import ApiError
from delethink.serve.events import SampledText, ThinkingEvent
from delethink.tokens import joined, logprob_array

_MAX_KEPT_RESULTS = 256
_MAX_WAIT_S = 60  # told to a client that finds the queue full


class Admission:
    """Limits the traces that run and those that wait.

    Attributes:
        running: traces that are being sampled.
        waiting: traces that wait for their turn.
    """

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._turns = asyncio.Semaphore(max_running)
        self._max_running, self._max_waiting = max_running, max_waiting
        self.running = self.waiting = 0
        self._mean_s = 1.0  # of the last traces

    def reserve(self, traces: int) -> list[Place]:
        """Return places in the queue.

        Raises:
            ApiError: 429, with the seconds after which to try again.
        """
        free = self._max_running - self.running + self._max_waiting - self.waiting
        if traces <= free:
            self.waiting += traces
            return [Place(self) for _ in range(traces)]
        wait_s = self._mean_s * (self.waiting + traces) / self._max_running
        seconds = min(_MAX_WAIT_S, max(1, math.ceil(wait_s)))
        raise ApiError(
            429,
            f"{self.running} traces are running and {self.waiting} are waiting, of at most "
            f"{self._max_running} and {self._max_waiting}; try again in {seconds} s",
            code="queue_full",
            headers={"Retry-After": str(seconds)},
        )

    @asynccontextmanager
    async def turn(self, place: Place) -> AsyncIterator[None]:
        """Wait for the turn of a trace, and hold it."""
        await self._turns.acquire()
        place.free()
        self.running += 1
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            yield
        finally:
            self.running -= 1
            self._turns.release()
            self._mean_s += (loop.time() - started - self._mean_s) / 8


class Place:
    """Place of one trace in the queue of an ``Admission``."""

    def __init__(self, admission: Admission) -> None:
        self._admission: Admission | None = admission

    def free(self) -> None:
        """Give the place to others; safe to call twice."""
        if self._admission is not None:
            self._admission.waiting -= 1
            self._admission = None


@dataclass(frozen=True)
class ChoiceEvent:
    """An event of one choice of a request."""

    index: int
    event: ThinkingEvent


@dataclass
class Job:
    """A request that runs once, for any number of listeners.

    A listener gets every event, also those before it came: texts of one phase are kept as one.
    """

    task: asyncio.Task[None] | None = None
    error: BaseException | None = None
    is_done: bool = False
    listeners: list[asyncio.Queue[ChoiceEvent | None]] = field(default_factory=list)
    on_end: list[Callable[[], None]] = field(default_factory=list)  # called in any case
    _history: dict[int, list[ThinkingEvent]] = field(default_factory=dict)
    _texts: dict[int, list[SampledText]] = field(default_factory=dict)  # not joined yet

    def publish(self, index: int, event: ThinkingEvent) -> None:
        """Give an event to all listeners, present and future."""
        if isinstance(event, SampledText):
            texts = self._texts.setdefault(index, [])
            if texts and texts[0].phase is not event.phase:
                self._join(index)
                texts = self._texts.setdefault(index, [])
            texts.append(event)
            if len(texts) >= 1024:
                self._texts[index] = [join_texts(texts)]
        else:
            self._join(index)
            self._history.setdefault(index, []).append(event)
        for listener in self.listeners:
            listener.put_nowait(ChoiceEvent(index, event))

    def _join(self, index: int) -> None:
        if texts := self._texts.pop(index, None):
            self._history.setdefault(index, []).append(join_texts(texts))

    def listen(self) -> asyncio.Queue[ChoiceEvent | None]:
        """Return a queue of all events; ``None`` ends it, and ``error`` says how."""
        queue: asyncio.Queue[ChoiceEvent | None] = asyncio.Queue()
        for index in list(self._texts):
            self._join(index)
        for index, events in self._history.items():
            for event in events:
                queue.put_nowait(ChoiceEvent(index, event))
        if self.is_done:
            queue.put_nowait(None)
        self.listeners.append(queue)
        return queue

    def finish(self, error: BaseException | None) -> None:
        """End the queues of all listeners."""
        self.is_done, self.error = True, error
        for listener in self.listeners:
            listener.put_nowait(None)


def join_texts(texts: list[SampledText]) -> SampledText:
    """Return texts of one phase as one."""
    if len(texts) == 1:
        return texts[0]
    return SampledText(
        texts[0].phase,
        "".join(text.text for text in texts),
        joined(text.token_ids for text in texts),
        logprob_array([value for text in texts for value in text.logprobs]),
    )


@dataclass(frozen=True)
class ClientIdentity:
    """Marks by which the retry of a request is recognised."""

    body_key: str  # equal for equal requests of one client
    idempotency_key: str | None = None
    is_retry: bool = False  # the client says so
    timeout_s: float | None = None  # after which the client gives up


class JobBoard:
    """All running requests, and the results that a retry may ask for.

    Args:
        reattach_s: time that a job of a client that gave up waits for the retry.
        keep_result_s: time that results under an ``Idempotency-Key`` are kept.
    """

    def __init__(self, reattach_s: float, keep_result_s: float) -> None:
        self._reattach_s, self._keep_result_s = reattach_s, keep_result_s
        self._by_key: OrderedDict[str, tuple[str, Job]] = OrderedDict()
        self._left: dict[str, list[Job]] = {}  # jobs whose clients gave up, by the request
        self._tasks: set[asyncio.Task[None]] = set()
        self.attached = 0  # retries that found their job

    def find_or_start(
        self, identity: ClientIdentity, start: Callable[[Job], Coroutine[Any, Any, None]]
    ) -> Job:
        """Return the job of a retry, or start one.

        Raises:
            ApiError: the key was used with another request.
        """
        job = self._find(identity)
        if job is not None:
            self.attached += 1
            return job
        job = Job()
        job.task = self._keep(start(job))
        job.task.add_done_callback(partial(self._end, job))
        if identity.idempotency_key is not None:
            self._by_key[identity.idempotency_key] = (identity.body_key, job)
            while len(self._by_key) > _MAX_KEPT_RESULTS:
                _, (_, oldest) = self._by_key.popitem(last=False)
                if not oldest.listeners and oldest.task is not None:
                    oldest.task.cancel()
        return job

    def _find(self, identity: ClientIdentity) -> Job | None:
        key = identity.idempotency_key
        if key is not None and key in self._by_key:
            body_key, job = self._by_key[key]
            if body_key != identity.body_key:
                raise ApiError(
                    409,
                    "this Idempotency-Key was used with another request; use a new key",
                    code="idempotency_key_reused",
                )
            return job
        jobs = self._left.get(identity.body_key) if identity.is_retry and key is None else None
        if not jobs:
            return None
        job = jobs.pop()
        if not jobs:
            del self._left[identity.body_key]
        return job

    @staticmethod
    def _end(job: Job, task: asyncio.Task[None]) -> None:
        """Finish a job, also one that was cancelled before it began."""
        job.finish(asyncio.CancelledError() if task.cancelled() else task.exception())
        for free in job.on_end:
            free()

    def leave(
        self,
        job: Job,
        queue: asyncio.Queue[ChoiceEvent | None],
        identity: ClientIdentity,
        listened_s: float,
        is_delivered: bool,
    ) -> None:
        """Remove a listener; the job ends with the last one, unless a retry may come.

        Args:
            job: the job.
            queue: of the listener.
            identity: of the client.
            listened_s: seconds that the client has waited.
            is_delivered: the client has the whole response.
        """
        if queue in job.listeners:
            job.listeners.remove(queue)
        if job.listeners:
            return
        key = identity.idempotency_key
        # The client's clock started earlier, by what a busy machine took to read its request.
        gave_up = identity.timeout_s is not None and listened_s >= identity.timeout_s / 2
        if key is not None:
            wait_s = self._keep_result_s if is_delivered or job.is_done else self._reattach_s
            self._keep(self._expire_key(key, job, wait_s))
        elif gave_up and not is_delivered:
            self._left.setdefault(identity.body_key, []).append(job)
            self._keep(self._expire_left(identity.body_key, job))
        else:
            self._cancel(job)

    async def _expire_key(self, key: str, job: Job, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        if not job.listeners:
            if key in self._by_key and self._by_key[key][1] is job:
                del self._by_key[key]
            self._cancel(job)

    async def _expire_left(self, body_key: str, job: Job) -> None:
        await asyncio.sleep(self._reattach_s)
        jobs = self._left.get(body_key, [])
        if job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._left[body_key]
            self._cancel(job)

    def _cancel(self, job: Job) -> None:
        if job.task is not None and not job.is_done:
            job.task.cancel()

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Cancel everything."""
        for task in self._tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*self._tasks, return_exceptions=True)
