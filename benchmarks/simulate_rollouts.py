"""Simulates the chunk scheduler on a large cluster, in virtual time.

    python benchmarks/simulate_rollouts.py --out docs/benchmarks/rollouts_simulated

By default 512 engines with Qwen2.5-1.5B on H100, one each, and 200,000 traces of heavy-tailed
length; every two minutes a worker dies or hangs. Service times follow from the cost model
(docs/guide/cost.md), whose efficiencies are fitted to the paper's figures for 8 H100. The makespan
is compared with a lower bound: all work spread evenly over full batches without faults, or the
longest trace alone on an engine.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from simulation import (
    Cluster,
    Faults,
    Outcome,
    ServiceTimes,
    Workload,
    simulate,
)

from delethink.chunking import ChunkSpec
from delethink.cost.flops import forward_flops
from delethink.cost.hardware import Efficiency, accelerator
from delethink.cost.memory import cache_bytes
from delethink.cost.models import model_shape
from delethink.cost.timing import moved_weight_bytes
from delethink.engines.scheduler import Rank, rank, slots
from delethink.policy import SchedulingHint
from delethink.training.run_directory import describe_environment

MODEL, DEVICE = "Qwen/Qwen2.5-1.5B", "h100"
SHORTEST, EXPONENT = 2500, 1.1  # of Pareto's distribution, in tokens
QUERY, GROUP = 256, 8  # tokens; traces of a query
DRIVER = 1.2e-3  # seconds of the driver for each chunk, as benchmarks/bench_driver.py measures
MOMENTS = 100  # kept of a course
SHARES = (1, 2, 4, 8)  # divisors of the number of traces


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=512)
    parser.add_argument("--traces", type=int, default=200_000)
    parser.add_argument("--batches", default="16,64", help="chunks that an engine has at a time")
    parser.add_argument("--max-chunks", type=int, default=12)
    parser.add_argument("--faults-every", type=float, default=120.0, help="seconds; 0 for none")
    parser.add_argument("--fault-seeds", type=int, default=3, help="runs with faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="path of the .png and the .json")
    asked = parser.parse_args()
    spec = ChunkSpec(8192, 4096, asked.max_chunks)
    times = modelled_times(spec)
    print(
        f"{asked.workers} workers, {asked.traces} traces of up to {spec.budget} tokens; {times}\n"
    )
    print(
        "| batch | traces | order | seed | workers lost | makespan, s | bound, s | ratio "
        "| chunks/s | scheduler, us a chunk |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for batch in map(int, asked.batches.split(",")):
        for traces, order, faults, seed in plan(asked):
            rows.append(run(asked, spec, times, batch, traces, order, faults, seed))
            print(line(rows[-1]), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"\npeak memory of this process: {peak:.0f} MiB")
    if asked.out:
        result = {
            "about": {**describe_environment(), **vars(asked)},
            "times": dataclasses.asdict(times),
            "lengths": f"Pareto from {SHORTEST} tokens, exponent {EXPONENT}, cut at {spec.budget}",
            "peak_memory_mib": round(peak),
            "runs": rows,
        }
        text = json.dumps(result, default=str)
        asked.out.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        plot(rows, asked.workers, asked.out.with_suffix(".png"))


def plan(asked: argparse.Namespace) -> Iterator[tuple[int, str, float, int]]:
    """Yield traces, order, seconds between faults and seed of each run with one batch size.

    Orders are the pool's two; "known", with every length known from the start; and "first
    boundary", with the length of a trace known from the end of its first chunk.
    """
    every, seed = asked.faults_every, asked.seed
    for share in SHARES:
        yield asked.traces // share, "breadth", 0.0, seed
        yield asked.traces // share, "known", 0.0, seed
    yield asked.traces, "depth", 0.0, seed
    yield asked.traces, "first boundary", 0.0, seed
    for more in range(asked.fault_seeds if every else 0):
        yield asked.traces, "breadth", every, seed + more


def run(
    asked: argparse.Namespace,
    spec: ChunkSpec,
    times: ServiceTimes,
    batch: int,
    traces: int,
    order: str,
    faults_every: float,
    seed: int,
) -> dict[str, Any]:
    """Return the figures of one simulation."""
    rng = np.random.default_rng(seed)
    drawn = SHORTEST * (1 - rng.random(traces)) ** (-1 / EXPONENT)
    workload = Workload(spec, np.minimum(drawn, spec.budget).astype(int).tolist(), QUERY, GROUP)
    chunks = [len(workload.chunks(length)) for length in workload.lengths]

    def rank_of(trace: int, done: int) -> Rank:
        knows = order == "known" or (order == "first boundary" and done > 0)
        known = float(chunks[trace]) if knows else None
        hint = SchedulingHint(None, done, spec.max_chunks, known)
        return rank(hint, "depth" if order == "depth" else "breadth")

    cluster = Cluster(
        asked.workers,
        batch,
        slots=slots(batch),
        times=times,
        driver_seconds=DRIVER,
        faults=Faults(faults_every) if faults_every else None,
    )
    outcome = simulate(workload, cluster, rank_of, seed)
    if set(outcome.ended) != {1} or outcome.left_over:
        raise RuntimeError("a trace was lost or ended twice")
    row = {"batch": batch, "traces": traces, "order": order, "seed": seed}
    row |= {"faults_every": faults_every}
    return row | figures(outcome, asked.workers * batch / times.step(batch))


def figures(outcome: Outcome, peak: float) -> dict[str, Any]:
    """Return the figures of an outcome; ``peak`` is tokens per second with full batches."""
    moments = outcome.course[:: max(1, len(outcome.course) // MOMENTS)]
    rates = [
        (later.tokens - earlier.tokens) / (later.seconds - earlier.seconds) / peak
        for earlier, later in itertools.pairwise(moments)
    ]
    return {
        "makespan": outcome.makespan,
        "bound_work": outcome.bound_work,
        "bound_trace": outcome.bound_trace,
        "ratio": outcome.ratio,
        "chunks": outcome.completions,
        "chunks_per_second": outcome.completions / outcome.makespan,
        "driver_share": outcome.driver_busy / outcome.makespan,
        "scheduler_us": 1e6 * outcome.scheduler_seconds / outcome.completions,
        "failures": outcome.failures,
        "rescheduled": outcome.rescheduled,
        "query_hits": outcome.query_hits / outcome.completions,
        "most_kept": max(m.waiting + m.in_flight for m in outcome.course),
        "seconds": [round(m.seconds, 1) for m in moments[1:]],
        "share_of_peak": [round(rate, 3) for rate in rates],
        "unfinished": [len(outcome.ended) - m.ended for m in moments[1:]],
    }


def line(row: dict[str, Any]) -> str:
    """Return a row of the printed table."""
    bound = max(row["bound_work"], row["bound_trace"])
    return (
        f"| {row['batch']} | {row['traces']} | {row['order']} | {row['seed']} "
        f"| {row['failures']} | {row['makespan']:.0f} "
        f"| {bound:.0f} | {row['ratio']:.3f} | {row['chunks_per_second']:.0f} "
        f"| {row['scheduler_us']:.1f} |"
    )


def modelled_times(spec: ChunkSpec) -> ServiceTimes:
    """Return the times of the cost model, at the mean context of a later chunk."""
    shape, device, efficiency = model_shape(MODEL), accelerator(DEVICE), Efficiency()
    context = QUERY + (spec.carryover_size + spec.context_size) / 2
    rate = device.bandwidth * efficiency.bandwidth
    cache = float(cache_bytes(shape, context, device.dtype_bytes))
    weights = float(moved_weight_bytes(shape, 1, device.dtype_bytes))
    prompt = QUERY + spec.carryover_size
    prefill = float(forward_flops(shape, 0, prompt, 1)) / prompt
    return ServiceTimes(
        step_seconds=weights / rate + efficiency.step_seconds,
        sequence_seconds=cache / rate + efficiency.token_seconds,
        prefill_seconds=prefill / (device.peak_flops * efficiency.prefill),
    )


def plot(rows: list[dict[str, Any]], workers: int, path: Path) -> None:
    """Plot the largest run over time, and makespan / bound of all runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    most = max(row["traces"] for row in rows)
    batches = sorted({row["batch"] for row in rows})
    for index, batch in enumerate(batches):
        whole = [r for r in rows if r["batch"] == batch and r["traces"] == most]
        for faulty, style in ((False, "-"), (True, ":")):
            some = [r for r in whole if r["order"] == "breadth" and bool(r["failures"]) == faulty]
            for row in some[:1]:
                label = f"batch {batch}, {row['failures'] or 'no'} workers lost"
                shares = (row["seconds"], row["share_of_peak"])
                left.plot(*shares, style, color=f"C{index}", label=label)
        for order, style in (("breadth", "-"), ("known", "--")):
            points = sorted(
                (r["traces"] / (workers * batch), r["ratio"])
                for r in rows
                if (r["batch"], r["order"], r["failures"]) == (batch, order, 0)
            )
            label = f"batch {batch}, {order}"
            right.plot(
                *zip(*points, strict=True), style, marker=".", color=f"C{index}", label=label
            )
        lost = [(most / (workers * batch), r["ratio"]) for r in whole if r["failures"]]
        if lost:
            label = f"batch {batch}, with faults"
            right.plot(*zip(*lost, strict=True), "x", color=f"C{index}", label=label)
    left.set(xlabel="virtual seconds", ylabel="tokens/s, share of full batches", ylim=(0, 1.1))
    left.set_title(f"{workers} workers, {most:,} traces, breadth", fontsize=10)
    left.legend(fontsize=7)
    right.axhline(1.05, color="black", linewidth=0.6)
    right.set(xscale="log", xlabel="traces per slot of a batch", ylabel="makespan / bound")
    right.set_ylim(bottom=1)
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
