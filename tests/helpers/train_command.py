"""The ``delethink train`` command on a small variant of the quickstart's recipe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from delethink.training.metrics import EVERY_BATCH, EVERY_STEP, METRICS, find_metric

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "quickstart" / "recipe.yaml"
TOY = ROOT / "delethink" / "assets" / "toy_reasoner"
SMALL = [
    "task.args.min_steps=2",
    "task.args.max_steps=4",
    "thinking.context_size=32",
    "thinking.carryover_size=16",
    "thinking.max_chunks=4",
    "training.max_steps=3",
    "training.per_device_train_batch_size=8",
    "training.gradient_accumulation_steps=2",
    "evaluation.num_problems=16",
    "evaluation.num_problems_at_intervals=8",
    "evaluation.every=2",
]


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "delethink.cli.main", "train", str(RECIPE), *SMALL, *overrides]


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of the tests, with a mark that every process of the run inherits."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "DELETHINK_TEST_RUN": str(folder)}


def run(*overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*overrides),
        cwd=cwd,
        env=environment(cwd),
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )


def assert_one_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("delethink: ")
    for word in words:
        assert word in last


def assert_metrics_are_in_the_table(lines: list[dict[str, Any]]) -> None:
    """Compare the lines of ``metrics.jsonl`` with the table of metrics."""
    for line in lines:
        assert not [key for key in line if find_metric(key) is None]
        rows = {row.key for key in line if (row := find_metric(key))}
        whens = {EVERY_STEP, EVERY_BATCH} if "reward" in line else {EVERY_STEP}
        assert not [row.key for row in METRICS if row.when in whens and row.key not in rows]
