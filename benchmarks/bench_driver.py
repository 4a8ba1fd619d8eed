"""Measures the driver's CPU time per chunk, against bare calls of the same Ray actors.

    python benchmarks/bench_driver.py

The workers are real Ray actors without an engine: a chunk takes a fixed time, 20 % more or less,
and its tokens are made up. So more workers fit on a machine than it has cores for, and the driver
does what it would do on a cluster. Each round runs chunks of the same sizes twice: through rollouts
and ``RayPool``, and as bare calls ``await worker.generate.remote(...)``. CPU time is that of all
threads of the driver's process, Ray's own included.
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
from collections.abc import Coroutine
from typing import Any

from delethink.cli.process import set_up_process

set_up_process()

from delethink.chunking import ChunkSpec  # noqa: E402
from delethink.config import EngineConfig  # noqa: E402
from delethink.engines.base import EngineCounts, WorkerSpec, WorkerState  # noqa: E402
from delethink.engines.ray import RayPool  # noqa: E402
from delethink.engines.scheduler import slots  # noqa: E402
from delethink.policy import Completion, Sampling  # noqa: E402
from delethink.rollout import run_rollouts  # noqa: E402
from delethink.tokens import logprob_array, token_array  # noqa: E402
from delethink.training.run_directory import describe_environment  # noqa: E402
from delethink.types import StopReason, TokenIds  # noqa: E402

CHUNK_SECONDS, SPREAD = 0.7, 0.2
QUERY_TOKENS, GROUP_SIZE = 272, 8
SIZES = [(96, 48, 12), (8192, 4096, 5)]  # C, m and I: of a toy, and of the paper


class MadeUpWorker:
    """A worker whose tokens are made up."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._longest = spec.max_model_tokens or 0
        self._batch_size = spec.config.max_batch_size or 1
        self._batch = asyncio.Semaphore(self._batch_size)
        self._tokens = token_array([5] * self._longest)
        self._logprobs = logprob_array([-0.5] * self._longest)
        self._random = random.Random(spec.seed)
        self._steps = itertools.count(1)

    async def start(self) -> WorkerState:
        return WorkerState(os.getpid(), self._longest, self._batch_size)

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        async with self._batch:
            spread = self._random.uniform(1 - SPREAD, 1 + SPREAD)
            await asyncio.sleep(CHUNK_SECONDS * spread)
        tokens, logprobs = self._tokens[:max_new_tokens], self._logprobs[:max_new_tokens]
        return Completion(tokens, logprobs, StopReason.LENGTH)

    async def health(self) -> EngineCounts:
        return EngineCounts(steps=next(self._steps))

    async def update_weights(self, weights: object, version: int) -> int:
        return version

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...

    async def stop(self) -> None: ...


class MadeUpPool(RayPool):
    """A pool of made-up workers."""

    worker_class = MadeUpWorker


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--slots", type=int, default=64, help="batch size of a worker")
    parser.add_argument("--traces-per-slot", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    machine = describe_environment()
    print(f"{machine['processor']}, load {os.getloadavg()[0]:.1f}, commit {machine['git_commit']}")
    print(f"{options.workers} workers with batches of {options.slots}, {options.rounds} rounds\n")
    print("| C, m, I | chunks/s | driver, us a chunk | bare call, us | ratio (all rounds) |")
    print("| --- | --- | --- | --- | --- |")
    for sizes in SIZES:
        print(row(sizes, options), flush=True)


def row(sizes: tuple[int, int, int], options: argparse.Namespace) -> str:
    """Run all rounds of one size; return a row of the table."""
    context, carryover, max_chunks = sizes
    config = EngineConfig(
        num_engines=options.workers, cpus_per_engine=0.1, max_batch_size=options.slots
    )
    number = options.workers * options.slots * options.traces_per_slot
    rates, driver, bare = [], [], []
    pool = MadeUpPool("none", config, eos_ids=(), max_model_tokens=QUERY_TOKENS + context)
    with contextlib.closing(pool):
        rng = random.Random(options.seed)
        specs = [ChunkSpec(context, carryover, i + 1, head_size=0) for i in range(max_chunks)]
        measure(roll_out(pool, specs, number // 8, rng))  # warms up
        for turn in range(options.rounds):
            for run in ("pool", "bare") if turn % 2 == 0 else ("bare", "pool"):
                if run == "bare":
                    calls = requests(specs, number)
                    bare.append(1e6 * measure(call_actors(pool, calls))[1] / len(calls))
                else:
                    chunks = [0]
                    seconds, cpu = measure(roll_out(pool, specs, number, rng, chunks))
                    rates.append(chunks[0] / seconds)
                    driver.append(1e6 * cpu / chunks[0])
    ratios = [a / b for a, b in zip(driver, bare, strict=True)]
    return (
        f"| {context}, {carryover}, {max_chunks} | {statistics.median(rates):,.0f} "
        f"| {statistics.median(driver):.0f} | {statistics.median(bare):.0f} "
        f"| {statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)}) |"
    )


def measure(work: Coroutine[Any, Any, None]) -> tuple[float, float]:
    """Run a coroutine; return its seconds, and those of the processor."""
    cpu, began = time.process_time(), time.perf_counter()
    asyncio.run(work)
    return time.perf_counter() - began, time.process_time() - cpu


async def roll_out(
    pool: RayPool,
    specs: list[ChunkSpec],
    number: int,
    rng: random.Random,
    chunks: list[int] | None = None,
) -> None:
    """Sample traces of 1 to I chunks, evenly, and count their chunks."""
    queries = [
        tuple(rng.randrange(2, 16) for _ in range(QUERY_TOKENS))
        for _ in range(max(1, number // GROUP_SIZE // len(specs)))
    ]
    per_spec = number // len(specs)
    done = await asyncio.gather(
        *[
            run_rollouts(
                pool,
                spec,
                [queries[i // GROUP_SIZE % len(queries)] for i in range(per_spec)],
                [Sampling(1.0, rng.randrange(2**31)) for _ in range(per_spec)],
            )
            for spec in specs
        ]
    )
    if chunks is not None:
        chunks[0] += sum(len(trace.chunks) for traces in done for trace in traces)


def requests(specs: list[ChunkSpec], number: int) -> list[tuple[int, int]]:
    """Return (prompt tokens, new tokens) of all chunks of so many traces."""
    found = []
    for i in range(number):
        spec = specs[i % len(specs)]
        later = spec.context_size - spec.carryover_size
        found.append((QUERY_TOKENS, spec.context_size))
        found += [(QUERY_TOKENS + spec.carryover_size, later)] * (spec.max_chunks - 1)
    return found


async def call_actors(pool: RayPool, sizes: list[tuple[int, int]]) -> None:
    """Call the actors of a pool directly, with as many calls in flight as the pool has."""
    actors = [worker.handle.actor for worker in pool.workers]  # type: ignore[union-attr]
    left = iter(sizes)

    async def call(actor: Any) -> None:
        for prompt_tokens, new in left:
            prompt = token_array([5] * prompt_tokens)
            await actor.generate.remote(prompt, new, Sampling(1.0, 1))

    in_flight = slots(pool.config.max_batch_size or 1)
    await asyncio.gather(*[call(actor) for actor in actors for _ in range(in_flight)])


if __name__ == "__main__":
    sys.exit(main())
