"""A run that is killed and resumed with the same command equals the run that was not killed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import train_command
from train_command import RECIPE, ROOT

pytestmark = pytest.mark.integration

SMALL = [
    *train_command.SMALL,
    "training.max_steps=9",
    "training.save_steps=2",
    "evaluation.num_problems=4",
    "evaluation.num_problems_at_intervals=2",
    "evaluation.every=3",
]
CONSTANT = "training.lr_scheduler_type=constant"


class Launcher:
    """Start ``delethink train`` in children of one process that has imported everything."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "helpers" / "forked_train.py")],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.log = ""  # output of the last run

    def train(
        self,
        folder: Path,
        *overrides: str,
        recipe: Path = RECIPE,
        die_at: Any = None,
        largest_file: int | None = None,
    ) -> int:
        """Run the command and return its exit code; -9 if it was killed."""
        log = folder.parent / f"{folder.name}.log"
        settings = [*SMALL, f"output={folder}"] if recipe == RECIPE else []
        args = ["train", str(recipe), *settings, *overrides]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"args": args, "log": str(log), "die_at": die_at, "largest_file": largest_file}
        print(json.dumps(request), file=self._process.stdin, flush=True)
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
    """Remove the metrics that differ between equal runs."""
    return [
        {key: value for key, value in line.items() if not re.search(r"seconds_|per_second", key)}
        for line in metrics
    ]


def assert_same_run(one: Path, other: Path) -> None:
    assert without_times(read_metrics(one)) == without_times(read_metrics(other))
    assert (one / "table.json").read_text() == (other / "table.json").read_text()
    weights = "checkpoints/final/model.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()
    names = sorted(file.name for file in (one / "traces").iterdir())
    assert names == sorted(file.name for file in (other / "traces").iterdir())
    for name in names:
        assert (one / "traces" / name).read_bytes() == (other / "traces" / name).read_bytes()


