"""The run directory: creation, refusals, files, and the reset for a resume."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delethink.errors import RunDirectoryError
from delethink.training.run_directory import RunDirectory


def test_a_new_run_has_its_recipe_and_versions(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "a: 1\n")
    assert (run.path / "config.yaml").read_text() == "a: 1\n"
    versions = json.loads((run.path / "versions.json").read_text())
    assert {"python", "packages", "git_commit", "processor"} <= set(versions)


def test_a_directory_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, "a: 1\n")
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        RunDirectory.create(tmp_path, "a: 2\n")
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunDirectoryError, match="is not empty"):
        RunDirectory.create(tmp_path, "")


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirectoryError, match="file is a file; choose a directory"):
        RunDirectory.create(tmp_path / "file", "")
    with pytest.raises(RunDirectoryError, match="cannot write the run to"):
        RunDirectory.create(tmp_path / "file" / "run", "")


def test_metrics_are_read_without_an_incomplete_last_line(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "")
    run.add_metrics({"step": 1})
    run.add_metrics({"step": 2})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    assert run.read_metrics() == [{"step": 1}, {"step": 2}]


def test_a_broken_line_of_metrics_is_refused(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "")
    run.add_metrics({"step": 1})
    (run.path / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(RunDirectoryError, match=r"metrics.jsonl, line 1 is not JSON"):
        run.read_metrics()


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


def test_a_run_without_results_is_removed(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "a" / "run", "").discard_if_empty()
    assert list((tmp_path / "a").iterdir()) == []
    mine = RunDirectory.create(tmp_path / "run", "")
    (mine.path / "notes.txt").write_text("x")
    mine.discard_if_empty()
    assert [p.name for p in mine.path.iterdir()] == ["notes.txt"]


def test_the_remains_of_a_killed_start_are_overwritten(tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    (tmp_path / "versions.json.part").write_text('{"pyth')
    (tmp_path / "config.yaml.part").write_text("a:")
    (tmp_path / "config.yaml").touch()  # as a file system leaves it that lost the content
    assert not RunDirectory.holds_run(tmp_path)
    RunDirectory.create(tmp_path, "a: 1\n")
    assert RunDirectory.holds_run(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"


def test_traces_without_a_recipe_are_other_files(tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "step_000001.jsonl").write_text("{}\n")
    with pytest.raises(RunDirectoryError, match=r"is not empty \(traces\)"):
        RunDirectory.create(tmp_path, "")


def test_nan_and_infinity_are_null(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "")
    run.add_metrics({"step": 1, "loss": math.nan, "gradient_norm": math.inf, "reward": 0.5})
    expected = {"step": 1, "loss": None, "gradient_norm": None, "reward": 0.5}
    assert run.read_metrics() == [expected]


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "a: 1\n")
    code = (
        "import sys; from pathlib import Path\n"
        "from delethink.training.run_directory import RunDirectory\n"
        "RunDirectory.reopen(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(run.path)]
    second = subprocess.run(command, capture_output=True, text=True)
    assert "another process is writing to" in second.stderr
    run.release()
    assert subprocess.run(command).returncode == 0


@settings(max_examples=25)  # each example waits for the disk
@given(
    metrics=st.integers(0, 6), traces=st.integers(0, 7), step=st.integers(0, 6), cut=st.booleans()
)
def test_a_reset_moves_later_files_and_loses_none(
    tmp_path_factory: pytest.TempPathFactory, metrics: int, traces: int, step: int, cut: bool
) -> None:
    run = RunDirectory.create(tmp_path_factory.mktemp("a") / "run", "a: 1\n")
    for i in range(1, metrics + 1):
        run.add_metrics({"step": i})
    for i in range(1, traces + 1):
        run.add_traces(i, [{"i": i}])
    if cut:
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 99, "rew')
    run.finish(metrics)
    superseded = run.reset_to(step, "a: 2\n", {"a": [1, 2]})
    assert superseded == list(range(step + 1, max(metrics, traces) + 1))
    assert [m["step"] for m in run.read_metrics()] == list(range(1, min(step, metrics) + 1))
    assert len(list((run.path / "traces").iterdir())) == min(step, traces)
    moved = list(run.path.glob("superseded/*/traces/*.jsonl"))
    assert len(moved) == max(0, traces - step)
    kept = "".join(file.read_text() for file in run.path.glob("superseded/*/metrics.jsonl"))
    assert len(kept.splitlines()) == max(0, metrics - step)
    assert run.finished_step is None
    assert (run.path / "config.yaml").read_text() == "a: 2\n"
    assert run.reset_to(step, "a: 2\n", {}) == []
    lines = (run.path / "resumed.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["changed"] for record in records] == [{"a": [1, 2]}, {}]
    run.add_metrics({"step": step + 1})
    assert run.read_metrics()[-1] == {"step": step + 1}


def test_two_resets_keep_both_sets_of_files(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "")
    for _ in range(2):
        run.add_traces(3, [{"i": 3}])
        run.add_nonfinite(3, [{"i": 3}])
        assert run.reset_to(2, "", {}) == [3]
    names = sorted(folder.name for folder in (run.path / "superseded").iterdir())
    assert names == ["after_step_000002_1", "after_step_000002_2"]
    assert len(list(run.path.glob("superseded/*/traces/*step_000003.jsonl"))) == 4


def test_a_run_with_results_is_kept(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "a: 1\n")
    run.add_metrics({"step": 1})
    run.discard_if_empty()
    assert (run.path / "config.yaml").exists()


def test_the_index_has_the_place_of_every_trace_and_follows_a_reset(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "a: 1\n")
    record = {"prompt": "p", "answer": "a", "reward": 1.0, "stop": "eos", "length": 1, "chunks": []}
    for step in (1, 1, 2):
        run.add_traces(step, [record, {**record, "prompt": "q"}])
    run.add_metrics({"step": 1})

    def places() -> list[list[object]]:
        lines = (run.path / "trace_index.jsonl").read_text().splitlines()
        return [json.loads(line)[:3] for line in lines]

    assert len(places()) == 6
    for name, begin, end in places():
        data = (run.path / str(name)).read_bytes()
        assert json.loads(data[begin:end])["prompt"] in ("p", "q")
    run.reset_to(1, "a: 1\n", {})
    assert {place[0] for place in places()} == {"traces/step_000001.jsonl"}
