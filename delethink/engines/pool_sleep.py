"""Workers that share their GPUs with a trainer: they sleep while it trains."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from delethink.engines.pool_worker import PoolWorker, say


class SleepingPool(Protocol):
    """What sleep needs of a pool."""

    workers: list[PoolWorker]

    def hold(self, worker: PoolWorker) -> None:
        """Gives a worker no further chunk; those that it has go on."""
        ...

    def release(self, worker: PoolWorker) -> None:
        """Gives a worker chunks again, where nothing else speaks against it."""
        ...

    def lose(self, worker: PoolWorker, reason: str) -> None:
        """Ends the present life of a worker."""
        ...


class PoolSleep:
    """Puts the workers of a pool to sleep and wakes them.

    Args:
        pool: whose.

    Attributes:
        awake: set while the workers have their GPUs.
    """

    def __init__(self, pool: SleepingPool) -> None:
        self.awake = asyncio.Event()
        self.awake.set()
        self._pool = pool
        self._changing = asyncio.Lock()

    async def begin(self) -> None:
        """Frees the GPUs of all workers, once no chunk is in flight."""
        async with self._changing:
            self.awake.clear()
            await self._all(self._put_to_sleep)

    async def end(self) -> None:
        """Gives them back; does nothing where they are awake."""
        async with self._changing:
            if self.awake.is_set():
                return
            await self._all(self._wake_up)
            self.awake.set()
        for worker in self._pool.workers:
            self._pool.release(worker)

    async def _put_to_sleep(self, worker: PoolWorker) -> None:
        self._pool.hold(worker)
        await worker.idle.wait()
        if worker.in_service and worker.handle is not None:
            await worker.handle.sleep()

    async def _wake_up(self, worker: PoolWorker) -> None:
        if worker.handle is not None:
            await worker.handle.wake()

    async def _all(self, act: Callable[[PoolWorker], Awaitable[None]]) -> None:
        lives = [(worker, worker.life) for worker in self._pool.workers if worker.in_service]
        done = await asyncio.gather(*[act(w) for w, _ in lives], return_exceptions=True)
        for (worker, life), problem in zip(lives, done, strict=True):
            if isinstance(problem, BaseException) and worker.life == life:
                self._pool.lose(worker, say(problem))
