"""Keeps workers at work: gives chunks to them, notices when one fails, and brings it back.

This is asyncio alone. What a worker is (``WorkerHandle``) is handed in, so that every fault can be
played against fakes in virtual time; ``ray_pool`` hands in Ray actors. All of a pool runs in one
event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

from delethink.config import Order
from delethink.engines.exchange import Answer, EngineCounts, Job, Report, WorkerHandle, WorkerState
from delethink.engines.pool_settings import PoolSettings
from delethink.engines.pool_sleep import PoolSleep
from delethink.engines.pool_watch import PoolWatch
from delethink.engines.pool_weights import PoolWeights
from delethink.engines.pool_worker import Chunk, Counts, Outcome, PoolWorker, say
from delethink.engines.scheduler import Lease, Rank, Request, Scheduler
from delethink.errors import (
    ConfigError,
    DeadlineError,
    PolicyError,
    UserError,
    WorkersLostError,
)
from delethink.policy import Completion, Sampling, SchedulingHint
from delethink.types import TokenIds

_logger = logging.getLogger(__name__)

_GATHER_S = 0.002  # for which chunks are collected before they are given out
_TICK_S = 1.0  # between two looks at deadlines
_MOST_FAILING_REPORTS = 3  # in a row, before a worker that only raises is restarted
_PAUSE_S = 1.0  # after a worker raised: others get the chunk
_FIRST_BACKOFF_S = 1.0  # doubles from the second restart in a row without a chunk in between
_LAST_BACKOFF_S = 60.0
_STOP_TIMEOUT_S = 10.0
_PACED_CHUNKS = 32  # of a worker, over which its pace is smoothed


class WorkerPool:
    """Samples chunks on workers that may fail.

    Args:
        launch: begins a life of the worker of an index.
        num_workers: how many there are.
        settings: how they are treated.

    Raises:
        ConfigError: an impossible setting.
    """

    def __init__(
        self, launch: Callable[[int], WorkerHandle], num_workers: int, settings: PoolSettings
    ) -> None:
        if num_workers < 1:
            raise ConfigError(f"num_workers must be at least 1, got {num_workers}")
        self.workers = [PoolWorker(i, f"worker {i}") for i in range(num_workers)]
        self.max_model_tokens = 0
        self.counts = Counts()
        self._launch, self._settings = launch, settings
        self._scheduler = Scheduler()
        self._chunks: dict[Hashable, Chunk] = {}  # by key
        self._keys = itertools.count(1)
        self._by_life: dict[Hashable, PoolWorker] = {}
        self._weights = PoolWeights(self, settings.weight_sync_timeout)
        self.ended: Exception | None = None  # why nothing is sampled ever again
        self._gone_since: float | None = None
        self._assigning = False
        self._watch, self._sleep = PoolWatch(self, settings), PoolSleep(self)
        self.changed = asyncio.Event()  # a worker came into service, or was given up
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Starts all workers.

        Raises:
            UserError: of a worker, as it is.
            ConfigError: one did not start; the text is what it said.
        """
        states = await asyncio.gather(
            *[self._begin(worker) for worker in self.workers], return_exceptions=True
        )
        for worker, problem in zip(self.workers, states, strict=True):
            if isinstance(problem, UserError):
                raise problem
            if isinstance(problem, BaseException):
                raise ConfigError(f"{worker} did not start: {say(problem)}") from None
        for worker in self.workers:
            self._spawn(self._keep(worker))
        self._spawn(self._watch_over_all())

    async def close(self) -> None:
        """Ends all workers; who still waits is told so."""
        self._end(PolicyError("the pool is closed"))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        handles = [worker.handle for worker in self.workers if worker.handle is not None]
        with contextlib.suppress(TimeoutError):  # in time or not, they are killed next
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                stops = [handle.stop() for handle in handles]
                await asyncio.gather(*stops, return_exceptions=True)
        self.abandon()

    def abandon(self) -> None:
        """Kills the workers that there are. For when its event loop runs no more, too."""
        for worker in self.workers:
            self._forget(worker)
        self.workers = []

    async def _keep(self, worker: PoolWorker) -> None:
        """Sees a worker that has begun through all its lives."""
        while True:
            assert worker.lost is not None
            reason = await worker.lost
            self._bury(worker, reason)
            while not worker.in_service:
                if self.ended is not None:
                    return
                if worker.fruitless > self._settings.max_restarts:
                    self._give_up(worker)
                    return
                await asyncio.sleep(_backoff(worker.fruitless))
                self.counts.restarts += 1
                worker.restarts += 1
                try:
                    await self._begin(worker)
                except Exception as error:  # whatever keeps an engine from starting
                    self._bury(worker, f"did not start: {say(error)}")

    async def _begin(self, worker: PoolWorker) -> None:
        """A new life: an engine with the current weights, in service when this returns."""
        await self._sleep.awake.wait()  # while it sleeps, its GPU is somebody else's
        worker.life += 1
        worker.handle = handle = self._launch(worker.index)
        state = await handle.start()
        await self._weights.catch_up(worker)
        self._serve(worker, state)

    def _serve(self, worker: PoolWorker, state: WorkerState) -> None:
        loop = asyncio.get_running_loop()
        worker.pid = state.pid
        worker.lost = loop.create_future()
        worker.heard = worker.progressed = loop.time()
        worker.counts = worker.taken = EngineCounts()
        worker.jobs, worker.dropped = [], []
        worker.returned_tokens = worker.failing_reports = 0
        worker.pace, worker.paced = 0.0, 0
        worker.rest(loop.time())
        worker.in_service, worker.silent = True, False
        self.max_model_tokens = state.max_model_tokens
        self._scheduler.add_worker(worker.key, *self._settings.room(state.batch_size))
        self._by_life[worker.key] = worker
        if self._weights.unsound or not self._sleep.awake.is_set():
            self.hold(worker)
        self._gone_since = None
        self.changed.set()
        assert worker.handle is not None
        worker.handle.attend(
            partial(self._hear, worker, worker.life), partial(self._fall, worker, worker.life)
        )
        self._assign_soon()

    def lose(self, worker: PoolWorker, reason: str) -> None:
        """Ends the present life of a worker; its chunks go to others at once."""
        if worker.lost is None or worker.lost.done():
            return
        worker.lost.set_result(reason)
        self._take_back(worker, reason)

    def _take_back(self, worker: PoolWorker, reason: str) -> None:
        worker.in_service = False
        ended = self._scheduler.remove_worker(worker.key)
        self._by_life.pop(worker.key, None)
        worker.tokens_in_flight = 0
        worker.rest(asyncio.get_running_loop().time())
        self.counts.chunks_rescheduled += len(ended)
        # What was dropped was never returned either: so no more than these could have sampled.
        most = sum(self._chunks[lease.request.key].max_new_tokens for lease in ended)
        sampled = max(0, worker.counts.tokens - worker.returned_tokens)
        self.counts.tokens_lost += min(most, sampled)
        for lease in ended:
            self._count_attempt(lease, f"{worker} {reason}")
        if not any(other.in_service for other in self.workers):
            self._gone_since = asyncio.get_running_loop().time()
        self._assign_soon()

    def _bury(self, worker: PoolWorker, reason: str) -> None:
        _logger.warning("%s %s", worker, reason)
        worker.reason = reason
        worker.fruitless += 1
        self._forget(worker)

    def _forget(self, worker: PoolWorker) -> None:
        handle, worker.handle = worker.handle, None
        worker.pid = 0
        worker.in_service = False
        if handle is not None:
            handle.kill()

    def _give_up(self, worker: PoolWorker) -> None:
        worker.given_up = True
        self.changed.set()
        if all(other.given_up for other in self.workers):
            self._end_without_workers(f"each was restarted {self._settings.max_restarts} times")

    def _end_without_workers(self, why: str) -> None:
        said = "; ".join(f"{worker.name} {worker.reason}" for worker in self.workers)
        self._end(
            WorkersLostError(f"all {len(self.workers)} workers are lost ({why}). Last: {said}")
        )

    def _end(self, why: Exception) -> None:
        self.ended = self.ended or why
        self.changed.set()
        self.fail_all(self.ended)

    def fail_all(self, why: Exception) -> None:
        """Tells all who wait for a chunk that none will come."""
        for key in list(self._chunks):
            if (lease := self._scheduler.withdraw(key)) is not None:
                self._drop(lease)
            self._chunks.pop(key).deliver(why)

    # -- chunks --------------------------------------------------------------------------------

    def submit(self, chunk: Chunk) -> None:
        """Lets a chunk be sampled; ``chunk.deliver`` is told what came out, once."""
        if (why := self.ended or self._weights.unsound) is not None:
            chunk.deliver(why)
            return
        if not self._sleep.awake.is_set():
            self._spawn(self.wake())
        chunk.key = next(self._keys)
        self._chunks[chunk.key] = chunk
        progress = chunk.sampling.hint or SchedulingHint()
        self._scheduler.submit(
            Request(
                chunk.key,
                len(chunk.prompt_ids) + chunk.max_new_tokens,
                progress.query,
                rank_of(progress, self._settings.order),
            )
        )
        self._assign_soon()

    def withdraw(self, chunk: Chunk) -> None:
        """Nobody waits for a chunk any more."""
        if self._chunks.pop(chunk.key, None) is not None:
            lease = self._scheduler.withdraw(chunk.key)
            if lease is not None:
                self._drop(lease)

    async def sample(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """The policy protocol, for callers in the pool's own event loop."""
        answer: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()

        def deliver(outcome: Outcome) -> None:
            settle(answer, outcome)

        chunk = Chunk(prompt_ids, max_new_tokens, sampling, deliver)
        self.submit(chunk)
        try:
            return await answer
        finally:
            self.withdraw(chunk)

    def _assign_soon(self) -> None:
        if not self._assigning:
            self._assigning = True
            asyncio.get_running_loop().call_later(_GATHER_S, self._assign)

    def _assign(self) -> None:
        self._assigning = False
        now = asyncio.get_running_loop().time()
        for lease in self._scheduler.assign(now):
            worker, chunk = self._by_life[lease.worker], self._chunks[lease.request.key]
            worker.jobs.append(
                Job.pack(lease.number, chunk.prompt_ids, chunk.max_new_tokens, chunk.sampling)
            )
            worker.tokens_in_flight += lease.request.tokens
            worker.begin(now)
        for worker in self.workers:
            if worker.in_service and (worker.jobs or worker.dropped):
                self._send(worker)

    def _send(self, worker: PoolWorker) -> None:
        assert worker.handle is not None
        jobs, worker.jobs = worker.jobs, []
        dropped, worker.dropped = worker.dropped, []
        try:
            worker.handle.send(jobs, dropped)
        except Exception as error:  # however a worker fails, it is lost
            self.lose(worker, say(error))

    def _drop(self, lease: Lease) -> None:
        """Takes a chunk back from a worker whose lease of it has ended."""
        worker = self._by_life.get(lease.worker)
        if worker is not None:
            worker.dropped.append(lease.number)
            self._freed(worker)

    def _freed(self, worker: PoolWorker) -> None:
        """A worker has fewer chunks."""
        worker.tokens_in_flight = self._scheduler.tokens(worker.key)
        if not worker.tokens_in_flight:
            worker.rest(asyncio.get_running_loop().time())
        self._assign_soon()

    # -- reports -------------------------------------------------------------------------------

    def _fall(self, worker: PoolWorker, life: int, problem: Exception) -> None:
        """However a worker fails, it is lost."""
        if worker.life == life:
            self.lose(worker, say(problem))

    def _hear(self, worker: PoolWorker, life: int, report: Report) -> None:
        if worker.life != life or worker.is_dead:
            self.counts.late_answers += len(report.answers)
            return
        try:
            self._take_in(worker, report)
        except Exception as error:  # else the event loop would only log it, and the pool go on
            self._has_a_bug(error)

    def _take_in(self, worker: PoolWorker, report: Report) -> None:
        now = asyncio.get_running_loop().time()
        worker.heard = now
        if worker.silent:
            worker.silent = False
            self.release(worker)
        if report.counts.steps != worker.counts.steps or worker.idle.is_set():
            worker.progressed = now
        worker.counts = report.counts
        raised = []
        for answer in report.answers:
            if answer.error is not None and not isinstance(answer.error, UserError):
                raised.append(answer)
            elif (lease := self._scheduler.finish(answer.number)) is None:
                self.counts.late_answers += 1
            else:
                self._deliver(worker, lease, answer, now)
        # It may be the end of the worker, but not of what it has done.
        failed = sum(self._fail(worker, answer) for answer in raised)
        if report.answers and not worker.is_dead:
            self._freed(worker)
            self._judge(worker, failed, len(report.answers))

    def _deliver(self, worker: PoolWorker, lease: Lease, answer: Answer, now: float) -> None:
        num_tokens = answer.num_tokens
        worker.completions += 1
        worker.given_chunks += 1
        worker.fruitless = 0
        worker.returned_tokens += num_tokens
        pace = (now - lease.given) / max(1, num_tokens)
        worker.paced += 1
        worker.pace += (pace - worker.pace) / min(worker.paced, _PACED_CHUNKS)
        chunk = self._chunks.pop(lease.request.key)
        try:
            outcome: Outcome = answer.error or answer.completion()
        except PolicyError as error:  # what the engine returned makes no completion
            outcome = error
        chunk.deliver(outcome)

    def _fail(self, worker: PoolWorker, answer: Answer) -> int:
        """A worker raised over a chunk, which others may try."""
        lease = self._scheduler.give_back(answer.number)
        if lease is None:
            self.counts.late_answers += 1
            return 0
        assert answer.error is not None
        if isinstance(answer.error, ConnectionError):
            self.lose(worker, say(answer.error))
        else:
            self.counts.chunks_rescheduled += 1
        self._count_attempt(lease, f"{worker} {say(answer.error)}")
        return 1

    def _count_attempt(self, lease: Lease, reason: str) -> None:
        """A chunk was not sampled; where that has happened too often, it is data."""
        chunk = self._chunks.get(lease.request.key)
        if chunk is None:
            return
        chunk.attempts += 1
        if chunk.attempts >= self._settings.max_attempts:
            self.counts.chunks_failed += 1
            self._scheduler.withdraw(chunk.key)
            del self._chunks[chunk.key]
            tries = f" (attempt {chunk.attempts}, the last)" if chunk.attempts > 1 else ""
            chunk.deliver(PolicyError(f"{reason}{tries}"))

    def _judge(self, worker: PoolWorker, failed: int, answers: int) -> None:
        """Who raises is left alone for a moment, and restarted if it does nothing else."""
        if not failed:
            worker.failing_reports = 0
            return
        worker.failing_reports = worker.failing_reports + 1 if failed == answers else 0
        others = any(other.in_service and other is not worker for other in self.workers)
        if others and worker.failing_reports >= _MOST_FAILING_REPORTS:
            self.lose(worker, f"only raised, {worker.failing_reports} times in a row")
            return
        self.hold(worker)
        asyncio.get_running_loop().call_later(_PAUSE_S, self._resume, worker, worker.life)

    def _resume(self, worker: PoolWorker, life: int) -> None:
        if worker.life == life:
            self.release(worker)

    # -- deadlines -----------------------------------------------------------------------------

    async def _watch_over_all(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_TICK_S)
            self._watch.look(loop.time())
            if self._gone_since is not None and self.ended is None:
                gone = loop.time() - self._gone_since
                if gone > self._settings.lost_timeout:
                    self._end_without_workers(f"for {gone:.0f} s")

    def held_by(self, worker: PoolWorker) -> list[tuple[Lease, Chunk]]:
        """The chunks that a worker has, the oldest first."""
        leases = self._scheduler.leases(worker.key)
        return [(lease, self._chunks[lease.request.key]) for lease in leases]

    def suspect(self, worker: PoolWorker, silence: float) -> None:
        """Gives the chunks of a silent worker to others, who may be done before it is given up."""
        worker.silent = True
        self.hold(worker)
        for lease in reversed(self._scheduler.leases(worker.key)):  # the oldest is to be the first
            self._scheduler.give_back(lease.number)
            self._drop(lease)
            self.counts.chunks_rescheduled += 1
            self._count_attempt(lease, f"{worker} gave no sign of life for {silence:.0f} s")

    def time_out(self, worker: PoolWorker, lease: Lease, seconds: float) -> None:
        """Gives a chunk up for good: its trace is data."""
        self._scheduler.finish(lease.number)
        self._drop(lease)
        self.counts.chunk_timeouts += 1
        chunk = self._chunks.pop(lease.request.key)
        chunk.deliver(
            DeadlineError(f"the chunk was not done after {seconds:g} s (chunk_timeout) at {worker}")
        )

    # -- weights and sleep -------------------------------------------------------------------------

    async def update_weights(self, weights: Any, version: int) -> None:
        """Gives weights to all workers, each as soon as it has no chunk in flight.

        Returns when all that are in service run them. A worker that fails over it is restarted with
        the new weights; it is enough that one runs them.

        Raises:
            WeightSyncError: all workers refused them; no chunk is sampled until others come.
            WorkersLostError: there is no worker.
        """
        await self.wake()
        await self._weights.update(weights, version)

    def hold(self, worker: PoolWorker) -> None:
        """Gives a worker no further chunk; those that it has go on."""
        if worker.in_service:
            self._scheduler.pause(worker.key)

    def release(self, worker: PoolWorker) -> None:
        """Gives a worker chunks again, where nothing else speaks against it."""
        held = self._weights.holds(worker) or not self._sleep.awake.is_set()
        if worker.in_service and not (held or worker.silent):
            self._scheduler.resume(worker.key)
            self._assign_soon()

    async def sleep(self) -> None:
        """Frees the GPUs of all workers, once no chunk is in flight.

        The next chunk, or new weights, wake them.
        """
        await self._sleep.begin()

    async def wake(self) -> None:
        """Ends sleep."""
        await self._sleep.end()

    # -- inside --------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Chunks that no worker has."""
        return self._scheduler.num_waiting

    def chunks_at(self, worker: PoolWorker) -> int:
        """Chunks that a worker has."""
        return len(self._scheduler.leases(worker.key))

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (problem := task.exception()) is not None:
            self._has_a_bug(problem)

    def _has_a_bug(self, problem: BaseException) -> None:
        _logger.error("the pool has a bug", exc_info=problem)
        self._end(problem if isinstance(problem, Exception) else RuntimeError(repr(problem)))


def rank_of(progress: SchedulingHint, order: Order) -> Rank:
    """What is sampled first: a lower batch, then the longest rest of a trace where it is known.

    Where it is not, "breadth" takes the trace with the fewest chunks, whose rest may be the
    longest, and "depth" the one with the most.
    """
    if progress.expected_chunks is not None:
        rest = max(1.0, progress.expected_chunks - progress.num_chunks)
    else:
        rest = progress.max_chunks - progress.num_chunks
        if order == "depth":
            rest = progress.num_chunks
    return progress.batch, -float(round(rest))


def settle(answer: asyncio.Future[Completion], outcome: Outcome) -> None:
    """Gives an outcome to who waits for it, if anybody still does."""
    if answer.done():
        return
    if isinstance(outcome, Exception):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)


def _backoff(fruitless: int) -> float:
    """Seconds before a start: none after a life that was of use."""
    if fruitless <= 1:
        return 0.0
    seconds: float = _FIRST_BACKOFF_S * 2 ** (fruitless - 2)
    return min(_LAST_BACKOFF_S, seconds)
