"""The weights that a pool's workers run, and how they come by others."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

from delethink.engines.pool_worker import PoolWorker, say
from delethink.errors import PolicyError, WeightSyncError


class LostError(Exception):
    """A worker is no use any more; the text says why."""


class WeightedPool(Protocol):
    """What new weights need of a pool."""

    workers: list[PoolWorker]
    changed: asyncio.Event  # set when a worker comes into service or is given up
    ended: Exception | None  # why nothing is sampled ever again

    def hold(self, worker: PoolWorker) -> None:
        """Gives a worker no further chunk; those that it has go on."""
        ...

    def release(self, worker: PoolWorker) -> None:
        """Gives a worker chunks again, where nothing else speaks against it."""
        ...

    def lose(self, worker: PoolWorker, reason: str) -> None:
        """Ends the present life of a worker."""
        ...

    def fail_all(self, why: Exception) -> None:
        """Tells all who wait for a chunk that none will come."""
        ...


class PoolWeights:
    """Keeps the workers of a pool at one version of the weights.

    Args:
        pool: whose.
        timeout: seconds that a worker without chunks has to take weights up.

    Attributes:
        unsound: why nothing is sampled before other weights come, if so.
    """

    def __init__(self, pool: WeightedPool, timeout: float) -> None:
        self.unsound: Exception | None = None
        self._pool, self._timeout = pool, timeout
        self._current: tuple[Any, int] | None = None  # that workers are to run, once there are any
        self._lock = asyncio.Lock()
        self._behind: set[PoolWorker] = set()  # who has yet to take up the weights of an update

    def holds(self, worker: PoolWorker) -> bool:
        """Whether a worker may sample nothing until it has taken up others."""
        return self.unsound is not None or worker in self._behind

    async def update(self, weights: Any, version: int) -> None:
        """Gives weights to all workers: see ``WorkerPool.update_weights``."""
        try:
            async with self._lock:
                before, self._current = self._current, (weights, version)
                self._behind = set(self._pool.workers)
                if refusals := await self._give_all(weights, version):
                    self._current = before
                    self._refuse(refusals, version)
                self.unsound = None
        finally:
            if not self._lock.locked():  # else another update has begun
                self._behind.clear()
            for worker in self._pool.workers:
                self._pool.release(worker)

    async def catch_up(self, worker: PoolWorker) -> None:
        """Gives the current weights to a worker that has just started, if there are any."""
        while self._current is not None and not self.unsound:
            weights, version = self._current
            await self._give(worker, weights, version)
            if self._current is not None and self._current[1] == version:
                break

    def _refuse(self, refusals: Sequence[tuple[PoolWorker, str]], version: int) -> NoReturn:
        self.unsound = PolicyError(f"takes no requests since an update of weights {refusals[0][1]}")
        self._pool.fail_all(self.unsound)
        said = "; ".join(f"{worker} {reason}" for worker, reason in refusals)
        raise WeightSyncError(
            f"{len(refusals)} of {len(self._pool.workers)} workers did not take up the weights of "
            f"version {version}: {said}"
        )

    async def _give_all(self, weights: Any, version: int) -> list[tuple[PoolWorker, str]]:
        """Who refused, and what they said, where all did; nothing where one at least agreed."""
        while True:
            self._pool.changed.clear()
            if self._pool.ended is not None:
                raise self._pool.ended
            lives = [(w, w.life) for w in self._pool.workers if w.in_service]
            answers = [self._give_when_idle(worker, weights, version) for worker, _ in lives]
            outcomes = await asyncio.gather(*answers)
            refused = [
                (worker, said)
                for (worker, life), said in zip(lives, outcomes, strict=True)
                if isinstance(said, str) and worker.life == life and worker.in_service
            ]
            if True in outcomes:
                for worker, said in refused:
                    self._pool.lose(worker, said)
                return []
            if refused:
                return refused
            await self._pool.changed.wait()  # until a worker is back, which then runs the weights

    async def _give_when_idle(self, worker: PoolWorker, weights: Any, version: int) -> str | bool:
        """Whether a worker runs the weights; the text says why it refused them."""
        self._pool.hold(worker)
        await worker.idle.wait()
        if worker.is_dead:
            return False
        life = worker.life
        try:
            await self._give(worker, weights, version)
        except WeightSyncError as error:
            return str(error)
        except Exception as error:  # however a worker fails, it is lost
            if worker.life == life:
                self._pool.lose(worker, say(error))
            return False
        worker.heard = worker.progressed = asyncio.get_running_loop().time()
        self._behind.discard(worker)
        self._pool.release(worker)
        return worker.in_service

    async def _give(self, worker: PoolWorker, weights: Any, version: int) -> None:
        assert worker.handle is not None
        try:
            async with asyncio.timeout(self._timeout):
                said = await worker.handle.update(weights, version)
        except TimeoutError:
            raise LostError(
                f"did not take up the weights of version {version} within {self._timeout:g} s"
            ) from None
        if said != version:
            raise LostError(f"runs version {said} of the weights and was given {version}")
