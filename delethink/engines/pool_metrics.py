"""What a pool did and what went wrong, for a run's metrics and for Ray's own."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from delethink.engines.exchange import EngineCounts
from delethink.engines.pool import WorkerPool
from delethink.engines.pool_worker import Counts

PREFIX = "engine/"


class PoolMetrics:
    """Reads a pool; everything is of the time since it was last read.

    Keys are ``engine/<name>`` for the pool and ``engine/worker <i>/<name>`` for a worker:
    ``queue`` (chunks that wait, and chunks at a worker, now), ``workers`` (in service),
    ``batch_occupancy`` (chunks in a forward pass on average), ``tokens_per_second``,
    ``prefix_cache_hit_rate`` (of prompt tokens), ``chunks``, ``restarts``, ``chunks_rescheduled``,
    ``tokens_lost``, ``late_answers``, ``chunk_timeouts`` and ``chunks_failed``. Rates are over the
    time in which there were chunks, and left out where there were none; a worker's ``restarts`` are
    all that it ever had.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._gauges: dict[str, Any] = {}
        self._counters: dict[str, Any] = {}

    async def take(self) -> dict[str, float]:
        """The figures; runs in the pool's event loop."""
        faults, self._pool.counts = self._pool.counts, Counts()
        metrics: dict[str, float] = {
            "queue": self._pool.num_waiting,
            "workers": sum(worker.in_service for worker in self._pool.workers),
            **dataclasses.asdict(faults),
        }
        total, longest = EngineCounts(), 0.0
        for worker in self._pool.workers:
            done, worker.taken = difference(worker.counts, worker.taken), worker.counts
            total = EngineCounts(*map(sum, zip(_values(total), _values(done), strict=True)))
            seconds = worker.take_busy_seconds(asyncio.get_running_loop().time())
            longest = max(longest, seconds)
            chunks, worker.given_chunks = worker.given_chunks, 0
            own = {
                "queue": self._pool.chunks_at(worker),
                "chunks": chunks,
                "restarts": worker.restarts,
                **rates(done, seconds),
            }
            metrics |= {f"{worker.name}/{name}": value for name, value in own.items()}
        metrics |= rates(total, longest)
        self._tell_ray(metrics, faults)
        return {PREFIX + name: float(value) for name, value in metrics.items()}

    def _tell_ray(self, metrics: dict[str, float], faults: Counts) -> None:
        """The same in Ray's metrics: gauges, and counters of faults."""
        import ray
        from ray.util.metrics import Counter, Gauge

        if not ray.is_initialized():
            return
        for name, value in metrics.items():
            where, _, what = name.rpartition("/")
            key = f"delethink_{what}"
            if what in dataclasses.asdict(faults) and not where:
                if key not in self._counters:
                    self._counters[key] = Counter(key, description=f"{what} of the pool")
                if value > 0:
                    self._counters[key].inc(value)
                continue
            kind = f"delethink_worker_{what}" if where else key
            if kind not in self._gauges:
                tags = ("worker",) if where else ()
                self._gauges[kind] = Gauge(kind, description=what, tag_keys=tags)
            self._gauges[kind].set(value, tags={"worker": where} if where else None)


def rates(done: EngineCounts, seconds: float) -> dict[str, float]:
    """What counts over a time amount to; rates of nothing are left out."""
    found = {}
    if seconds:
        found["tokens_per_second"] = done.tokens / seconds
    if done.steps:
        found["batch_occupancy"] = done.running / done.steps
    if done.prefix_queries:
        found["prefix_cache_hit_rate"] = done.prefix_hits / done.prefix_queries
    return found


def difference(now: EngineCounts, before: EngineCounts) -> EngineCounts:
    """What was counted in between; all of it where the engine was restarted."""
    if now.steps < before.steps:
        return now
    return EngineCounts(*(a - b for a, b in zip(_values(now), _values(before), strict=True)))


def _values(counts: EngineCounts) -> tuple[int, ...]:
    return dataclasses.astuple(counts)