def test_killed_at_random_moments_and_resumed(
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
        if code == 0 and killed > 2:
            break
        assert code in (0, -9), launcher.log
        killed += code == -9
        if code == 0:
            shutil.rmtree(folder)
    assert_same_run(folder, undisturbed)


@pytest.mark.slow
def test_adapters_are_resumed_too(launcher: Launcher, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    options = ["training.lora={r: 4}", "training.max_steps=5", "training.learning_rate=1e-2"]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert launcher.train(whole, *options) == 0, launcher.log
    dies = {"path": "traces/step_000004", "count": 1, "delay": 0.0}
    assert launcher.train(folder, *options, die_at=dies) == -9, launcher.log
    assert launcher.train(folder, *options) == 0, launcher.log
    assert "resuming the run after step 2" in launcher.log
    assert without_times(read_metrics(folder)) == without_times(read_metrics(whole))


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["null", "{r: 4}"])
def test_generation_settings_that_transformers_refuses_keep_no_run_from_resuming(
    launcher: Launcher, tmp_path: Path, lora: str
) -> None:
    model = Path(shutil.copytree(ROOT / "delethink" / "assets" / "toy_reasoner", tmp_path / "toy"))
    brought = {"num_return_sequences": 4, "temperature": 0.6, "cache_implementation": "none such"}
    kept = {"eos_token_id": 1, "penalty_alpha": 0.6, "mine": [1]}
    (model / "generation_config.json").write_text(json.dumps(brought | kept))
    options = [f"model={model}", f"training.lora={lora}", "training.save_steps=1", CONSTANT]
    folder = tmp_path / "run"
    assert launcher.train(folder, *options, "training.max_steps=1") == 0, launcher.log
    note = "checkpoints leave out cache_implementation, num_return_sequences, temperature"
    assert note in launcher.log
    assert launcher.train(folder, *options, "training.max_steps=2") == 0, launcher.log
    assert "resuming the run after step 1" in launcher.log
    final = folder / "checkpoints" / "final"
    saved = json.loads((final / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in kept} == kept
    assert not brought.keys() & saved.keys()
    assert launcher.train(tmp_path / "next", f"model={final}", "training.max_steps=1") == 0
    assert "leave out" not in launcher.log


@pytest.fixture
def copy(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(undisturbed, tmp_path / "run"))


def unfinish(folder: Path) -> None:
    """Remove the last row of the table and the mark of a finished run."""
    (folder / "finished.json").unlink()
    rows = json.loads((folder / "table.json").read_text())
    (folder / "table.json").write_text(json.dumps(rows[:-1], indent=2) + "\n")


def last_line(launcher: Launcher) -> str:
    assert "Traceback" not in launcher.log
    return launcher.log.strip().splitlines()[-1]


def test_a_finished_run_says_so_and_changes_nothing(launcher: Launcher, copy: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in copy.rglob("*") if file.name != ".lock"}
    assert launcher.train(copy, CONSTANT) == 0
    assert launcher.log.startswith("the run is finished, after 9 steps")
    assert "after RL, Delethink" in launcher.log
    assert all(file.stat().st_mtime_ns == time for file, time in before.items() if file != copy)


def test_another_recipe_is_refused_before_anything_is_touched(
    launcher: Launcher, copy: Path
) -> None:
    before = (copy / "config.yaml").read_text()
    assert launcher.train(copy, CONSTANT, "seed=1") == 2
    assert "holds a run of another recipe: seed (0 there, 1 here)" in last_line(launcher)
    assert (copy / "config.yaml").read_text() == before
    assert (copy / "finished.json").exists()


def test_a_run_killed_before_its_last_row_only_measures_that(
    launcher: Launcher, copy: Path, undisturbed: Path
) -> None:
    unfinish(copy)
    shutil.rmtree(copy / "checkpoints" / "final")
    assert launcher.train(copy, CONSTANT) == 0, launcher.log
    assert "resuming the run after step 9" in launcher.log
    assert "base, LongCoT: accuracy" not in launcher.log
    assert_same_run(copy, undisturbed)


def test_an_incomplete_checkpoint_is_skipped(
    launcher: Launcher, copy: Path, undisturbed: Path
) -> None:
    unfinish(copy)
    with (copy / "checkpoints" / "checkpoint-9" / "optimizer.pt").open("ab") as file:
        file.truncate(1000)
    assert launcher.train(copy, CONSTANT) == 0, launcher.log
    assert (
        "skipped an incomplete checkpoint: checkpoint-9 (optimizer.pt is incomplete)"
        in launcher.log
    )
    assert "resuming the run after step 8" in launcher.log
    assert_same_run(copy, undisturbed)


def test_a_full_disk_leaves_earlier_checkpoints(
    launcher: Launcher, copy: Path, undisturbed: Path
) -> None:
    unfinish(copy)
    shutil.rmtree(copy / "checkpoints" / "checkpoint-9")
    for limit in (1_000_000, 4_000_000):  # too little for the weights; for the optimizer's state
        assert launcher.train(copy, CONSTANT, largest_file=limit) == 2
        assert "cannot write the checkpoint" in last_line(launcher)
        assert "checkpoint-9: " in last_line(launcher)
        assert "earlier checkpoints are complete" in last_line(launcher)
        kept = sorted(entry.name for entry in (copy / "checkpoints").iterdir())
        assert kept == ["checkpoint-8", "final"]
    assert launcher.train(copy, CONSTANT) == 0, launcher.log
    assert_same_run(copy, undisturbed)


def test_a_finished_run_may_be_given_more_steps(
    launcher: Launcher, copy: Path, undisturbed: Path, tmp_path: Path
) -> None:
    more = "training.max_steps=11"
    assert launcher.train(copy, more, recipe=copy) == 0, launcher.log
    assert "training.max_steps was 9 and is 11 from here on" in launcher.log
    assert "resuming the run after step 9" in launcher.log
    assert json.loads((copy / "finished.json").read_text()) == {"step": 11}
    longer = tmp_path / "longer"
    assert launcher.train(longer, CONSTANT, more) == 0, launcher.log
    weights = "checkpoints/final/model.safetensors"
    assert (copy / weights).read_bytes() == (longer / weights).read_bytes()
    assert (copy / "table.json").read_text() == (longer / "table.json").read_text()
    grown, straight = (without_times(read_metrics(each)) for each in (copy, longer))
    assert grown[8].pop("heldout_accuracy") is None  # after the last step, the table has it
    assert straight[8].pop("heldout_accuracy") is not None
    assert grown == straight


def test_checkpoints_are_written_between_batches_only(launcher: Launcher, tmp_path: Path) -> None:
    twice = ["training.num_iterations=2", "training.save_steps=3", "training.max_steps=8"]
    twice += ["evaluation.every=50"]  # an evaluation updates the engine within a batch
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert launcher.train(whole, *twice) == 0, launcher.log
    assert [line["policy_version"] for line in read_metrics(whole)] == [0, 0, 2, 2, 4, 4, 6, 6]
    dies = {"path": "traces/step_000007", "count": 1, "delay": 0.0}
    assert launcher.train(folder, *twice, die_at=dies) == -9, launcher.log
    kept = sorted(entry.name for entry in (folder / "checkpoints").glob("checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-6"]  # due after steps 3 and 6
    assert launcher.train(folder, *twice) == 0, launcher.log
    assert_same_run(folder, whole)


def test_more_steps_without_a_checkpoint_are_refused(launcher: Launcher, copy: Path) -> None:
    for folder in (copy / "checkpoints").glob("checkpoint-*"):
        shutil.rmtree(folder)
    assert launcher.train(copy, "training.max_steps=11", recipe=copy) == 2
    assert "finished run of 9 steps whose last checkpoint is gone" in last_line(launcher)
    assert len(read_metrics(copy)) == 9
    assert (copy / "finished.json").exists()


def test_a_step_that_is_not_finite_stops_the_run_or_is_skipped(
    launcher: Launcher, tmp_path: Path
) -> None:
    """The reward is so large that the norm of the gradient overflows in groups with a signal."""
    folder, huge = tmp_path / "run", ["rewards={exact: 1.0e+30}", "training.scale_rewards=none"]
    assert launcher.train(folder, *huge) == 1, launcher.log
    said = last_line(launcher)
    assert "a gradient of training is not finite; no weight was changed" in said
    assert "training.on_nonfinite=skip" in said
    kept = next((folder / "traces").glob("nonfinite_step_*.jsonl"))
    assert f"are in {kept}" in said
    assert (
        kept.read_text() == (folder / "traces" / kept.name.removeprefix("nonfinite_")).read_text()
    )

    assert launcher.train(folder, *huge, "training.on_nonfinite=skip") == 0, launcher.log
    assert "training.on_nonfinite was stop and is skip from here on" in launcher.log
    metrics = read_metrics(folder)
    assert [line["step"] for line in metrics] == list(range(1, 10))
    skipped = [line for line in metrics if line["step_skipped"]]
    assert len(skipped) > 2
    assert all(line["loss"] is None and line["gradient_norm"] is None for line in skipped)
    numbers = {int(file.stem[-6:]) for file in (folder / "traces").glob("nonfinite_*")}
    assert numbers == {line["step"] for line in skipped}
    state = json.loads((folder / "checkpoints" / "checkpoint-9" / "delethink.json").read_text())
    assert state["run"]["skipped_steps"] == sorted(numbers)
