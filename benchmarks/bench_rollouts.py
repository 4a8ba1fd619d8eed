"""Measures how much of an engine's throughput rollouts keep.

    python benchmarks/bench_rollouts.py                        # C = 512; minutes on two idle cores
    python benchmarks/bench_rollouts.py --context 96 --carryover 48 --max-chunks 12

The toy reasoner in real vLLM engines, in Ray workers. No token ends an answer, so all variants
sample the same number of tokens on the same engines:

  pool     traces through ``RayPool``, as in training and evaluation
  at once  the very same requests (prompt, limit, seed), sent to the engines all at once. No rollout
           can do that: it is the ceiling
  naive    one task per trace, chunk after chunk, each trace on a fixed worker

A round runs all variants in a new order, with queries that no prefix cache has. Ratios are medians
over rounds. Times depend on other work of the machine; the number of engine steps for the same
tokens does not, and shows how full the batches were.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from delethink.cli.process import set_up_process

set_up_process()

import ray  # noqa: E402

from delethink.chunking import ChunkSpec  # noqa: E402
from delethink.config import EngineConfig  # noqa: E402
from delethink.engines.base import EngineCounts  # noqa: E402
from delethink.engines.loading import locate  # noqa: E402
from delethink.engines.vllm import VllmPool, VllmWorker  # noqa: E402
from delethink.policy import Completion, Policy, Sampling, SchedulingHint  # noqa: E402
from delethink.rollout import derive_seed, run_rollout  # noqa: E402
from delethink.training.run_directory import describe_environment  # noqa: E402
from delethink.types import Trace  # noqa: E402

QUERY_TOKENS, GROUP_SIZE = 256, 8


class Request(NamedTuple):
    """A chunk to sample."""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    seed: int


class BenchWorker(VllmWorker):
    """A worker that also takes all requests at once."""

    async def generate_all(self, requests: Sequence[Request]) -> None:
        """Sample requests side by side."""
        await asyncio.gather(*[self.generate(r[0], r[1], Sampling(1.0, r[2])) for r in requests])


class BenchPool(VllmPool):
    """A pool of such workers."""

    worker_class = BenchWorker


class UnknownLength:
    """Hides the length of a trace from the pool, because no real run knows it."""

    def __init__(self, policy: Policy, max_chunks: int) -> None:
        self._policy, self._max_chunks = policy, max_chunks

    async def generate(self, prompt_ids: Any, max_new: int, sampling: Sampling) -> Completion:
        known = sampling.hint or SchedulingHint()
        hint = SchedulingHint(known.query, known.num_chunks, self._max_chunks)
        sampling = Sampling(sampling.temperature, sampling.seed, hint)
        return await self._policy.generate(prompt_ids, max_new, sampling)


class Naive:
    """The policy protocol over one worker."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def generate(self, prompt_ids: Any, max_new: int, sampling: Sampling) -> Completion:
        plain = Sampling(sampling.temperature, sampling.seed)
        completion: Completion = await self._actor.generate.remote(prompt_ids, max_new, plain)
        return completion


