"""A data file is a task by its name, in recipes and in every command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from delethink.cli.main import main
from delethink.errors import ConfigError
from delethink.registry import make_task
from delethink.tasks import task_size


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    rows = [{"question": f"What is {i} + {i}?", "answer": 2 * i} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_is_the_task_dataset_with_it(file: Path) -> None:
    task = make_task(str(file), {}, seed=0)
    assert (task_size(task, "train"), task_size(task, "heldout")) == (6, 0)
    assert task.problem("train", 0).prompt.startswith("What is ")


def test_a_share_is_held_out_by_default_or_by_argument(file: Path) -> None:
    assert task_size(make_task(str(file), {}, 0, heldout_share=1.0), "heldout") == 6
    shared = make_task(str(file), {"heldout_share": 0.5}, 0, heldout_share=1.0)
    assert 0 < (task_size(shared, "heldout") or 0) < 6


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope\.jsonl"):
        make_task(str(tmp_path / "nope.jsonl"), {}, seed=0)


def test_the_command_tasks_takes_a_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", str(file), "-n", "1"]) == 0
    assert "train 6, heldout 0" in capsys.readouterr().out
