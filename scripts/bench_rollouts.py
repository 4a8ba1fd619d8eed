"""How much of an engine's throughput rollouts keep, as ratios within one run.

    python scripts/bench_rollouts.py                  # a quarter of an hour on two idle cores
    python scripts/bench_rollouts.py --rounds 1 --slots 16 --json out.json

The toy reasoner in real vLLM engines, on Ray workers. No token ends an answer, so every chunk has
the length that it was given, and all variants do the same work:

  pool     the traces through RayPool, as training and evaluation play them
  at once  the very same requests (prompt, limit, seed) given to one engine of the same settings all
           at once, trace by trace, which no rollout could do: the ceiling
  in order the same at once by the number of the chunk, which is the pool's order: on a CPU the
           requests of a query go faster side by side, and a trace's own are of one query
  naive    a task for each trace, chunk after chunk, with traces pinned to workers in turns
  trl      TRL's own vLLM generation, for LongCoT

Rounds take the variants in turns, the engines of both sides stay up, and every round has prompts
of its own, so that no prefix cache knows them. A ratio is the median of the rounds' ratios. Seconds
are those of a machine that may have other work; how many steps an engine takes for the same tokens
is not, and tells how full its batches were.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from delethink.cli.process import set_up_process

set_up_process()

import numpy as np  # noqa: E402
import ray  # noqa: E402
from rollout_workloads import (  # noqa: E402
    CONTEXT,
    GROUP,
    MOST_CHUNKS,
    QUERY,
    WORKLOADS,
    Task,
    Workload,
    measure_environment,
)

from delethink.policy import Completion, Progress, Sampling  # noqa: E402
from delethink.rollout import derive_seed, play_trace  # noqa: E402
from delethink.serving.checkpoint import locate  # noqa: E402
from delethink.serving.exchange import EngineCounts  # noqa: E402
from delethink.serving.ray_calls import connect  # noqa: E402
from delethink.serving.ray_pool import RayPool  # noqa: E402
from delethink.serving.vllm_worker import (  # noqa: E402
    VllmWorker,
    WorkerConfig,
    _sampling_params,
)
from delethink.training.run_directory import describe_environment  # noqa: E402
from delethink.types import StopReason, Trace  # noqa: E402

MAX_MODEL_TOKENS = 1024


class Request(NamedTuple):
    """A chunk as an engine is asked for it."""

    prompt: list[int]
    new: int
    seed: int | None


class RawEngine(VllmWorker):
    """An engine with the settings of the pool's, and nothing around it."""

    async def play(self, requests: Sequence[Request]) -> float:
        """Seconds for all requests, given to the engine at once."""
        started = time.perf_counter()
        await asyncio.gather(*(self.one(request) for request in requests))
        return time.perf_counter() - started

    async def one(self, request: Request) -> Completion:
        """A single request."""
        params = _sampling_params(request.new, 1.0, request.seed, ())
        prompt = {"prompt_token_ids": request.prompt}
        name = f"{id(request)}-{time.perf_counter_ns()}"
        async for output in self._engine.generate(prompt, params, name):
            last = output.outputs[0]
        return Completion(tuple(last.token_ids), tuple(last.logprobs.logprobs), StopReason.LENGTH)

    async def counts(self) -> EngineCounts:
        """All that it has done so far."""
        counts: EngineCounts = self._counter.counts()
        return counts

    async def block_size(self) -> int:
        """Tokens of a block of the prefix cache."""
        return int(self._engine.vllm_config.cache_config.block_size)


class TrlEngine:
    """TRL's own vLLM generation, in the mode that shares the trainer's process."""

    def __init__(self, model: str, slots: int, kv_cache_gib: int, threads: int) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "TORCH_COMPILE_DISABLE": "1",
            "OMP_NUM_THREADS": str(threads),
            "TRL_EXPERIMENTAL_SILENCE": "1",
        }
        import torch

        torch.set_num_threads(threads)
        from accelerate import Accelerator
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl.generation.vllm_generation import VLLMGeneration

        self.generation = VLLMGeneration(
            AutoModelForCausalLM.from_pretrained(model),
            Accelerator(cpu=True),
            AutoTokenizer.from_pretrained(model),
            mode="colocate",
            max_model_length=MAX_MODEL_TOKENS,
            max_num_seqs=slots,
            temperature=1.0,
            generation_kwargs={"ignore_eos": True, "detokenize": False},
        )

    def play(self, prompts: list[list[int]], new: int) -> float:
        """Seconds for prompts that all get the same number of new tokens."""
        self.generation.max_completion_length = new
        started = time.perf_counter()
        _, completions, _, _ = self.generation.generate(prompts, None, 1)
        seconds = time.perf_counter() - started
        if any(len(ids) != new for ids in completions):
            raise RuntimeError("TRL sampled another number of tokens than it was asked for")
        return seconds