class Bench:
    """Variants of one workload, on the engines of one pool."""

    def __init__(self, pool: BenchPool, options: argparse.Namespace) -> None:
        self.pool, self.max_chunks = pool, options.max_chunks
        self.actors = [worker.handle.actor for worker in pool.workers]  # type: ignore[union-attr]
        self.random = random.Random(options.seed)
        number = options.slots * options.engines * options.traces_per_slot
        self.specs = [
            ChunkSpec(options.context, options.carryover, 1 + i % options.max_chunks, head_size=0)
            for i in range(number)
        ]
        self.random.shuffle(self.specs)

    def round(self) -> dict[str, tuple[float, int, float]]:
        """Return (seconds, engine steps, driver's CPU seconds) of each variant."""
        traces = self.roll_out([UnknownLength(self.pool, self.max_chunks)], self.queries())
        self.num_tokens = sum(trace.length for trace in traces)
        self.num_chunks = sum(len(trace.chunks) for trace in traces)
        variants: dict[str, Callable[[], Any]] = {
            "pool": self.run_pool,
            "at once": self.run_at_once(traces),
            "naive": self.run_naive,
        }
        results = {}
        for name in self.random.sample(list(variants), len(variants)):
            steps, cpu, began = self.steps(), time.process_time(), time.perf_counter()
            variants[name]()
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            results[name] = seconds, self.steps() - steps, cpu
        return results

    def run_pool(self) -> None:
        self.roll_out([UnknownLength(self.pool, self.max_chunks)], self.queries())

    def run_naive(self) -> None:
        self.roll_out([Naive(actor) for actor in self.actors], self.queries())

    def run_at_once(self, traces: list[Trace]) -> Callable[[], Any]:
        """Prepare the requests of these traces, with other queries."""
        requests = []
        for query, trace in zip(self.queries(), traces, strict=True):
            for chunk in trace.chunks:
                prompt = (*query, *chunk.prompt_ids[QUERY_TOKENS:])
                seed = self.random.randrange(2**31)
                requests.append(Request(prompt, len(chunk.output_ids), seed))
        shares = [requests[i :: len(self.actors)] for i in range(len(self.actors))]
        calls = list(zip(self.actors, shares, strict=True))
        return lambda: ray.get([actor.generate_all.remote(share) for actor, share in calls])

    def queries(self) -> list[tuple[int, ...]]:
        """Return new queries, one for each group of traces."""
        groups = [
            tuple(self.random.randrange(2, 16) for _ in range(QUERY_TOKENS))
            for _ in range(-(-len(self.specs) // GROUP_SIZE))
        ]
        return [groups[i // GROUP_SIZE] for i in range(len(self.specs))]

    def roll_out(self, policies: Sequence[Any], queries: list[tuple[int, ...]]) -> list[Trace]:
        """Sample all traces; trace i uses the policies in turns."""
        traces: list[Trace] = []

        async def run() -> None:
            done = await asyncio.gather(
                *[
                    run_rollout(
                        policies[i % len(policies)],
                        spec,
                        queries[i],
                        Sampling(1.0, self.random.randrange(2**31)),
                    )
                    for i, spec in enumerate(self.specs)
                ]
            )
            traces.extend(done)  # asyncio.run would make a text of a result

        asyncio.run(run())
        if any(t.length != spec.budget for t, spec in zip(traces, self.specs, strict=True)):
            raise RuntimeError("a trace has another length than its budget")
        return traces

    def steps(self) -> int:
        """Return the steps of all engines so far."""
        counts: list[EngineCounts] = ray.get([actor.health.remote() for actor in self.actors])
        return sum(count.steps for count in counts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--carryover", type=int, default=256)
    parser.add_argument("--max-chunks", type=int, default=6)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--slots", type=int, default=32, help="batch size of an engine")
    parser.add_argument("--traces-per-slot", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of an engine")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    machine = describe_environment()
    print(f"{machine['processor']}, load {os.getloadavg()[0]:.1f}, commit {machine['git_commit']}")
    print(", ".join(f"{name} {value}" for name, value in vars(options).items()), "\n")
    config = EngineConfig(
        num_engines=options.engines,
        cpus_per_engine=options.threads,
        max_batch_size=options.slots,
    )
    tokens = QUERY_TOKENS + options.context
    pool = BenchPool(
        locate("toy"), config, eos_ids=(), max_model_tokens=tokens, seed=derive_seed(options.seed)
    )
    with contextlib.closing(pool):
        bench = Bench(pool, options)
        rounds = []
        for turn in range(options.rounds):
            rounds.append(bench.round())
            print(f"round {turn + 1}: {describe(rounds[-1], bench)}", flush=True)
    print()
    print(table(rounds))


def describe(results: dict[str, tuple[float, int, float]], bench: Bench) -> str:
    """Return one round as a line."""
    rates = [
        f"{name} {bench.num_tokens / seconds:,.0f} tokens/s in {steps} steps"
        for name, (seconds, steps, _) in results.items()
    ]
    driver = 1e6 * results["pool"][2] / bench.num_chunks
    return f"{', '.join(rates)}; driver {driver:.0f} us a chunk, {bench.num_chunks} chunks"


def table(rounds: list[dict[str, tuple[float, int, float]]]) -> str:
    """Return throughput of the pool over that of the other variants."""
    lines = ["| pool over | by time | by engine steps |", "| --- | --- | --- |"]
    for variant in ("at once", "naive"):
        cells = []
        for i in (0, 1):
            ratios = [results[variant][i] / results["pool"][i] for results in rounds]
            cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
