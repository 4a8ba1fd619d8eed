"""Predicted against measured time of training steps on this machine, LongCoT and Delethink.

    python scripts/bench_cost.py --out runs/bench_cost [--steps 5] [--traces 64]

Runs the shipped toy reasoner through ``delethink train`` at six lengths for each of two methods,
fits the efficiencies to two of the lengths as ``delethink cost --calibrate`` does, and prints
predicted and measured seconds of a step for all six as a table. A run that is there already is
read, not run again. Nothing else should use the cores meanwhile.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from delethink.cost.calibrate import Measurement, fit
from delethink.cost.estimate import estimate
from delethink.cost.hardware import Efficiency, accelerator
from delethink.cost.model_config import model_shape
from delethink.cost.records import read_steps

LINES = (6, 10, 16, 22, 30, 40)  # steps of the automaton: 15 tokens each, and the answer
FITTED = (10, 30)
BUDGET = 900
METHODS = {
    "LongCoT": [f"thinking.context_size={BUDGET}", "thinking.carryover_size=0", "max_chunks=1"],
    "Delethink": ["thinking.context_size=90", "thinking.carryover_size=45", "max_chunks=19"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5, help="of each run; the first is left out")
    parser.add_argument("--traces", type=int, default=64, help="of a step")
    arguments = parser.parse_args()
    flops, bandwidth = peaks()
    print(f"products of float32 matrices: {flops / 1e9:.0f} GFLOP/s")
    print(f"copying: {bandwidth / 1e9:.1f} GB/s, read and written")
    measured = {
        (method, lines): measure(arguments, method, lines) for method in METHODS for lines in LINES
    }
    chosen = [m for (_, lines), steps in measured.items() if lines in FITTED for m in steps]
    found = fit(chosen, model_shape("toy"), accelerator("cpu"), Efficiency(), "this machine")
    print(f"fitted to {' and '.join(map(str, FITTED))} lines: {found.fitted}")
    print({name: float(f"{getattr(found.efficiency, name):.4g}") for name in found.fitted})
    print("| method | mean tokens | part | measured, s | predicted, s | error | |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    worst = 0.0
    for (method, lines), steps in measured.items():
        for part in ("sampling_seconds", "training_seconds"):
            ours, theirs, tokens = compare(steps, part, found.efficiency)
            error = ours / theirs - 1
            note = "fitted" if lines in FITTED else ""
            worst = worst if note else max(worst, abs(error))
            row = [method, f"{tokens:.0f}", part.split("_")[0], f"{theirs:.2f}", f"{ours:.2f}"]
            print("| " + " | ".join([*row, f"{error:+.1%}", note]) + " |")
    print(f"\nThe largest error at the lengths that were not fitted is {worst:.1%}.")


def measure(arguments: argparse.Namespace, method: str, lines: int) -> list[Measurement]:
    """The timed steps of one run."""
    folder = arguments.out / f"{method.lower()}_{lines}"
    if not (folder / "checkpoints" / "final").exists():
        if folder.exists():
            sys.exit(f"{folder} holds a run that did not end: move it away and run this again")
        size, carry, chunks = METHODS[method]
        settings = [
            size,
            carry,
            f"thinking.{chunks}",
            f"task.args.min_steps={lines}",
            f"task.args.max_steps={lines}",
            f"training.max_steps={arguments.steps}",
            "training.learning_rate=0",  # the lengths stay those of the base
            f"training.per_device_train_batch_size={arguments.traces}",
            "training.gradient_accumulation_steps=1",
            "training.forward_tokens=8192",
            "evaluation.num_problems=2",
            "evaluation.num_problems_at_intervals=2",
            "evaluation.every=1000",
            f"output={folder}",
        ]
        command = [sys.executable, "-m", "delethink.cli.main", "train"]
        started = time.monotonic()
        log = subprocess.run(
            [*command, "recipes/quickstart/recipe.yaml", *settings], capture_output=True, text=True
        )
        if log.returncode:
            sys.exit(log.stdout + log.stderr)
        print(f"# {method}, {lines} lines: {time.monotonic() - started:.0f} s", flush=True)
    return read_steps(folder)


def compare(
    steps: Sequence[Measurement], part: str, efficiency: Efficiency
) -> tuple[float, float, float]:
    """Median predicted and measured seconds of a step, and mean tokens of a trace."""
    timed = [m for m in steps if getattr(m, part)]
    shape, device = model_shape("toy"), accelerator("cpu")
    ours = [
        float(getattr(estimate(shape, m.lengths, m.cut, device, efficiency, m.job), part))
        for m in timed
    ]
    tokens = float(np.mean([float(m.lengths.mean) for m in timed]))
    return float(np.median(ours)), float(np.median([getattr(m, part) for m in timed])), tokens


def peaks() -> tuple[float, float]:
    """FLOPs a second in a large product of matrices, and bytes a second read and written."""
    import torch

    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    big, to = torch.randn(2**26), torch.empty(2**26)
    return 2 * 2048**3 / best(lambda: a @ b), 2 * big.nbytes / best(lambda: to.copy_(big))


def best(call: object) -> float:
    """The shortest of a few times: what else runs can only add to it."""
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        call()  # type: ignore[operator]
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