class Naive:
    """Implements the policy protocol over one worker: a call for each chunk."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    async def generate(self, prompt: Any, new: int, sampling: Sampling) -> Completion:
        """As the engine does."""
        request = Request(list(prompt), new, sampling.seed)
        completion: Completion = await self.actor.one.remote(request)
        return completion


class Unknowing:
    """Hides from the pool how long a trace will be, as nobody knows it of a real one."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    async def generate(self, prompt: Any, new: int, sampling: Sampling) -> Completion:
        """As the engine does."""
        known = sampling.progress or Progress()
        progress = Progress(known.query, known.num_chunks, MOST_CHUNKS)
        sampling = Sampling(sampling.temperature, sampling.seed, progress)
        completion: Completion = await self.policy.generate(prompt, new, sampling)
        return completion


@dataclasses.dataclass
class Measured:
    """One round of a workload."""

    tokens: int
    chunks: int
    seconds: dict[str, float]
    steps: dict[str, int]  # of the engines, which other work on the machine does not change
    driver: float = (
        0.0  # microseconds of the driver's processor for each chunk: pool, Ray, rollouts
    )
    driver_and_idle: float = 0.0  # the same with what Ray's threads take while nothing happens
    environment: float = 0.0  # the same of the environment
    hits: float = 0.0  # query tokens found in prefix caches, of those that could be


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
    about = {**describe_environment(), "load": os.getloadavg(), **vars(asked)}
    print(f"{about['processor']}, load {about['load'][0]:.1f}; commit {about['git_commit']}; ")
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
    """All rounds of a workload; the first, which is small, warms up."""
    number = asked.traces_per_slot * asked.slots * workload.num_workers
    rounds, trl_failure = [], ""
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(contextlib.closing(_pool(workload.num_workers, asked)))
        raw = [
            stack.enter_context(_actor(RawEngine, _config(asked)))
            for _ in range(workload.num_workers)
        ]
        trl = None
        if "trl" in workload.variants:
            try:
                trl = stack.enter_context(
                    _actor(TrlEngine, locate("toy"), asked.slots, 1, asked.threads, start=False)
                )
            except Exception as problem:  # whatever keeps it from running here is told
                trl_failure = str(problem).strip().splitlines()[-1]
        idle = 0.0
        for turn in range(asked.rounds + 1):
            seed = derive_seed(asked.seed, workload.name, turn)
            tasks = workload.tasks(number if turn else GROUP * workload.num_workers, seed)
            measured = _round(workload, tasks, pool, raw, trl, idle)
            idle = idle or _idle_share()
            if turn:
                rounds.append(measured)
                print(f"{workload.name}, round {turn}: {describe(measured)}", flush=True)
    return {
        "name": workload.name,
        "num_workers": workload.num_workers,
        "traces": number,
        "rounds": [dataclasses.asdict(measured) for measured in rounds],
        "trl_failure": trl_failure,
    }


