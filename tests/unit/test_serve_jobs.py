"""Running requests: places in the queue, listeners, retries."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("pydantic")

from delethink.serve.api_errors import ApiError
from delethink.serve.events import (
    BoundaryCrossed,
    EndReason,
    Phase,
    SampledText,
    ThinkingEvent,
    TraceEnded,
)
from delethink.serve.jobs import Admission, ClientIdentity, Job, JobBoard

END = TraceEnded(False, EndReason.MARK)


def text(words: str, phase: Phase = Phase.THINKING) -> SampledText:
    return SampledText(phase, words, tuple(map(ord, words)), (-1.0,) * len(words))


def take_all(queue: Any) -> list[ThinkingEvent]:
    events = []
    while not queue.empty():
        item = queue.get_nowait()
        if item is not None:
            events.append(item.event)
    return events


def joined_text(events: list[ThinkingEvent]) -> list[Any]:
    """Events, with the texts of a phase as one."""
    result: list[Any] = []
    for event in events:
        if not isinstance(event, SampledText):
            result.append(event)
        elif result and isinstance(result[-1], list) and result[-1][0] is event.phase:
            result[-1][1] += event.text
            result[-1][2] += tuple(event.token_ids)
        else:
            result.append([event.phase, event.text, tuple(event.token_ids)])
    return result


def run(work: Callable[[], Any]) -> Any:
    async def main() -> Any:
        return await work()

    return asyncio.run(main())


def test_late_listeners_get_all_events_with_texts_joined() -> None:
    async def work() -> None:
        job, said = Job(), [text("ab"), text("c"), BoundaryCrossed(1, 2, 3), *[text("x")] * 3000]
        said += [text("y", Phase.ANSWER), END]
        first = job.listen()
        late = []
        for event in said:
            job.publish(0, event)
            if len(late) < 5:
                late.append(job.listen())
        job.finish(None)
        last = job.listen()
        expected = joined_text(list(said))
        for queue in (first, *late, last):
            assert joined_text(take_all(queue)) == expected
        assert len(job._history[0]) <= 5 + len(late)

    run(work)


def test_places_are_limited_and_given_back() -> None:
    async def work() -> None:
        admission = Admission(1, 2)
        places = admission.reserve(3)
        with pytest.raises(ApiError, match="0 traces are running and 3 are waiting") as caught:
            admission.reserve(1)
        assert caught.value.status == 429
        assert int(caught.value.headers["Retry-After"]) >= 1
        async with admission.turn(places[0]):
            assert (admission.running, admission.waiting) == (1, 2)
        places[0].free()
        places[1].free()
        places[1].free()
        assert (admission.running, admission.waiting) == (0, 1)
        with pytest.raises(ApiError):
            admission.reserve(3)
        admission.reserve(2)

    run(work)


class Started:
    """Starts endless jobs, and counts those that were cancelled."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.freed = 0

    def __call__(self, job: Job) -> Any:
        self.jobs.append(job)
        job.on_end.append(self.free)
        return asyncio.Event().wait()

    def free(self) -> None:
        self.freed += 1


SDK = ClientIdentity("body", timeout_s=10.0)
RETRY = ClientIdentity("body", is_retry=True, timeout_s=10.0)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_job_ends_with_its_last_listener() -> None:
    async def work() -> None:
        board, start = JobBoard(60, 60), Started()
        job = board.find_or_start(SDK, start)
        queue = job.listen()
        board.leave(job, queue, SDK, 1.0, False)
        await settle()
        assert (job.is_done, start.freed) == (True, 1)
        assert isinstance(job.error, asyncio.CancelledError)
        await board.close()

    run(work)


def test_a_client_that_gave_up_is_waited_for() -> None:
    async def work() -> None:
        board, start = JobBoard(60, 60), Started()
        first, second = (board.find_or_start(SDK, start) for _ in range(2))
        assert first is not second  # equal requests are two samples
        for job in (first, second):
            board.leave(job, job.listen(), SDK, 9.9, False)
        await settle()
        assert not first.is_done
        found = [board.find_or_start(RETRY, start) for _ in range(3)]
        assert {id(job) for job in found[:2]} == {id(first), id(second)}
        assert found[2] not in (first, second)
        assert board.attached == 2
        other = ClientIdentity("other", is_retry=True, timeout_s=10.0)
        assert board.find_or_start(other, start) not in found
        await board.close()
        assert start.freed == len(start.jobs) == 4

    run(work)


def test_nobody_is_waited_for_for_ever() -> None:
    async def work() -> None:
        board, start = JobBoard(0.01, 0.01), Started()
        keyed = ClientIdentity("body", "key")
        for identity in (SDK, keyed):
            job = board.find_or_start(identity, start)
            board.leave(job, job.listen(), identity, 9.9, False)
            while not job.is_done:
                await asyncio.sleep(0.01)
        assert board.find_or_start(RETRY, start) is not start.jobs[0]
        assert board.find_or_start(keyed, start) is not start.jobs[1]
        await board.close()

    run(work)


def test_a_key_belongs_to_one_request() -> None:
    async def work() -> None:
        board, start = JobBoard(60, 60), Started()
        job = board.find_or_start(ClientIdentity("body", "key"), start)
        assert board.find_or_start(ClientIdentity("body", "key"), start) is job
        with pytest.raises(ApiError, match="another request"):
            board.find_or_start(ClientIdentity("other", "key"), start)
        for i in range(300):
            board.find_or_start(ClientIdentity("body", f"key {i}"), start)
        await settle()
        assert start.freed == 301 - 256  # the oldest, as nobody listens
        await board.close()

    run(work)


def test_a_job_that_fails_says_so_to_its_listeners() -> None:
    async def work() -> None:
        async def broken() -> None:
            raise ValueError("broken")

        board = JobBoard(60, 60)
        job = board.find_or_start(SDK, lambda _: broken())
        queue = job.listen()
        assert await queue.get() is None
        assert isinstance(job.error, ValueError)
        await board.close()

    run(work)
