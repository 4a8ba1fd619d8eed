"""Counts what a vLLM engine does, step by step, as one of vLLM's own statistics loggers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from delethink.engines.exchange import EngineCounts


def make_counter(made: list[Any]) -> Callable[..., Any]:
    """What vLLM makes a statistics logger with; the counter that it makes is put into ``made``."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Counter(StatLoggerBase):  # type: ignore[misc]  # vLLM's classes are untyped here
        """Told of every step of the engine."""

        def __init__(self, vllm_config: Any = None, engine_index: int = 0) -> None:
            self._counts = EngineCounts()
            made.append(self)

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, *more: Any, **others: Any
        ) -> None:
            """One step; either part may be missing."""
            counts = self._counts
            if iteration_stats is not None:
                sampled = iteration_stats.num_generation_tokens
                counts = replace(counts, steps=counts.steps + 1, tokens=counts.tokens + sampled)
            if scheduler_stats is not None:
                cache = scheduler_stats.prefix_cache_stats
                counts = replace(
                    counts,
                    running=counts.running + scheduler_stats.num_running_reqs,
                    prefix_queries=counts.prefix_queries + cache.queries,
                    prefix_hits=counts.prefix_hits + cache.hits,
                )
            self._counts = counts

        def log_engine_initialized(self) -> None:
            """Nothing to say."""

        def counts(self) -> EngineCounts:
            """All so far."""
            return self._counts

        def clear(self) -> None:
            """Begins anew."""
            self._counts = EngineCounts()

    return Counter
