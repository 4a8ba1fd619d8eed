"""The run directory: what it refuses, and that what was written stays readable."""

import json
from pathlib import Path

import pytest

from delethink.errors import RunDirectoryError
from delethink.training.run_directory import RunDirectory


def test_it_holds_what_was_asked_and_what_it_ran_on(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "a: 1\n")
    assert (run.path / "config.yaml").read_text() == "a: 1\n"
    versions = json.loads((run.path / "versions.json").read_text())
    assert {"python", "packages", "git_commit", "processor"} <= set(versions)


def test_a_directory_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, "a: 1\n")
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        RunDirectory.create(tmp_path, "a: 2\n")
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"


def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunDirectoryError, match="is not empty"):
        RunDirectory.create(tmp_path, "")


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirectoryError, match="is not empty"):
        RunDirectory.create(tmp_path / "file", "")
    with pytest.raises(RunDirectoryError, match="cannot write the run to"):
        RunDirectory.create(tmp_path / "file" / "run", "")


def test_metrics_are_read_back_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "")
    run.add_metrics({"step": 1})
    run.add_metrics({"step": 2})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    assert run.read_metrics() == [{"step": 1}, {"step": 2}]


def test_traces_of_a_step_are_appended(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "")
    run.add_traces(7, [{"length": 1}])
    run.add_traces(7, [{"length": 2}])
    lines = (run.path / "traces" / "step_000007.jsonl").read_text().splitlines()
    assert [json.loads(line)["length"] for line in lines] == [1, 2]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "")
    (run.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        run.add_metrics({"step": 1})


def test_a_run_that_measured_nothing_is_taken_back(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "a" / "run", "").discard_if_empty()
    assert list((tmp_path / "a").iterdir()) == []
    mine = RunDirectory.create(tmp_path / "run", "")
    (mine.path / "notes.txt").write_text("x")
    mine.discard_if_empty()
    assert [p.name for p in mine.path.iterdir()] == ["notes.txt"]


def test_a_run_that_measured_something_is_kept(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "a: 1\n")
    run.add_metrics({"step": 1})
    run.discard_if_empty()
    assert (run.path / "config.yaml").exists()