def _round(
    workload: Workload, tasks: list[Task], pool: RayPool, raw: list[Any], trl: Any, idle: float
) -> Measured:
    before, steps = _hits(pool), {"pool": -_steps(pool)}
    cpu, started = time.process_time(), time.perf_counter()
    traces = _play([Unknowing(pool)], tasks)
    seconds = {"pool": time.perf_counter() - started}
    cpu = time.process_time() - cpu
    steps["pool"] += _steps(pool)
    chunks = sum(len(trace.chunks) for trace in traces)
    for trace, task in zip(traces, tasks, strict=True):
        if trace.length != task.spec.budget:
            raise RuntimeError(f"a trace of {trace.length} tokens, not {task.spec.budget}")
    if "at once" in workload.variants:
        requests = [
            r for trace, task in zip(traces, tasks, strict=True) for r in _requests(trace, task)
        ]
        earlier = ray.get(raw[0].counts.remote()).steps
        seconds["at once"] = ray.get(raw[0].play.remote(requests))
        steps["at once"] = ray.get(raw[0].counts.remote()).steps - earlier
    if "in order" in workload.variants:
        numbered = [
            (i, _unseen(request))
            for trace, task in zip(traces, tasks, strict=True)
            for i, request in enumerate(_requests(trace, task))
        ]
        requests = [request for _, request in sorted(numbered, key=lambda pair: pair[0])]
        seconds["in order"] = ray.get(raw[0].play.remote(requests))
    if "naive" in workload.variants:
        other = [task._replace(query=task.query[::-1]) for task in tasks]  # in no cache yet
        started = time.perf_counter()
        _play([Naive(actor) for actor in raw], other)
        seconds["naive"] = time.perf_counter() - started
    if trl is not None:
        prompts = [list(task.query) for task in tasks]
        seconds["trl"] = ray.get(trl.play.remote(prompts, tasks[0].spec.budget))
    block = ray.get(raw[0].block_size.remote())
    queries = len({task.query for task in tasks})
    return Measured(
        tokens=sum(trace.length for trace in traces),
        chunks=chunks,
        seconds=seconds,
        steps=steps,
        driver=1e6 * (cpu - idle * seconds["pool"]) / chunks,
        driver_and_idle=1e6 * cpu / chunks,
        environment=measure_environment(traces, tasks),
        hits=(_hits(pool) - before) / ((chunks - queries) * (QUERY // block * block)),
    )


def _play(policies: Sequence[Any], tasks: list[Task]) -> list[Trace]:
    """Plays all traces; task i asks the policies in turns."""
    traces: list[Trace] = []

    async def play() -> None:
        found = await asyncio.gather(
            *(
                play_trace(
                    policies[i % len(policies)], task.spec, task.query, Sampling(1.0, task.seed)
                )
                for i, task in enumerate(tasks)
            )
        )
        traces.extend(found)  # asyncio.run makes a text of what is returned, all tokens and all

    asyncio.run(play())
    return traces


def _requests(trace: Trace, task: Task) -> Iterator[Request]:
    for i, chunk in enumerate(trace.chunks):
        seed = None if task.seed is None else derive_seed(task.seed, i)
        yield Request(list(chunk.prompt_ids), len(chunk.output_ids), seed)


def _unseen(request: Request) -> Request:
    """The same with another query of the same tokens, which is in no cache yet."""
    query, rest = request.prompt[:QUERY], request.prompt[QUERY:]
    return request._replace(prompt=[*query[1:], query[0], *rest])


def _idle_share() -> float:
    """Of a processor, that this process takes while nothing is sampled."""
    began = time.process_time()
    time.sleep(5)
    return (time.process_time() - began) / 5


def _steps(pool: RayPool) -> int:
    return sum(worker.counts.steps for worker in pool.workers)


def _hits(pool: RayPool) -> int:
    return sum(worker.counts.prefix_hits for worker in pool.workers)


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


@contextlib.contextmanager
def _actor(kind: Any, *arguments: Any, start: bool = True) -> Iterator[Any]:
    actor = ray.remote(max_concurrency=10_000 if start else 1, num_cpus=1)(kind).remote(*arguments)
    try:
        ray.get(actor.start.remote() if start else actor.__ray_ready__.remote())
        yield actor
    finally:
        if start:
            ray.get(actor.stop.remote())
        ray.kill(actor)


def measure_service(asked: argparse.Namespace) -> dict[str, Any]:
    """How long a step takes by the size of its batch, and a token of a prompt.

    Returns:
        What was measured, and the constants of ``delethink.serving.simulation.ServiceTimes``.
    """
    rng = random.Random(asked.seed)

    def requests(number: int, prompt: int, new: int) -> list[Request]:
        return [
            Request([rng.randrange(2, 16) for _ in range(prompt)], new, rng.randrange(2**31))
            for _ in range(number)
        ]

    batches = sorted({1, max(2, asked.slots // 8), max(3, asked.slots // 2), asked.slots})
    steps, prompts = [], []
    with _actor(RawEngine, _config(asked)) as actor:
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
        "| the same by steps | of all at once in order | x naive | x TRL "
        "| driver + environment, us a chunk | query hits |"
    )
    yield "|" + " --- |" * 11
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
            f"{ratio('at once', 'steps')} | {ratio('in order')} | "
            f"{ratio('naive')} | {ratio('trl') or row['trl_failure']} | "
            f"{middle(lambda r: r['driver']):.0f} + {middle(lambda r: r['environment']):.0f} | "
            f"{middle(lambda r: r['hits']):.2f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
