"""How much of an engine's throughput rollouts keep, as ratios within one run.

    python benchmarks/bench_rollouts.py                  # ten to thirty minutes on two idle cores
    python benchmarks/bench_rollouts.py --rounds 1 --slots 16 --json out.json

The toy reasoner in real vLLM engines, on Ray workers. No token ends an answer, so every chunk has
the length that it was given, and all variants do the same work on the same engines:

  pool     the traces through RayPool, as training and evaluation play them
  at once  the very same requests (prompt, limit, seed) given to the engine all at once, which no
           rollout could do: the ceiling. In three orders, because requests of one query go faster
           side by side on a CPU: trace by trace, by the number of the chunk (in order, as the pool
           comes to them), and shuffled
  naive    a task for each trace, chunk after chunk, with traces pinned to workers in turns
  trl      TRL's own vLLM generation, for LongCoT, in an engine of its own

A round plays all variants, in an order drawn anew, with queries that no prefix cache knows; what
each trace is made of stays the same. A ratio is the median of the rounds' ratios. Seconds are those
of a machine that may have other work; how many steps an engine takes for the same tokens is not,
and tells how full its batches were.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from delethink.cli.process import set_up_process

set_up_process()

import numpy as np  # noqa: E402
import ray  # noqa: E402
from rollout_baselines import (  # noqa: E402
    MAX_MODEL_TOKENS,
    Naive,
    RawEngine,
    Request,
    TrlEngine,
    run_actor,
)
from rollout_workloads import (  # noqa: E402
    CONTEXT,
    MOST_CHUNKS,
    QUERY,
    WORKLOADS,
    Task,
    Workload,
    describe_machine,
    measure_environment,
    print_machine,
    workers_of,
)

from delethink.engines.cluster import connect  # noqa: E402
from delethink.engines.exchange import EngineCounts  # noqa: E402
from delethink.engines.loading import locate  # noqa: E402
from delethink.engines.ray import RayPool  # noqa: E402
from delethink.engines.vllm import WorkerConfig  # noqa: E402
from delethink.policy import Completion, Sampling, SchedulingHint  # noqa: E402
from delethink.rollout import derive_seed, run_rollout  # noqa: E402
from delethink.types import Trace  # noqa: E402


class Unknowing:
    """Hides from the pool how long a trace will be, as nobody knows it of a real one."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    async def generate(self, prompt: Any, new: int, sampling: Sampling) -> Completion:
        """As the engine does."""
        known = sampling.hint or SchedulingHint()
        progress = SchedulingHint(known.query, known.num_chunks, MOST_CHUNKS)
        sampling = Sampling(sampling.temperature, sampling.seed, progress)
        completion: Completion = await self.policy.generate(prompt, new, sampling)
        return completion


@dataclasses.dataclass
class Measured:
    """One round of a workload."""

    tokens: int
    chunks: int
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # by variant
    steps: dict[str, int] = dataclasses.field(default_factory=dict)  # of the engines
    driver: float = 0.0  # microseconds of the driver's processor for each chunk, and no idle Ray's
    driver_and_idle: float = 0.0  # the same with what Ray's threads take while nothing happens
    environment: float = 0.0  # the same of the environment
    hits: float = 0.0  # query tokens found in prefix caches, of those that could be


