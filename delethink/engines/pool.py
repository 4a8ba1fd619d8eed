"""Samples chunks on workers: dispatch, retries, health checks, restarts, weight updates and sleep.

``WorkerPool.generate`` is a chunk's way through the pool: wait until the scheduler assigns a
worker, await ``worker.generate``, and on an error try again elsewhere.

The pool uses asyncio only, and runs in one event loop. The function for launching workers is passed
in: ``delethink.engines.ray`` launches Ray actors, and tests launch fakes with faults in virtual
time.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import statistics
from collections.abc import Awaitable, Callable
from typing import Any, cast

from delethink.config import EngineConfig
from delethink.engines.base import WorkerHandle
from delethink.engines.pool_records import Activity, FaultCounts, PendingChunk, WorkerRecord
from delethink.engines.scheduler import Scheduler, rank, slots
from delethink.errors import (
    ConfigError,
    DeadlineError,
    PolicyError,
    UserError,
    WeightSyncError,
    WorkersLostError,
)
from delethink.output import get_logger
from delethink.policy import Completion, Sampling, SchedulingHint, TokenListener
from delethink.types import TokenIds

_logger = get_logger(__name__)

_DISPATCH_DELAY_S = 0.002  # lets the chunks of one moment be assigned together, by rank
_HEALTH_INTERVAL_S = 2.0
_CHECK_INTERVAL_S = 1.0  # between two checks of timeouts
_ERROR_PAUSE_S = 1.0  # rest of a worker after an error; others take the chunks
_MAX_ERROR_ROUNDS = 3  # rests in a row, after which a worker is restarted
_FIRST_BACKOFF_S = 1.0  # doubles with each restart in a row after the first
_MAX_BACKOFF_S = 60.0
_STOP_TIMEOUT_S = 10.0
_METRICS_TIMEOUT_S = 1.0
_MIN_PACE_CHUNKS = 8  # sampled by a worker before its pace counts


class _RetryError(Exception):
    """An attempt at a chunk failed, and another worker may take the chunk."""


class _HandedBackError(_RetryError):
    """A chunk waited at a worker for room in its batch, and waits for any worker again."""


class WorkerPool:
    """Samples chunks on workers, retries failed chunks, and restarts failed workers.

    Args:
        launch: launches the worker of an index; ``WorkerHandle.start`` starts its engine.
        config: number of workers, order of chunks and timeouts.

    Attributes:
        workers: the workers, until the pool is closed.
        max_model_tokens: longest sequence (prompt and new tokens) of the workers.
    """

    def __init__(self, launch: Callable[[int], WorkerHandle], config: EngineConfig) -> None:
        self.workers = [WorkerRecord(i, f"worker {i}") for i in range(config.num_engines)]
        self.max_model_tokens = 0
        self.faults = FaultCounts()
        self._launch, self._config = launch, config
        self._scheduler = Scheduler()
        self._chunks: set[PendingChunk] = set()
        self._dispatch_scheduled = False
        self._closed_by: Exception | None = None  # reason why the pool samples nothing ever again
        self._unsound: Exception | None = None  # reason to sample nothing before the next weights
        self._all_lost_since: float | None = None
        self._service_changed = asyncio.Event()  # a worker came into service, or was given up
        self._awake = asyncio.Event()
        self._awake.set()
        self._sleep_lock, self._update_lock = asyncio.Lock(), asyncio.Lock()
        self._weights: tuple[Any, int] | None = None  # the latest weights and their version
        self._outdated: set[WorkerRecord] = set()  # workers without the weights of a running update
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def num_waiting(self) -> int:
        """Return the number of chunks without a worker."""
        return self._scheduler.num_waiting

    async def generate(
        self,
        prompt_ids: TokenIds,
        max_new_tokens: int,
        sampling: Sampling,
        listener: TokenListener | None = None,
    ) -> Completion:
        """Sample a chunk on any worker; see ``Policy.generate``.

        A listener gets tokens while they are sampled, and the chunk is then not repeated after a
        fault: its caller goes on after the tokens that it has.

        Raises:
            PolicyError: ``max_attempts`` attempts failed, or one with tokens that a listener has;
                the text is the last one's error.
            DeadlineError: a worker had the chunk for longer than ``chunk_timeout``.
            WorkersLostError: no worker is left.
        """
        hint = sampling.hint or SchedulingHint()
        chunk = PendingChunk(
            tokens=len(prompt_ids) + max_new_tokens,
            query=hint.query,
            rank=rank(hint, self._config.order),
            prompt_ids=prompt_ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            task=cast("asyncio.Task[Any]", asyncio.current_task()),
            listener=listener,
        )
        self._chunks.add(chunk)
        is_repeated = False
        try:
            while True:
                if (refusal := self._closed_by or self._unsound) is not None:
                    raise refusal
                if not self._awake.is_set():
                    self._spawn(self.wake())
                try:
                    chunk.assigned = asyncio.get_running_loop().create_future()
                    self._scheduler.submit(chunk, first=is_repeated)
                    self._dispatch_soon()
                    await chunk.assigned
                    return await self._sample(cast(WorkerRecord, chunk.worker), chunk)
                except _RetryError as error:
                    self._count_attempt(chunk, error)
                except asyncio.CancelledError:
                    reason, chunk.interruption = chunk.interruption, None
                    if reason is None or chunk.task.uncancel():
                        raise  # the caller cancelled
                    if not isinstance(reason, _RetryError):
                        raise reason from None
                    self._count_attempt(chunk, reason)
                finally:
                    self._release(chunk)
                is_repeated = True
        finally:
            self._chunks.discard(chunk)

    def _dispatch_soon(self) -> None:
        if not self._dispatch_scheduled:
            self._dispatch_scheduled = True
            asyncio.get_running_loop().call_later(_DISPATCH_DELAY_S, self._dispatch)

    def _dispatch(self) -> None:
        """Assign waiting chunks to workers with free slots."""
        self._dispatch_scheduled = False
        now = asyncio.get_running_loop().time()
        for worker, chunk in self._scheduler.assign():
            assert isinstance(worker, WorkerRecord)
            assert isinstance(chunk, PendingChunk)
            worker.add(chunk, now)
            if not chunk.assigned.done():  # else the caller has just cancelled
                chunk.assigned.set_result(None)

    async def _sample(self, worker: WorkerRecord, chunk: PendingChunk) -> Completion:
        """Sample a chunk; raise ``UserError`` if the request is at fault, else ``_RetryError``."""
        handle, name = worker.handle, str(worker)
        assert handle is not None
        try:
            request = chunk.prompt_ids, chunk.max_new_tokens, chunk.sampling
            if chunk.listener is None:
                completion = await handle.generate(*request)
            else:
                completion = await handle.stream(*request, chunk.pass_on)
        except UserError:
            raise
        except Exception as error:  # a worker can fail in any way
            if worker.handle is handle:
                self._handle_worker_error(worker, error)
            raise _RetryError(f"{name} {_text(error)}") from None
        now = asyncio.get_running_loop().time()
        worker.record_completion(chunk, len(completion.token_ids), now)
        return dataclasses.replace(completion, worker=worker.name)

    def _release(self, chunk: PendingChunk) -> None:
        """Take a chunk from its worker, or out of the queue."""
        if (worker := chunk.worker) is None:
            self._scheduler.withdraw(chunk)
            return
        worker.remove(chunk, asyncio.get_running_loop().time())
        self._scheduler.release(worker, chunk)
        self._dispatch_soon()

    def _count_attempt(self, chunk: PendingChunk, error: _RetryError) -> None:
        """Count a failed attempt, and raise ``PolicyError`` after the last one."""
        if isinstance(error, _HandedBackError):
            self.faults.chunks_handed_back += 1
            return
        chunk.attempts += 1
        if chunk.attempts < self._config.max_attempts or chunk.is_heard:
            self.faults.chunks_rescheduled += 1
            if chunk.is_heard:
                raise PolicyError(str(error)) from None
            return
        self.faults.chunks_failed += 1
        suffix = f" (attempt {chunk.attempts}, the last)" if chunk.attempts > 1 else ""
        raise PolicyError(f"{error}{suffix}") from None

    def _handle_worker_error(self, worker: WorkerRecord, error: Exception) -> None:
        """Pause a worker after an error; restart a dead one, or one with errors only."""
        if not worker.in_service:
            return
        if isinstance(error, ConnectionError):
            self._mark_lost(worker, _text(error))
            return
        if worker.resting:
            return
        worker.error_rounds += 1
        has_others = any(other.in_service and other is not worker for other in self.workers)
        if has_others and worker.error_rounds >= _MAX_ERROR_ROUNDS:
            self._mark_lost(worker, f"only raised, {worker.error_rounds} times in a row")
            return
        worker.resting = True
        self._pause(worker)
        asyncio.get_running_loop().call_later(_ERROR_PAUSE_S, self._end_rest, worker, worker.handle)

    def _end_rest(self, worker: WorkerRecord, handle: WorkerHandle | None) -> None:
        if worker.handle is handle:
            worker.resting = False
            self._resume(worker)

    def _pause(self, worker: WorkerRecord) -> None:
        """Assign no more chunks to a worker; those in flight continue."""
        if worker.in_service:
            self._scheduler.pause(worker)

    def _resume(self, worker: WorkerRecord) -> None:
        """Assign chunks to a worker again, unless there is another reason to wait."""
        outdated = self._unsound is not None or worker in self._outdated
        held_back = outdated or worker.resting or worker.missed_heartbeat
        if worker.in_service and self._awake.is_set() and not held_back:
            self._scheduler.resume(worker)
            self._dispatch_soon()

    async def start(self) -> None:
        """Start all workers.

        Raises:
            UserError: raised by a worker.
            ConfigError: a worker did not start; the text says why.
        """
        results = await asyncio.gather(
            *[self._start_worker(worker) for worker in self.workers], return_exceptions=True
        )
        for worker, result in zip(self.workers, results, strict=True):
            if isinstance(result, UserError):
                raise result
            if isinstance(result, BaseException):
                raise ConfigError(f"{worker} did not start: {_text(result)}") from None
        for worker in self.workers:
            self._spawn(self._supervise(worker))
        self._spawn(self._check_timeouts())

    async def close(self) -> None:
        """Stop all workers and fail the chunks in flight."""
        self._end(PolicyError("the pool is closed"))
        current = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not current]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(TimeoutError):  # late workers are killed below
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                stops = [worker.handle.stop() for worker in self.workers if worker.handle]
                await asyncio.gather(*stops, return_exceptions=True)
        self.kill_workers()

    def kill_workers(self) -> None:
        """Kill all workers; works also after the event loop has stopped."""
        for worker in self.workers:
            self._kill(worker)
        self.workers = []

    async def _supervise(self, worker: WorkerRecord) -> None:
        """Restart a worker after each loss, up to ``max_restarts`` times in a row."""
        while True:
            self._record_failure(worker, await worker.lost)
            while not worker.in_service:
                if self._closed_by is not None:
                    return
                if worker.failures > self._config.max_restarts:
                    worker.given_up = True
                    self._service_changed.set()
                    if all(other.given_up for other in self.workers):
                        times = self._config.max_restarts
                        self._end_without_workers(f"each was restarted {times} times")
                    return
                # No wait after a life with a sampled chunk.
                backoff_s = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** (worker.failures - 2))
                await asyncio.sleep(backoff_s if worker.failures > 1 else 0)
                self.faults.restarts += 1
                worker.restarts += 1
                try:
                    await self._start_worker(worker)
                except Exception as error:  # an engine can fail to start in any way
                    self._record_failure(worker, f"did not start: {_text(error)}")

    async def _start_worker(self, worker: WorkerRecord) -> None:
        """Start an engine, load the current weights, and put the worker into service."""
        await self._awake.wait()  # while the pool sleeps, the trainer has the GPU
        worker.handle = handle = self._launch(worker.index)
        state = await handle.start()
        loaded = None
        while self._unsound is None and self._weights is not None and loaded != self._weights[1]:
            weights, loaded = self._weights
            await self._load_weights(handle, weights, loaded)
        worker.start_life(state, asyncio.get_running_loop().time())
        self.max_model_tokens = state.max_model_tokens
        num_slots = self._config.chunks_per_engine or slots(state.batch_size)
        self._scheduler.add_worker(worker, num_slots)
        if self._unsound or not self._awake.is_set():
            self._pause(worker)
        worker.health = self._spawn(self._check_health(worker, handle))
        self._all_lost_since = None
        self._service_changed.set()
        self._dispatch_soon()

    def _mark_lost(self, worker: WorkerRecord, reason: str) -> None:
        """End the life of a worker: others take its chunks, and ``_supervise`` restarts it."""
        if not worker.in_service:
            return
        most = sum(chunk.max_new_tokens for chunk in worker.chunks)
        self.faults.tokens_lost += min(most, max(0, worker.counts.tokens - worker.returned_tokens))
        self._retry_chunks(worker, reason)
        worker.in_service = False
        self._scheduler.remove_worker(worker)
        worker.health.cancel()
        if not any(other.in_service for other in self.workers):
            self._all_lost_since = asyncio.get_running_loop().time()
        if not worker.lost.done():  # else the pool is being closed
            worker.lost.set_result(reason)

    def _retry_chunks(self, worker: WorkerRecord, reason: str) -> None:
        """Let other workers sample the chunks of a worker, the oldest first."""
        error, current = _RetryError(f"{worker} {reason}"), asyncio.current_task()
        for chunk in reversed(list(worker.chunks)):  # each goes to the front of the queue
            self._release(chunk)
            if chunk.task is not current:  # the current one retries by itself
                chunk.interrupt(error)

    def _record_failure(self, worker: WorkerRecord, reason: str) -> None:
        _logger.warning("%s %s", worker, reason)
        worker.reason = reason
        worker.failures += 1
        self._kill(worker)

    def _kill(self, worker: WorkerRecord) -> None:
        handle, worker.handle = worker.handle, None
        worker.pid = 0
        worker.in_service = False
        if handle is not None:
            handle.kill()

    def _end_without_workers(self, why: str) -> None:
        last = "; ".join(f"{worker.name} {worker.reason}" for worker in self.workers)
        text = f"all {len(self.workers)} workers are lost ({why}); last: {last}"
        self._end(WorkersLostError(text))

    def _end(self, error: Exception) -> None:
        """Sample nothing ever again."""
        self._closed_by = self._closed_by or error
        self._service_changed.set()
        for chunk in self._chunks:
            chunk.interrupt(self._closed_by)

    async def _check_health(self, worker: WorkerRecord, handle: WorkerHandle) -> None:
        """Call ``health`` of a worker at intervals; after an exception the worker is lost."""
        while True:
            await asyncio.sleep(_HEALTH_INTERVAL_S)
            try:
                counts = await handle.health()
            except Exception as error:  # a worker can fail in any way
                self._mark_lost(worker, _text(error))
                return
            worker.update_health(counts, asyncio.get_running_loop().time())
            if worker.missed_heartbeat:
                worker.missed_heartbeat = False
                self._resume(worker)

    async def _check_timeouts(self) -> None:
        """Apply all timeouts, at intervals."""
        while True:
            await asyncio.sleep(_CHECK_INTERVAL_S)
            now = asyncio.get_running_loop().time()
            for worker in self.workers:
                if worker.in_service:
                    self._check_worker(worker, now)
                if worker.in_service:
                    self._check_chunks(worker, now)
            since = self._all_lost_since
            if since is not None and now - since > self._config.lost_timeout:
                self._end_without_workers(f"for {now - since:.0f} s")

    def _check_worker(self, worker: WorkerRecord, now: float) -> None:
        """Apply ``heartbeat_timeout`` and ``hang_timeout``."""
        silent, stalled = now - worker.heard, now - worker.progressed
        if silent > self._config.hang_timeout:
            self._mark_lost(worker, f"hangs: no heartbeat for {silent:.0f} s")
        elif stalled > self._config.hang_timeout and worker.chunks:
            self._mark_lost(worker, f"hangs: its engine made no step for {stalled:.0f} s")
        elif silent > self._config.heartbeat_timeout and not worker.missed_heartbeat:
            others = (other for other in self.workers if other is not worker)
            if any(other.in_service and not other.missed_heartbeat for other in others):
                worker.missed_heartbeat = True
                self._pause(worker)
                self._retry_chunks(worker, f"had no heartbeat for {silent:.0f} s")

    def _check_chunks(self, worker: WorkerRecord, now: float) -> None:
        """Apply ``chunk_timeout`` and ``slow_factor``."""
        timeout, hang_timeout = self._config.chunk_timeout, self._config.hang_timeout
        pace = self._pace_of_others(worker)
        for chunk in list(worker.chunks):  # the oldest first
            age = now - chunk.started
            if age <= min(hang_timeout, timeout or hang_timeout):
                return
            if timeout is not None and age > timeout:
                self.faults.chunk_timeouts += 1
                text = f"the chunk was not done after {timeout:g} s (chunk_timeout) on {worker}"
                chunk.interrupt(DeadlineError(text))
                continue
            expected = self._config.slow_factor * chunk.max_new_tokens * pace
            if pace and age > max(expected, hang_timeout):
                reason = f"is slow: {age:.0f} s for a chunk, and the others need {expected:.0f} s"
                self._mark_lost(worker, reason)
                return

    def _pace_of_others(self, worker: WorkerRecord) -> float:
        """Return the median seconds per token of the other workers; 0 if nothing is known."""
        known = [
            other.pace
            for other in self.workers
            if other is not worker and other.in_service and other.paced_chunks >= _MIN_PACE_CHUNKS
        ]
        return statistics.median(known) if known else 0.0

    async def update_weights(self, weights: Any, version: int) -> None:
        """Load weights into all workers, each as soon as the chunks in its batch are done.

        Chunks of later calls of ``generate`` come from these weights. Chunks that wait at a worker
        go back to the queue first. A failed worker is restarted with the new weights; one worker
        with them is enough.

        Raises:
            WeightSyncError: all workers refused the weights; nothing is sampled before others come.
            WorkersLostError: no worker is left.
        """
        async with self._update_lock:
            previous, self._weights = self._weights, (weights, version)
            self._outdated = set(self.workers)
            for worker in self.workers:
                self._pause(worker)
            try:
                await self.wake()
                refusals = await self._update_until_one_runs(weights, version)
                if refusals:
                    self._weights = previous
                    reason = f"takes no requests since an update of weights {refusals[0][1]}"
                    self._unsound = PolicyError(reason)
                    for chunk in self._chunks:
                        chunk.interrupt(self._unsound)
                    texts = "; ".join(f"{worker} {text}" for worker, text in refusals)
                    raise WeightSyncError(
                        f"{len(refusals)} of {len(self.workers)} workers did not load the weights "
                        f"of version {version}: {texts}"
                    )
                self._unsound = None
            finally:
                self._outdated.clear()
                for worker in self.workers:
                    self._resume(worker)

    async def _update_until_one_runs(
        self, weights: Any, version: int
    ) -> list[tuple[WorkerRecord, str]]:
        """Update workers until one runs the weights; return the refusals if none took them."""
        while True:
            self._service_changed.clear()
            if self._closed_by is not None:
                raise self._closed_by
            updated = [(w, w.handle) for w in self.workers if w.in_service]
            results = await asyncio.gather(
                *[self._update_worker(worker, weights, version) for worker, _ in updated]
            )
            refusals = [
                (worker, result)
                for (worker, handle), result in zip(updated, results, strict=True)
                if isinstance(result, str) and worker.in_service and worker.handle is handle
            ]
            if True in results:
                for worker, reason in refusals:
                    self._mark_lost(worker, reason)
                return []
            if refusals:
                return refusals
            await self._service_changed.wait()  # a restarted worker has loaded the weights

    async def _update_worker(self, worker: WorkerRecord, weights: Any, version: int) -> str | bool:
        """Return ``True`` if a worker has loaded the weights, or the reason of a refusal."""
        handle = worker.handle
        self._pause(worker)
        await self._hand_back(worker)
        await worker.idle.wait()
        if handle is None or worker.handle is not handle or not worker.in_service:
            return False  # restarted, with these weights
        try:
            await self._load_weights(handle, weights, version)
        except WeightSyncError as error:
            return str(error)
        except Exception as error:  # a worker can fail in any way
            if worker.handle is handle:
                self._mark_lost(worker, _text(error))
            return False
        worker.heard = worker.progressed = asyncio.get_running_loop().time()
        self._outdated.discard(worker)
        self._resume(worker)
        return worker.in_service

    async def _hand_back(self, worker: WorkerRecord) -> None:
        """Put the chunks that wait at a worker back into the queue: its newest ones."""
        if len(worker.chunks) <= 1:
            return
        with contextlib.suppress(Exception):  # the numbers of the last heartbeat do too
            async with asyncio.timeout(_METRICS_TIMEOUT_S):
                await self._refresh(worker)
        chunks = list(worker.chunks)
        number = max(len(chunks) - worker.batch_size, min(worker.counts.waiting, len(chunks)))
        error = _HandedBackError(f"{worker} had no room for it before an update of weights")
        for chunk in reversed(chunks[len(chunks) - max(0, number) :]):
            if not chunk.is_heard:
                self._release(chunk)
                chunk.interrupt(error)

    async def _refresh(self, worker: WorkerRecord) -> None:
        """Ask a worker for its counters."""
        if not worker.in_service or (handle := worker.handle) is None:
            return
        counts = await handle.health()
        if worker.in_service and worker.handle is handle:
            worker.update_health(counts, asyncio.get_running_loop().time())

    async def _load_weights(self, handle: WorkerHandle, weights: Any, version: int) -> None:
        timeout = self._config.weight_sync_timeout
        try:
            async with asyncio.timeout(timeout):
                answer = await handle.update_weights(weights, version)
        except TimeoutError:
            raise RuntimeError(
                f"did not load the weights of version {version} within {timeout:g} s"
            ) from None
        if answer != version:
            raise RuntimeError(f"runs version {answer} of the weights instead of {version}")

    async def sleep(self) -> None:
        """Free the GPUs once no chunk is in flight; the next chunk or update wakes them."""
        async with self._sleep_lock:
            self._awake.clear()
            await self._for_each_in_service(self._put_to_sleep)

    async def wake(self) -> None:
        """Take the GPUs back; does nothing while the workers are awake."""
        async with self._sleep_lock:
            if self._awake.is_set():
                return
            await self._for_each_in_service(lambda _, handle: handle.wake())
            self._awake.set()
        for worker in self.workers:
            self._resume(worker)

    async def _put_to_sleep(self, worker: WorkerRecord, handle: WorkerHandle) -> None:
        self._pause(worker)
        await worker.idle.wait()
        if worker.in_service:
            await handle.sleep()

    async def _for_each_in_service(
        self, call: Callable[[WorkerRecord, WorkerHandle], Awaitable[None]]
    ) -> None:
        workers = [(w, w.handle) for w in self.workers if w.in_service and w.handle]
        results = await asyncio.gather(*[call(*pair) for pair in workers], return_exceptions=True)
        for (worker, handle), result in zip(workers, results, strict=True):
            if isinstance(result, BaseException) and worker.handle is handle:
                self._mark_lost(worker, _text(result))

    async def take_metrics(self) -> dict[str, float]:
        """Return the metrics since the last call.

        Keys are ``<name>`` for the pool and ``worker <i>/<name>`` for a worker:

        - ``queue``: chunks without a worker, or chunks of the worker, now.
        - ``workers``: workers in service, now.
        - ``chunks``: sampled chunks.
        - ``restarts``: restarts; those of a worker count from the beginning.
        - ``batch_occupancy``, ``tokens_per_second``, ``prefix_cache_hit_rate``: see ``Activity``.
        - the fields of ``FaultCounts``.
        """
        calls = [self._refresh(worker) for worker in self.workers]
        with contextlib.suppress(TimeoutError):  # late answers are left out
            async with asyncio.timeout(_METRICS_TIMEOUT_S):
                await asyncio.gather(*calls, return_exceptions=True)
        now = asyncio.get_running_loop().time()
        faults, self.faults = self.faults, FaultCounts()
        metrics: dict[str, float] = {
            "queue": self.num_waiting,
            "workers": sum(worker.in_service for worker in self.workers),
            **dataclasses.asdict(faults),
        }
        activities = [worker.take_activity(now) for worker in self.workers]
        for worker, activity in zip(self.workers, activities, strict=True):
            own = {"queue": len(worker.chunks), "chunks": activity.chunks, **activity.rates()}
            own["restarts"] = worker.restarts
            metrics |= {f"{worker.name}/{name}": value for name, value in own.items()}
        total = Activity.total(activities)
        return metrics | {"chunks": total.chunks} | total.rates()

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            _logger.error("the pool has a bug", exc_info=error)
            self._end(error)


def _text(error: BaseException) -> str:
    return str(error) or repr(error)
