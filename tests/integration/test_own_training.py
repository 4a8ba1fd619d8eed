"""The whole way of docs/guide/own_training.md: its files and its commands, in its order.

The default tier takes the shipped toy as the reader's model, with problems in its alphabet. No
pretrained model can be downloaded by a test, so the slow tier takes a folder from a variable:

    DELETHINK_REAL_MODEL=FOLDER pytest -m slow tests/integration/test_own_training.py
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guide_page import blocks, command_lines
from installed import need
from train_command import ROOT, TOY

need("trl", "peft", "tensorboard", "starlette")

PAGE = "own_training.md"
REAL = os.environ.get("DELETHINK_REAL_MODEL")
LINES = command_lines(PAGE)
NUM_PROBLEMS = 80
WAIT_S = 7200  # for a command with a pretrained model on a busy machine
pytestmark = pytest.mark.integration


class Reader:
    """A folder with the reader's four files, and what each command said."""

    def __init__(self, folder: Path, model: Path, is_toy: bool) -> None:
        self.folder = folder
        (folder / "my-model").symlink_to(model.resolve(), target_is_directory=True)
        (folder / "farm.jsonl").write_text("".join(problems(is_toy)))
        (folder / "my_rewards.py").write_text(blocks(PAGE, "python")[0])
        (folder / "farm.yaml").write_text(blocks(PAGE, "yaml")[0])
        self.said: dict[str, str] = {}
        self._launcher = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "helpers" / "forked_train.py")],
            cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, line: str, key: str | None = None, die_at: Any = None) -> int:
        """Run a command in a child with everything imported, and return its exit code."""
        log = self.folder / "command.log"
        name, *arguments = shlex.split(line)
        assert name == "delethink"
        request = {"args": arguments, "log": str(log), "die_at": die_at, "largest_file": None}
        assert self._launcher.stdin is not None
        assert self._launcher.stdout is not None
        print(json.dumps(request), file=self._launcher.stdin, flush=True)
        code = int(self._launcher.stdout.readline())
        self.said[key or line] = log.read_text()
        assert "Traceback" not in log.read_text()
        return code

    def close(self) -> None:
        self._launcher.kill()
        self._launcher.communicate()


def problems(is_toy: bool) -> Iterator[str]:
    """Yield lines of the file; the toy has tokens for digits and colons only."""
    columns = list(json.loads(blocks(PAGE, "json")[0].splitlines()[0]))
    for number in range(NUM_PROBLEMS):
        one, other = number % 9 + 1, number // 9 + 1
        asked = f"{one}:{other}" if is_toy else f"{one} cats and {other} cats are"
        yield json.dumps(dict(zip(columns, (asked, one + other), strict=True))) + "\n"


def find(start: str) -> str:
    """Return the command of the page that begins so."""
    (line,) = [line for line in LINES if line.startswith(start)]
    return line


MODELS = [
    "toy",
    pytest.param(
        "real",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not REAL, reason="DELETHINK_REAL_MODEL names no folder"),
        ],
    ),
]


