"""What the benchmarks of rollouts play, the environment's part of it, and where they ran."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import sysconfig
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

from delethink.chunking import ChunkSpec
from delethink.engines import ray_worker
from delethink.envs.thinking import ThinkingEnv
from delethink.rollout import replay_trace
from delethink.training.run_directory import describe_environment
from delethink.types import Problem, Trace

CONTEXT, CARRYOVER, MOST_CHUNKS = 96, 48, 12  # C, m, I
QUERY, GROUP = 272, 8  # tokens; traces of a query
VOCABULARY = 17  # the toy's, and an end that is never sampled


class Task(NamedTuple):
    """A trace to be played."""

    query: tuple[int, ...]
    spec: ChunkSpec
    seed: int | None


@dataclasses.dataclass(frozen=True)
class Workload:
    """Traces of given numbers of chunks."""

    name: str
    num_workers: int
    chunks: Callable[[random.Random], int]  # of a trace
    longcot: bool = False
    seeded: bool = True  # TRL's requests are not
    variants: tuple[str, ...] = ("at once", "in order", "shuffled", "naive")

    def tasks(self, number: int, seed: int) -> list[Task]:
        """The traces of a round."""
        rng = random.Random(seed)
        tasks = []
        for i in range(number):
            if i % GROUP == 0:
                query = tuple(rng.randrange(2, 16) for _ in range(QUERY))
            spec = ChunkSpec(CONTEXT, CARRYOVER, self.chunks(rng), head_size=0)
            spec = ChunkSpec.longcot(spec.budget) if self.longcot else spec
            own = rng.randrange(2**31)
            tasks.append(Task(query, spec, own if self.seeded else None))
        return tasks


def heavy_tailed(rng: random.Random) -> int:
    """Most traces are short and few are 12 chunks long: Pareto, with exponent 1."""
    return min(MOST_CHUNKS, int(1 / (1 - rng.random())))


WORKLOADS = [
    Workload("1 to 12 chunks, evenly", 1, lambda rng: rng.randint(1, MOST_CHUNKS)),
    Workload(
        "LongCoT, as long", 1, lambda rng: rng.randint(1, MOST_CHUNKS), True, True, ("at once",)
    ),
    Workload(
        "LongCoT, 624 tokens, no seeds", 1, lambda rng: MOST_CHUNKS, True, False, ("at once", "trl")
    ),
    Workload("heavy-tailed, 1 to 12 chunks", 2, heavy_tailed, False, True, ("naive",)),
]


class Queries:
    """A task and a tokenizer, of whatever query is set: neither costs the environment anything."""

    chat_template = None
    eos_token_id = VOCABULARY - 1

    def __init__(self) -> None:
        self.query: list[int] = []

    def problem(self, split: str, index: int) -> Problem:
        return Problem("", "")

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": self.query}

    def decode(self, token_ids: Any, **options: Any) -> str:
        return ""

    def __len__(self) -> int:
        return VOCABULARY


def measure_environment(traces: list[Trace], tasks: list[Task]) -> float:
    """Microseconds of the processor to take a chunk through the environment."""
    queries = Queries()
    environments = {
        task.spec: ThinkingEnv(queries, lambda text, answer: 0.0, queries, task.spec)
        for task in tasks
    }
    started = time.process_time()
    for trace, task in zip(traces, tasks, strict=True):
        queries.query = list(task.query)
        replay_trace(environments[task.spec], Problem("", ""), trace)
    return 1e6 * (time.process_time() - started) / sum(len(trace.chunks) for trace in traces)


def workers_of(kind: type) -> contextlib.AbstractContextManager[object]:
    """While this lasts, the workers of new pools are of another kind: the real one, and more.

    A pool makes its workers itself, and only benchmarks want to ask them for anything else.
    """
    return mock.patch.object(ray_worker, "VllmWorker", kind)


def describe_machine() -> dict[str, Any]:
    """What the figures depend on, before a benchmark begins."""
    built = sysconfig.get_config_var("CONFIG_ARGS") or ""
    return {
        **describe_environment(),
        "python_is_optimized": "--enable-optimizations" in built,
        "load": os.getloadavg(),
    }


def print_machine(about: dict[str, Any]) -> None:
    """The same in two lines."""
    build = "" if about["python_is_optimized"] else ", built without optimisations"
    print(f"{about['processor']}, load {about['load'][0]:.1f}; Python {about['python']}{build};")
    print(f"commit {about['git_commit']};")
