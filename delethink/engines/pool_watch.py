"""Deadlines of a pool: which workers hang or are slow, and which chunks take too long."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Protocol

from delethink.engines.pool_settings import PoolSettings
from delethink.engines.pool_worker import Chunk, PoolWorker
from delethink.engines.scheduler import Lease

_MEASURED_CHUNKS = 8  # of a worker, before its pace says anything


class WatchedPool(Protocol):
    """What deadlines need of a pool."""

    workers: list[PoolWorker]

    def held_by(self, worker: PoolWorker) -> Sequence[tuple[Lease, Chunk]]:
        """The chunks that a worker has, the oldest first."""
        ...

    def lose(self, worker: PoolWorker, reason: str) -> None:
        """Ends the present life of a worker."""
        ...

    def suspect(self, worker: PoolWorker, silence: float) -> None:
        """Gives the chunks of a silent worker to others."""
        ...

    def time_out(self, worker: PoolWorker, lease: Lease, seconds: float) -> None:
        """Gives a chunk up for good."""
        ...


class PoolWatch:
    """Looks after the workers of a pool.

    Args:
        pool: whose.
        settings: the deadlines.
    """

    def __init__(self, pool: WatchedPool, settings: PoolSettings) -> None:
        self._pool, self._settings = pool, settings

    def look(self, now: float) -> None:
        """Acts on every deadline that has been missed by ``now``."""
        for worker in self._pool.workers:
            if worker.in_service and self._is_well(worker, now):
                self._look_at_chunks(worker, now)

    def _is_well(self, worker: PoolWorker, now: float) -> bool:
        """Whether it is heard and its engine does something; else it is lost."""
        settings = self._settings
        silent, still = now - worker.heard, now - worker.progressed
        if silent > settings.hang_timeout:
            self._pool.lose(worker, f"hangs: no sign of life for {silent:.0f} s")
            return False
        if silent > settings.silence_timeout and not worker.silent:
            self._suspect(worker, silent)
        if still > settings.hang_timeout and not worker.idle.is_set():
            self._pool.lose(worker, f"hangs: its engine made no step for {still:.0f} s")
            return False
        return True

    def _look_at_chunks(self, worker: PoolWorker, now: float) -> None:
        settings = self._settings
        pace = self._pace_of_others(worker)
        soonest = min(settings.hang_timeout, settings.chunk_timeout or settings.hang_timeout)
        for lease, chunk in self._pool.held_by(worker):
            age = now - lease.given
            if age <= soonest:
                return  # the oldest come first
            if settings.chunk_timeout is not None and age > settings.chunk_timeout:
                self._pool.time_out(worker, lease, settings.chunk_timeout)
                continue
            fair = settings.slow_factor * chunk.max_new_tokens * pace
            if pace and age > max(fair, settings.hang_timeout):
                self._pool.lose(
                    worker, f"is slow: {age:.0f} s at a chunk, others take {fair:.0f} s"
                )
                return

    def _suspect(self, worker: PoolWorker, silence: float) -> None:
        others = (other for other in self._pool.workers if other is not worker)
        if any(other.in_service and not other.silent for other in others):
            self._pool.suspect(worker, silence)

    def _pace_of_others(self, worker: PoolWorker) -> float:
        """Seconds per token of the others, in the middle; 0 where nobody can say."""
        known = [
            other.pace
            for other in self._pool.workers
            if other is not worker and other.in_service and other.paced >= _MEASURED_CHUNKS
        ]
        return statistics.median(known) if known else 0.0
