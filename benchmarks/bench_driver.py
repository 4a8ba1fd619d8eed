"""What a chunk costs the driver: rollouts, scheduler and Ray, and the environment.

    python benchmarks/bench_driver.py
    python benchmarks/bench_driver.py --by-ray   # without connections of the workers' own

Workers are real Ray actors that are given chunks and report them as the real ones do; only what
samples is played: a chunk takes a fixed time, a fifth more or less, and its tokens are made up. So
more workers fit on a machine than it has cores for, and the driver does what it would on a cluster.
Times are of the driver's processor, all threads of its process together, Ray's own among them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

from delethink.cli.process import set_up_process

set_up_process()

import ray  # noqa: E402
from rollout_workloads import (  # noqa: E402
    GROUP,
    QUERY,
    Task,
    describe_machine,
    measure_environment,
    print_machine,
    workers_of,
)

from delethink.chunking import ChunkSpec  # noqa: E402
from delethink.engines.cluster import connect  # noqa: E402
from delethink.engines.exchange import Answer, EngineCounts, Job, WorkerState  # noqa: E402
from delethink.engines.ray import RayPool  # noqa: E402
from delethink.engines.vllm import VllmWorker, WorkerConfig  # noqa: E402
from delethink.policy import Sampling  # noqa: E402
from delethink.rollout import derive_seed, run_rollouts  # noqa: E402
from delethink.types import StopReason  # noqa: E402

CHUNK_SECONDS = 0.5
SIZES = {  # C, m and I
    "as in bench_rollouts": (96, 48, 12),
    "as in the paper": (8192, 4096, 5),
}
SPREAD = 0.2  # of a chunk's time, either way


class MadeUp(VllmWorker):
    """A worker whose tokens are made up; all else of it is the real one's."""

    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config)
        longest = config.max_model_tokens or 0
        self._made = Answer.pack(0, [5] * longest, [-0.5] * longest, StopReason.LENGTH, 0)
        self._rng = random.Random(config.seed)

    async def start(self) -> WorkerState:
        """There is no engine to start."""
        self._batch_size = self._config.max_batch_size or 1
        self._places = asyncio.Semaphore(self._batch_size)
        steps = itertools.count(1)  # whose engine makes none is taken to hang
        self._counter = SimpleNamespace(counts=lambda: EngineCounts(steps=next(steps)))
        longest = self._config.max_model_tokens or 0
        return WorkerState(os.getpid(), longest, self._batch_size)

    async def _sample(self, job: Job) -> Answer:
        size = 8 * job.max_new_tokens
        async with self._places:
            await asyncio.sleep(CHUNK_SECONDS * self._rng.uniform(1 - SPREAD, 1 + SPREAD))
        output, logprobs = self._made.output[:size], self._made.logprobs[:size]
        return self._made._replace(number=job.number, output=output, logprobs=logprobs)


class Measured(NamedTuple):
    """A round; microseconds of the driver's processor for each chunk."""

    chunks_per_second: float
    driver: float  # rollouts, scheduler and Ray
    environment: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--slots", type=int, default=64, help="chunks in a worker's batch")
    parser.add_argument("--traces-per-slot", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--by-ray", action="store_true", help="chunks go as calls of Ray actors")
    parser.add_argument("--only", default="", help="sizes whose name holds this")
    asked = parser.parse_args()
    chosen = {name: sizes for name, sizes in SIZES.items() if asked.only in name}
    if not chosen:
        parser.error(f"--only {asked.only!r} is part of no name: {', '.join(map(repr, SIZES))}")
    print_machine(describe_machine())
    print(f"{asked.workers} workers of {asked.slots} slots, {asked.rounds} rounds, a chunk takes ")
    print(f"{CHUNK_SECONDS} s, seed {asked.seed}{', by way of Ray' * asked.by_ray}\n")
    owns = connect(num_cpus=asked.workers)  # reservations, not cores
    print(
        "| chunks | C, m, I | chunks a second | driver, us a chunk | environment, us a chunk "
        "| both, all rounds |"
    )
    print("|" + " --- |" * 6)
    try:
        for name, sizes in chosen.items():
            print(row(name, sizes, list(measure(sizes, asked))), flush=True)
    finally:
        if owns:
            ray.shutdown()


def measure(sizes: tuple[int, int, int], asked: argparse.Namespace) -> Iterator[Measured]:
    """All rounds; the first, which is small, warms up."""
    number = asked.traces_per_slot * asked.slots * asked.workers
    with (
        workers_of(MadeUp),
        ways(asked.by_ray),
        contextlib.closing(make_pool(sizes, asked)) as pool,
    ):
        for turn in range(asked.rounds + 1):
            seed = derive_seed(asked.seed, turn)
            tasks = make_tasks(number if turn else number // 8, sizes, seed)
            measured = play(pool, tasks)
            if turn:
                yield measured


def play(pool: RayPool, tasks: list[Task]) -> Measured:
    traces = []

    async def play_all() -> None:
        # Of many numbers of chunks at the same time; each spec is one of run_rollouts.
        specs = {task.spec for task in tasks}
        groups = [[task for task in tasks if task.spec == spec] for spec in specs]
        done = [
            run_rollouts(
                pool,
                group[0].spec,
                [task.query for task in group],
                [Sampling(1.0, task.seed) for task in group],
            )
            for group in groups
        ]
        for group, played in zip(groups, await asyncio.gather(*done), strict=True):
            traces.extend(zip(played, group, strict=True))

    cpu, started = time.process_time(), time.perf_counter()
    asyncio.run(play_all())
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - started
    chunks = sum(len(trace.chunks) for trace, _ in traces)
    environment = measure_environment([t for t, _ in traces], [t for _, t in traces])
    return Measured(chunks / seconds, 1e6 * cpu / chunks, environment)


def make_tasks(number: int, sizes: tuple[int, int, int], seed: int) -> list[Task]:
    """Traces of 1 to I chunks, evenly."""
    context, carryover, most = sizes
    rng, tasks = random.Random(seed), list[Task]()
    specs = [ChunkSpec(context, carryover, i + 1, head_size=0) for i in range(most)]
    for i in range(number):
        if i % GROUP == 0:
            query = tuple(rng.randrange(2, 16) for _ in range(QUERY))
        tasks.append(Task(query, rng.choice(specs), rng.randrange(2**31)))
    return tasks


def ways(by_ray: bool) -> contextlib.AbstractContextManager[object]:
    """How chunks go to a pool that is made meanwhile: by Ray where the cluster encrypts."""
    return mock.patch.dict(os.environ, {"RAY_USE_TLS": "1"} if by_ray else {})


def make_pool(sizes: tuple[int, int, int], asked: argparse.Namespace) -> RayPool:
    return RayPool(
        "made-up",
        eos_ids=(),
        num_workers=asked.workers,
        max_model_tokens=QUERY + sizes[0],
        cpus_per_worker=1,
        seed=asked.seed,
        max_batch_size=asked.slots,
    )


def row(name: str, sizes: tuple[int, int, int], rounds: list[Measured]) -> str:
    middle = statistics.median
    both = ", ".join(f"{m.driver + m.environment:.0f}" for m in rounds)
    return (
        f"| {name} | {', '.join(map(str, sizes))} "
        f"| {middle([m.chunks_per_second for m in rounds]):,.0f} "
        f"| {middle([m.driver for m in rounds]):.0f} "
        f"| {middle([m.environment for m in rounds]):.0f} | {both} |"
    )


if __name__ == "__main__":
    sys.exit(main())
