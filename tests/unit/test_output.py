from __future__ import annotations

from pathlib import Path

import pytest

from delethink.errors import ConfigError
from delethink.output import output_path

JOB = "session_1/runtime_resources/working_dir_files/_ray_pkg_1"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("DELETHINK_OUTPUT", raising=False)
    (tmp_path / JOB).mkdir(parents=True)


@pytest.mark.parametrize(
    ("variable", "asked", "found"),
    [
        (None, "runs/a", "runs/a"),
        (None, "~/a", "/home/somebody/a"),
        ("", "a", "a"),
        ("/data", "runs/a", "/data/runs/a"),
        ("~/delethink", "a", "/home/somebody/delethink/a"),
        ("/data", "/elsewhere/a", "/elsewhere/a"),
        ("/data", "~/a", "/home/somebody/a"),
    ],
)
def test_relative_paths_start_from_the_folder_that_the_environment_names(
    variable: str | None, asked: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv("DELETHINK_OUTPUT", variable)
    assert output_path(asked) == Path(found)


@pytest.mark.parametrize("variable", [None, "", "here"])
def test_results_of_a_ray_job_do_not_go_where_they_are_deleted(
    variable: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / JOB)
    if variable is not None:
        monkeypatch.setenv("DELETHINK_OUTPUT", variable)
    with pytest.raises(ConfigError, match="set DELETHINK_OUTPUT to a permanent folder"):
        output_path("runs/a")
    with pytest.raises(ConfigError, match="absolute output path"):
        output_path(tmp_path / JOB / "a")
    assert output_path("/data/a") == Path("/data/a")
    monkeypatch.setenv("DELETHINK_OUTPUT", "/data")
    assert output_path("a") == Path("/data/a")
