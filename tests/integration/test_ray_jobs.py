"""``ray job submit`` of the quickstart recipe with the shipped runtime environment."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from installed import need
from processes import wait_until

need("ray", "vllm")

from ray_head import RayHead, ray_head  # noqa: E402

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
RUNTIME_ENV = ROOT / "runtime_env.yaml"
TRAIN = ["delethink", "train", "recipes/quickstart/recipe.yaml"]
SMALL = [
    "task.args.min_steps=2",
    "task.args.max_steps=4",
    "thinking.context_size=32",
    "thinking.carryover_size=16",
    "thinking.max_chunks=4",
    "training.per_device_train_batch_size=8",
    "training.gradient_accumulation_steps=2",
    "evaluation.num_problems=8",
    "evaluation.every=1000",
]
STEPS = 4  # of a run that is stopped after the first
RUN = ("/delethink train", "VllmWorker", "EngineCore")  # in the commands of what a run starts


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head(num_cpus=2) as head:
        yield head


def submit(*arguments: str) -> list[str]:
    return ["job", "submit", "--runtime-env", "runtime_env.yaml", *arguments]


def test_a_mistake_in_a_recipe_fails_the_job_with_one_sentence(head: RayHead) -> None:
    done = head.ray(*submit("--", *TRAIN, "trainning.max_steps=3"), cwd=ROOT)
    assert done.returncode == 1
    assert "unknown key 'trainning'. Did you mean 'training'?" in done.stdout
    assert "failed with exit code 2" in done.stdout
    assert "Traceback" not in done.stdout


JUNK = [
    *[".git/config", ".venv/pyvenv.cfg", "venv/pyvenv.cfg", "runs/a/metrics.jsonl"],
    *["model/model.safetensors", "model/pytorch_model.bin", "checkpoints/step/optimizer.pt"],
    *["envs/__pycache__/x.cpython-311.pyc", ".mypy_cache/x", "wandb/x", "data/train.parquet"],
]
KEPT = ["recipes/quickstart/recipe.yaml", "model/config.json", "envs/own.py", "my_rewards.py"]


def test_a_job_gets_code_and_no_weights_and_its_results_may_not_be_lost_with_it(
    head: RayHead, tmp_path: Path
) -> None:
    for name in (*JUNK, *KEPT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", dirs_exist_ok=True)
    toy = "delethink/assets/toy_reasoner/model.safetensors"
    # Whole, because a job imports what lies in its working directory.
    bytecode = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "delethink", tmp_path / "delethink", ignore=bytecode, dirs_exist_ok=True)
    text, changed = re.subn("DELETHINK_OUTPUT: .*", "OTHER: x", RUNTIME_ENV.read_text())
    assert changed == 1
    (tmp_path / "runtime_env.yaml").write_text(text)

    script = f"find . -type f; {' '.join(TRAIN)} output=here"
    done = head.ray(*submit("--", "bash", "-c", script), cwd=tmp_path)
    assert done.returncode == 1
    sent = set(re.findall(r"^\./(\S+)$", done.stdout, flags=re.MULTILINE))
    assert sent >= {toy, *KEPT}
    assert not sent & set(JUNK)
    assert "would go to here in the job's working directory" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.slow
def test_a_stopped_job_leaves_no_worker_and_no_engine_and_the_same_command_goes_on(
    head: RayHead, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    steps = [f"training.max_steps={STEPS}", "training.save_steps=1"]
    command = [*TRAIN, *SMALL, *steps, "engine=vllm", f"output={run}"]
    job = head.start(*submit("--submission-id", "half", "--", *command), cwd=ROOT)
    try:
        while not (run / "metrics.jsonl").exists():
            assert job.poll() is None, job.communicate()
            time.sleep(0.2)
        started = head.processes(*RUN)
        engines = head.processes("EngineCore")
        folders = {process.cwd() for process in started}
        stopped = stop_in_the_middle(head, "half")
        followed, _ = job.communicate(timeout=120)
    finally:
        job.kill()
    assert "was stopped" in stopped
    assert "starting the engine: vllm" in followed
    # Following ends with the job, and may miss what it says last.
    logs = head.ray("job", "logs", "half").stdout
    assert "delethink: interrupted; everything written so far is complete" in logs
    assert len(engines) == 1
    assert len(folders) == 1, "the workers run in the files of the job, uploaded once"
    assert "working_dir_files" in folders.pop()
    psutil.wait_procs(started, timeout=60)
    assert not head.processes(*RUN)
    before = steps_of(run)

    done = head.ray(*submit("--", *command), cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "after RL, Delethink" in done.stdout
    assert 0 < len(before) < STEPS
    assert steps_of(run) == list(range(1, STEPS + 1))
    assert not head.processes(*RUN)


def stop_in_the_middle(head: RayHead, job: str) -> str:
    """Stops a job that stands still until the command has come so far: else it might be done."""
    (trainer,) = [p for p in head.processes(RUN[0]) if "python" in Path(p.exe()).name]
    trainer.suspend()
    try:
        stop = head.start("job", "stop", job)
        wait_until(lambda: is_pending(trainer, signal.SIGTERM) or stop.poll() is not None)
    finally:
        trainer.resume()
    said, _ = stop.communicate(timeout=300)
    return said


def is_pending(process: psutil.Process, sign: signal.Signals) -> bool:
    """Whether a signal has been sent to a process that stands still."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (pending,) = re.findall(r"^ShdPnd:\s*(\S+)", status, flags=re.MULTILINE)
    return bool(int(pending, 16) >> (sign - 1) & 1)


def steps_of(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_job_trains_to_its_table_in_the_folder_that_the_runtime_environment_names(
    head: RayHead, tmp_path: Path
) -> None:
    env = tmp_path / "runtime_env.yaml"
    named = f"DELETHINK_OUTPUT: {tmp_path}"
    text, changed = re.subn("DELETHINK_OUTPUT: .*", named, RUNTIME_ENV.read_text())
    assert changed == 1
    env.write_text(text)
    commit = ["env", "DELETHINK_COMMIT=1a2b"]
    command = [*commit, *TRAIN, *SMALL, "training.max_steps=2", "output=run"]
    done = head.ray("job", "submit", "--runtime-env", str(env), "--", *command, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "after RL, Delethink" in done.stdout
    assert f"run directory: {tmp_path / 'run'}" in done.stdout
    assert steps_of(tmp_path / "run") == [1, 2]
    versions = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert versions["git_commit"] == "1a2b"