@pytest.fixture(scope="module", params=MODELS)
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A reader who has interrupted and killed the training and taken it up again."""
    is_toy = request.param == "toy"
    folder = tmp_path_factory.mktemp("reader")
    reader = Reader(folder, TOY if is_toy else Path(str(REAL)), is_toy)
    try:
        for start in ("delethink tasks", "delethink doctor"):
            assert reader.run(find(start), start) == 0, reader.said
        # A step after each checkpoint is complete, and runs again.
        fourth = {"path": "step_000004", "count": 1, "delay": 0, "sign": int(signal.SIGINT)}
        assert reader.run(find("delethink train farm.yaml"), "interrupted", fourth) == 130
        sixth = {"path": "step_000006", "count": 1, "delay": 0}
        again = find("delethink train runs/farm")
        assert reader.run(again, "killed", sixth) == -signal.SIGKILL
        assert reader.run(again, "finished") == 0, reader.said["finished"]
        yield reader
    finally:
        reader.close()


def test_every_command_of_the_page_is_run_here() -> None:
    known = ("delethink tasks", "delethink doctor", "delethink train", "delethink view")
    cluster = ("export RAY", "ray get-auth-token", "ray start", "ray job submit", "ray stop")
    for line in LINES:
        assert line.startswith((*known, *cluster, "tensorboard")), line


def test_the_checks_show_the_prompts_and_find_no_problem(reader: Reader) -> None:
    shown = reader.said["delethink tasks"]
    asked = json.loads((reader.folder / "farm.jsonl").read_text().splitlines()[0])["asked"]
    assert asked[1:2] in shown
    assert "boxed" not in shown
    assert "0 problems" in reader.said["delethink doctor"]
    assert "right is the accuracy" in reader.said["delethink doctor"]


def test_an_interrupt_says_the_command_that_goes_on(reader: Reader) -> None:
    last = reader.said["interrupted"].strip().splitlines()[-1]
    assert last.endswith(find("delethink train runs/farm")), last
    assert "resuming the run after step 2" in reader.said["killed"]
    assert "resuming the run after step 4" in reader.said["finished"]


def test_all_steps_are_there_once_and_the_traces_are_scored_by_the_readers_reward(
    reader: Reader,
) -> None:
    run = reader.folder / "runs" / "farm"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for file in sorted((run / "traces").glob("step_*.jsonl")):
        for line in file.read_text().splitlines():
            trace = json.loads(line)
            assert set(trace["rewards"]) == {"right", "brief"}, trace
            assert trace["rewards"]["brief"] == pytest.approx(1 - trace["length"] / 24)
    assert "<html" in (run / "report.html").read_text()[:500].lower()


def test_tensorboard_shows_each_step_once(reader: Reader) -> None:
    """Its own reader, as a server needs seconds to come up; the browser only draws this."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = shlex.split(find("tensorboard"))
    folder = reader.folder / command[command.index("--logdir") + 1]
    assert len(list(folder.iterdir())) >= 2, "a resumed run begins a file"
    seen = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in seen.Scalars("train/delethink/reward")] == [1, 2, 3, 4, 5, 6]


def test_traces_are_shown_in_a_terminal_and_a_browser(reader: Reader) -> None:
    (shown, text) = [line for line in LINES if line.startswith("delethink view")]
    assert reader.run(text) == 0
    assert "reset" in reader.said[text] or "chunk" in reader.said[text]
    viewer = subprocess.Popen(
        [sys.executable, "-m", "delethink.cli.main", *shlex.split(shown)[1:]],
        cwd=reader.folder,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "BROWSER": "true"},
    )
    try:
        assert viewer.stderr is not None
        found = re.search(r"http://127\.0\.0\.1:\d+/\S+", viewer.stderr.readline())
        assert found is not None
        with urllib.request.urlopen(found[0], timeout=60) as page:
            assert page.status == 200
    finally:
        viewer.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            viewer.wait(60)
        viewer.kill()


def test_the_printed_command_measures_the_trained_model(reader: Reader) -> None:
    (printed,) = re.findall(r"^measure it: (.*)$", reader.said["finished"], re.M)
    assert (reader.folder / "runs" / "farm" / "checkpoints" / "final" / "adapter").is_dir()
    assert reader.run(printed, "eval") == 0, reader.said["eval"]
    (results,) = reader.folder.rglob("results.json")
    rows = json.loads(results.read_text())["rows"]
    assert len({row["model"] for row in rows}) == 2


@pytest.mark.slow
def test_the_same_recipe_runs_as_a_ray_job(reader: Reader) -> None:
    """``ray start`` on ports of its own: the page's ports may be taken, and its ``ray stop`` would
    end every cluster of the machine.
    """
    need("ray", "vllm")
    from ray_head import ray_head

    folder = reader.folder
    text = (ROOT / "runtime_env.yaml").read_text()
    text, changed = re.subn("DELETHINK_OUTPUT: .*", f"DELETHINK_OUTPUT: {folder / 'home'}", text)
    assert changed == 1
    (folder / "runtime_env.yaml").write_text(text)
    name, *arguments = shlex.split(find("ray job submit").replace("$PWD", str(folder)))
    assert name == "ray"
    with ray_head(num_cpus=2) as head:
        done = head.ray(*arguments, cwd=folder, timeout_s=WAIT_S)
    assert done.returncode == 0, done.stdout
    run = folder / "home" / "farm-job"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    assert "Traceback" not in done.stdout
    shutil.rmtree(run)
