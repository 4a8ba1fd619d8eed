"""A run that is killed and started again with the same command is the run that was not killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "quickstart" / "recipe.yaml"
SMALL = [
    "task.args.min_steps=2",
    "task.args.max_steps=4",
    "thinking.context_size=32",
    "thinking.carryover_size=16",
    "thinking.max_chunks=4",
    "training.max_steps=9",
    "training.per_device_train_batch_size=8",
    "training.gradient_accumulation_steps=2",
    "training.save_steps=2",
    "evaluation.num_problems=4",
    "evaluation.num_problems_at_intervals=2",
    "evaluation.every=3",
]
CONSTANT = "training.lr_scheduler_type=constant"
TIMES = ("seconds_", "tokens_per_second")  # what a run that does the same has otherwise


class Launcher:
    """Starts ``delethink train`` in children of one process that has imported everything."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "helpers" / "forked_train.py")],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.log = ""  # of the last run

    def train(
        self, folder: Path, *overrides: str, recipe: Path = RECIPE, die_at: Any = None
    ) -> int:
        """The exit code; minus 9 for one that was killed."""
        log = folder.parent / f"{folder.name}.log"
        settings = [*SMALL, f"output={folder}"] if recipe == RECIPE else []
        args = ["train", str(recipe), *settings, *overrides]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = json.dumps({"args": args, "log": str(log), "die_at": die_at})
        print(request, file=self._process.stdin, flush=True)
        self._process.stdout.readline()
        code = int(self._process.stdout.readline())
        self.log = log.read_text()
        return code

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def undisturbed(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert launcher.train(folder, CONSTANT) == 0, launcher.log
    return folder


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in metrics]


def assert_same_run(one: Path, other: Path) -> None:
    assert without_times(read_metrics(one)) == without_times(read_metrics(other))
    assert (one / "table.json").read_text() == (other / "table.json").read_text()
    weights = "checkpoints/final/model.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()
    names = sorted(file.name for file in (one / "traces").iterdir())
    assert names == sorted(file.name for file in (other / "traces").iterdir())
    for name in names:
        assert (one / "traces" / name).read_bytes() == (other / "traces" / name).read_bytes()


def test_killed_at_random_moments_and_taken_up(
    launcher: Launcher, undisturbed: Path, tmp_path: Path
) -> None:
    rng, folder = random.Random(0), tmp_path / "run"
    writing = {"path": "writing.part", "count": rng.randint(2, 8), "delay": 0.0}
    moments = [
        {"path": str(folder), "count": rng.randint(1, 20), "delay": rng.uniform(0.001, 0.5)}
        for _ in range(4)
    ]
    moments.insert(rng.randrange(5), writing)
    for moment in moments:
        assert launcher.train(folder, CONSTANT, die_at=moment) == -9, launcher.log
        unfinished = (folder / "checkpoints" / "writing.part").exists()
        assert unfinished or moment is not writing
    assert launcher.train(folder, CONSTANT) == 0, launcher.log
    assert_same_run(folder, undisturbed)
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, 10))
    assert not list((folder / "checkpoints").glob("*.part"))
    kept = sorted(entry.name for entry in (folder / "checkpoints").glob("checkpoint-*"))
    assert kept == ["checkpoint-8", "checkpoint-9"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_killed_at_more_moments(
    launcher: Launcher, undisturbed: Path, tmp_path: Path, seed: int
) -> None:
    rng, folder, killed = random.Random(seed), tmp_path / "run", 0
    while True:
        part = rng.choice([str(folder), "writing.part", "checkpoints", ".part", "traces"])
        delay = rng.choice([0.0, rng.uniform(0.0, 1.0)])
        moment = {"path": part, "count": rng.randint(1, 25), "delay": delay}
        code = launcher.train(folder, CONSTANT, die_at=moment)
        if code == 0:
            break
        assert code == -9, launcher.log
        killed += 1
    assert killed
    assert_same_run(folder, undisturbed)