class Bench:
    """The variants of a workload, on the engines of one pool.

    Args:
        workload: what is played.
        pool: its workers are ``RawEngine``.
        trl: the engine of TRL's variant, where there is one.
        number: of traces.
        seed: of the traces, of their queries in each round, and of the order of the variants.
    """

    def __init__(self, workload: Workload, pool: RayPool, trl: Any, number: int, seed: int) -> None:
        self.workload, self.pool, self.trl = workload, pool, trl
        self.tasks = workload.tasks(number, derive_seed(seed, workload.name))
        self.engines = [worker.handle._actor for worker in pool.workers]
        self.rng = random.Random(derive_seed(seed, workload.name, 1))
        self.traces = self.play([Unknowing(pool)], self.tasks)  # warms up, too
        self.idle = _idle_share()

    def round(self) -> Measured:
        """All variants once."""
        tokens = sum(trace.length for trace in self.traces)
        measured = Measured(tokens, sum(len(trace.chunks) for trace in self.traces))
        variants = ["pool", *self.workload.variants]
        for variant in self.rng.sample(variants, len(variants)):
            if variant != "trl" or self.trl is not None:
                self.measure(variant, measured)
        return measured

    def measure(self, variant: str, measured: Measured) -> None:
        """A variant's part of a round."""
        before, tasks = self.counts(), self.renewed()
        work = self.work(variant, tasks)
        cpu, started = time.process_time(), time.perf_counter()
        traces = work()
        seconds = time.perf_counter() - started
        cpu = time.process_time() - cpu
        after = self.counts()
        measured.seconds[variant] = seconds
        if variant != "trl":  # whose engine is another
            measured.steps[variant] = sum(c.steps for c in after) - sum(c.steps for c in before)
        if variant != "pool":
            return
        hits = sum(c.prefix_hits for c in after) - sum(c.prefix_hits for c in before)
        block = ray.get(self.engines[0].block_size.remote())
        again = measured.chunks - len({task.query for task in tasks})
        measured.hits = hits / (again * (QUERY // block * block))
        measured.driver = 1e6 * (cpu - self.idle * seconds) / measured.chunks
        measured.driver_and_idle = 1e6 * cpu / measured.chunks
        measured.environment = measure_environment(traces, tasks)

    def work(self, variant: str, tasks: list[Task]) -> Callable[[], Any]:
        """What is measured of a variant, ready to begin."""
        if variant == "pool":
            return lambda: self.play([Unknowing(self.pool)], tasks)
        if variant == "naive":
            return lambda: self.play([Naive(engine) for engine in self.engines], tasks)
        if variant == "trl":
            prompts = [list(task.query) for task in tasks]
            return lambda: ray.get(self.trl.play.remote(prompts, tasks[0].spec.budget))
        requests = self.requests(variant, tasks)
        return lambda: ray.get(self.engines[0].play.remote(requests))

    def play(self, policies: Sequence[Any], tasks: list[Task]) -> list[Trace]:
        """Plays all traces; task i asks the policies in turns."""
        traces: list[Trace] = []

        async def play() -> None:
            found = await asyncio.gather(
                *(
                    run_rollout(
                        policies[i % len(policies)], task.spec, task.query, Sampling(1.0, task.seed)
                    )
                    for i, task in enumerate(tasks)
                )
            )
            traces.extend(found)  # asyncio.run makes a text of what is returned, all tokens and all

        asyncio.run(play())
        for trace, task in zip(traces, tasks, strict=True):
            if trace.length != task.spec.budget:
                raise RuntimeError(f"a trace of {trace.length} tokens, not {task.spec.budget}")
        return traces

    def renewed(self) -> list[Task]:
        """The same traces of other queries, which are in no cache yet."""
        new = {
            query: tuple(self.rng.sample(query, len(query)))
            for query in dict.fromkeys(task.query for task in self.tasks)
        }
        return [task._replace(query=new[task.query]) for task in self.tasks]

    def requests(self, order: str, tasks: list[Task]) -> list[Request]:
        """The chunks of the traces that were played, after other queries."""
        numbered = []
        for trace, task in zip(self.traces, tasks, strict=True):
            for i, chunk in enumerate(trace.chunks):
                seed = None if task.seed is None else derive_seed(task.seed, i)
                prompt = [*task.query, *chunk.prompt_ids[QUERY:]]
                numbered.append((i, Request(prompt, len(chunk.output_ids), seed)))
        if order == "in order":
            numbered.sort(key=lambda pair: pair[0])
        elif order == "shuffled":
            self.rng.shuffle(numbered)
        return [request for _, request in numbered]

    def counts(self) -> list[EngineCounts]:
        """What each engine has done so far."""
        found: list[EngineCounts] = ray.get([engine.counts.remote() for engine in self.engines])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slots", type=int, default=64, help="chunks in an engine's batch")
    parser.add_argument("--traces-per-slot", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of an engine")
    parser.add_argument("--only", default="", help="workloads whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the figures go")
    asked = parser.parse_args()
    workloads = [workload for workload in WORKLOADS if asked.only in workload.name]
    if not workloads:
        names = ", ".join(repr(workload.name) for workload in WORKLOADS)
        parser.error(f"--only {asked.only!r} is part of no name: {names}")
    about = {**describe_machine(), **vars(asked)}
    print_machine(about)
    print(f"{asked.slots} slots, {asked.rounds} rounds, seed {asked.seed}\n")
    owns = connect(num_cpus=16)  # reservations, not cores
    try:
        found = [measure(workload, asked) for workload in workloads]
        service = measure_service(asked)
    finally:
        if owns:
            ray.shutdown()
    for line in table(found):
        print(line)
    print(f"\nservice times, least squares: {service['fit']}")
    if asked.json:
        result = {"about": about, "workloads": found, "service": service}
        asked.json.write_text(json.dumps(result, indent=2, default=str) + "\n", encoding="utf-8")


def measure(workload: Workload, asked: argparse.Namespace) -> dict[str, Any]:
    """All rounds of a workload."""
    number = asked.traces_per_slot * asked.slots * workload.num_workers
    rounds, trl, trl_failure = [], None, ""
    with contextlib.ExitStack() as stack:
        stack.enter_context(workers_of(RawEngine))
        pool = stack.enter_context(contextlib.closing(_pool(workload.num_workers, asked)))
        if "trl" in workload.variants:
            try:
                trl = stack.enter_context(
                    run_actor(TrlEngine, locate("toy"), asked.slots, 1, asked.threads, start=False)
                )
            except Exception as error:  # whatever keeps it from running here is told
                trl_failure = str(error).strip().splitlines()[-1]
        bench = Bench(workload, pool, trl, number, asked.seed)
        for turn in range(1, asked.rounds + 1):
            rounds.append(bench.round())
            print(f"{workload.name}, round {turn}: {describe(rounds[-1])}", flush=True)
    return {
        "name": workload.name,
        "num_workers": workload.num_workers,
        "traces": number,
        "rounds": [dataclasses.asdict(measured) for measured in rounds],
        "trl_failure": trl_failure,
    }


def _idle_share() -> float:
    """Of a processor, that this process takes while nothing is sampled."""
    began = time.process_time()
    time.sleep(5)
    return (time.process_time() - began) / 5


def _config(asked: argparse.Namespace) -> WorkerConfig:
    return WorkerConfig(
        model=locate("toy"),
        eos_ids=(),
        max_model_tokens=MAX_MODEL_TOKENS,
        dtype="float32",
        seed=asked.seed,
        on_gpu=False,
        threads=asked.threads,
        kv_cache_gib=1.0,
        gpu_memory_utilization=0.9,
        trust_remote_code=False,
        max_batch_size=asked.slots,
    )


def _pool(num_workers: int, asked: argparse.Namespace) -> RayPool:
    return RayPool(
        locate("toy"),
        eos_ids=(),
        num_workers=num_workers,
        max_model_tokens=MAX_MODEL_TOKENS,
        cpus_per_worker=asked.threads,
        seed=asked.seed,
        max_batch_size=asked.slots,
    )


def measure_service(asked: argparse.Namespace) -> dict[str, Any]:
    """How long a step takes by the size of its batch, and a token of a prompt.

    Returns:
        What was measured, and the constants of ``benchmarks.simulation.ServiceTimes``.
    """
    rng = random.Random(asked.seed)

    def requests(number: int, prompt: int, new: int) -> list[Request]:
        return [
            Request([rng.randrange(2, 16) for _ in range(prompt)], new, rng.randrange(2**31))
            for _ in range(number)
        ]

    batches = sorted({1, max(2, asked.slots // 8), max(3, asked.slots // 2), asked.slots})
    steps, prompts = [], []
    with run_actor(RawEngine, _config(asked)) as actor:
        ray.get(actor.play.remote(requests(asked.slots, 16, 8)))
        for _ in range(asked.rounds):
            for batch in batches:
                seconds = ray.get(actor.play.remote(requests(batch, 16, 4 * CONTEXT)))
                steps.append((batch, seconds / (4 * CONTEXT)))
            for prompt in (16, 768):
                seconds = ray.get(actor.play.remote(requests(16, prompt, 1)))
                prompts.append((16 * prompt, seconds))
    per_sequence, per_step = np.polyfit(*zip(*steps, strict=True), 1)
    per_token, _ = np.polyfit(*zip(*prompts, strict=True), 1)
    fit = {
        "step_seconds": float(per_step),
        "sequence_seconds": float(per_sequence),
        "prefill_seconds": float(per_token),
    }
    return {"steps": steps, "prompts": prompts, "fit": fit}


def describe(measured: Measured) -> str:
    rates = ", ".join(
        f"{k} {measured.tokens / s:,.0f} tokens/s" for k, s in measured.seconds.items()
    )
    steps = ", ".join(f"{k} {n}" for k, n in measured.steps.items())
    return (
        f"{rates}; steps {steps}; driver {measured.driver:.0f} "
        f"(with idle Ray {measured.driver_and_idle:.0f}) + environment {measured.environment:.0f} "
        f"us a chunk; query hits {measured.hits:.2f}"
    )


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    """Medians over the rounds, and of ratios their range."""
    yield (
        "| workload | workers | traces, chunks | pool, tokens/s | of all at once "
        "| the same by steps | of in order | of shuffled | x naive | x TRL "
        "| driver + environment, us a chunk | query hits |"
    )
    yield "|" + " --- |" * 12
    for row in found:
        rounds = row["rounds"]

        def ratio(variant: str, of: str = "seconds", rounds: Any = rounds) -> str:
            ratios = [r[of][variant] / r[of]["pool"] for r in rounds if variant in r[of]]
            if not ratios:
                return ""
            return f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"

        def middle(value: Callable[[Any], float], rounds: Any = rounds) -> float:
            return statistics.median(map(value, rounds))

        yield (
            f"| {row['name']} | {row['num_workers']} | {row['traces']}, {rounds[0]['chunks']} | "
            f"{middle(lambda r: r['tokens'] / r['seconds']['pool']):,.0f} | {ratio('at once')} | "
            f"{ratio('at once', 'steps')} | {ratio('in order')} | {ratio('shuffled')} | "
            f"{ratio('naive')} | {ratio('trl') or row['trl_failure']} | "
            f"{middle(lambda r: r['driver']):.0f} + {middle(lambda r: r['environment']):.0f} | "
            f"{middle(lambda r: r['hits']):.2f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
