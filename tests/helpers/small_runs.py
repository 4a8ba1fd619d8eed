"""Short runs of the quickstart with several ranks or engines, and what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart" / "recipe.yaml"
SMALL = [
    "output=run",
    "task.args.min_steps=2",
    "task.args.max_steps=4",
    "thinking.context_size=32",
    "thinking.carryover_size=16",
    "thinking.max_chunks=4",
    "training.max_steps=2",
    "training.lr_scheduler_type=constant",
    "training.per_device_train_batch_size=8",
    "training.gradient_accumulation_steps=2",
    "evaluation.num_problems=4",
    "evaluation.num_problems_at_intervals=2",
    "evaluation.every=1",
]
MEASURED = ("reward", "thinking_tokens", "sampled_tokens", "trained_tokens", "heldout_accuracy")
CLOSE = ("loss", "gradient_norm", "entropy", "learning_rate")


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "delethink.cli.main", "train", str(RECIPE)]
    return subprocess.Popen(
        [*command, *SMALL, *overrides],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "DELETHINK_TEST_RUN": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *overrides: str) -> tuple[int, str, str]:
    process = start(folder, *overrides)
    try:
        printed, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    return process.returncode, printed, errors


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]


def texts(folder: Path) -> list[str]:
    files = sorted((folder / "run" / "traces").glob("*.jsonl"))
    return [json.loads(line)["text"] for file in files for line in file.open()]


def assert_nothing_is_left(folder: Path) -> None:
    """Check that every process of the run has ended; Ray's processes end a moment later."""

    def left() -> list[psutil.Process]:
        mark = ("DELETHINK_TEST_RUN", str(folder))
        processes = psutil.process_iter(["environ"])
        return [p for p in processes if mark in (p.info["environ"] or {}).items()]

    psutil.wait_procs(left(), timeout=60)
    assert not left()
