"""``delethink train`` on several ranks under Ray Train: the same run, and no process left."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from small_runs import CLOSE, MEASURED, assert_nothing_is_left, metrics, run, start, texts

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("own_ray")]

REWARDS = "def broken(text):\n    return text.nonsense\n"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    code, _, errors = run(folder)
    assert code == 0, errors
    return folder


@pytest.mark.slow  # test_ranks compares two ranks with one without Ray
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_give_the_run_of_one(alone: Path, tmp_path: Path, strategy: str) -> None:
    code, printed, errors = run(tmp_path, "trainer.num_ranks=2", f"trainer.strategy={strategy}")
    assert code == 0, errors
    assert f"starting 2 ranks: {strategy}" in printed
    assert printed.strip().endswith("run directory: " + str(tmp_path / "run"))
    assert texts(tmp_path) == texts(alone)
    for one, two in zip(metrics(alone), metrics(tmp_path), strict=True):
        assert {key: two[key] for key in MEASURED} == {key: one[key] for key in MEASURED}
        for key in CLOSE:
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), key
        assert two["trained_tokens"] + two["tokens_left_out"] == two["sampled_tokens"]
        assert two["traces_by_process"] == [8, 8]
        assert 0.9 < two["balance"] <= 1
    saved = tmp_path / "run" / "checkpoints" / "final" / "model.safetensors"
    assert saved.stat().st_size == (alone / saved.relative_to(tmp_path)).stat().st_size
    assert_nothing_is_left(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_run_of_two_ranks_is_resumed(alone: Path, tmp_path: Path, strategy: str) -> None:
    together = ["trainer.num_ranks=2", f"trainer.strategy={strategy}"]
    for steps in (1, 2):
        code, printed, errors = run(tmp_path, *together, f"training.max_steps={steps}")
        assert code == 0, errors
    assert "resuming the run after step 1" in printed
    assert texts(tmp_path) == texts(alone)
    for one, two in zip(metrics(alone), metrics(tmp_path), strict=True):
        for key in CLOSE:
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), key


@pytest.mark.slow
def test_an_error_of_a_rank_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    broken = "rewards={exact: 1.0, broken: {reward: 'my_rewards:broken', isolated: false}}"
    code, _, errors = run(tmp_path, "trainer.num_ranks=2", broken, "preflight=warn")
    assert code == 1, errors
    assert "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("delethink: 16 of 16 traces failed or could not be scored")
    assert_nothing_is_left(tmp_path)


@pytest.mark.slow
def test_an_interrupt_ends_all_ranks(tmp_path: Path) -> None:
    process = start(tmp_path, "trainer.num_ranks=2", "training.max_steps=500")
    written = tmp_path / "run" / "metrics.jsonl"
    try:
        while not written.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert all(json.loads(line) for line in written.read_text().splitlines())
    assert_nothing_is_left(tmp_path)


def test_more_ranks_than_cores_are_refused(tmp_path: Path) -> None:
    number = 2 ** (len(os.sched_getaffinity(0)) + 1).bit_length()
    sizes = [f"training.per_device_train_batch_size={number}", "training.num_generations=2"]
    code, _, errors = run(tmp_path, f"trainer.num_ranks={number}", *sizes)
    assert code == 2, errors
    assert f"num_ranks={number} ranks need {number} CPUs" in errors
    assert not (tmp_path / "run").exists()
