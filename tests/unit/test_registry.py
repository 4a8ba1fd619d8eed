"""Names: shipped ones, families, and objects of the user's own."""

from __future__ import annotations

from importlib import invalidate_caches
from pathlib import Path
from typing import Any

import pytest

from delethink import registry
from delethink.envs.automaton import AutomatonTask
from delethink.errors import ConfigError
from delethink.registry import make_task, resolve


def test_a_name_with_a_colon_is_an_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_rewards.py").write_text("def good(text): return 1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    assert resolve("delethink.rewards", "my_own_rewards:good")("x") == 1.0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no_such_module:good", "no module 'no_such_module' for the reward"),
        ("json.no_such:good", "no module 'json.no_such'"),
        ("json:no_such_function", "json .*json/__init__.py. has no 'no_such_function'. Allowed: "),
        ("json:dump_", "Did you mean 'dump'"),
        (":", "written module:object"),
        ("json:", "written module:object"),
        ("my rewards:good", "written module:object"),
    ],
)
def test_an_object_that_is_not_there_is_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        resolve("delethink.rewards", name)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def good(:\n    pass\n", "invalid syntax .faulty_0.py, line 1."),
        ("import re\n\nLIMIT = limmit\n", "NameError: name 'limmit' .* .faulty_1.py, line 3."),
        ("\nimport not_installed_here\n", "No module named 'not_inst.* .faulty_2.py, line 2."),
    ],
    ids=["syntax", "name", "import"],
)
def test_a_fault_in_a_users_module_is_a_sentence_with_its_line(
    text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"faulty_{reason.partition('faulty_')[2][0]}"
    (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        resolve("delethink.rewards", f"{module}:good")


def test_a_mistyped_module_beside_the_recipe_gets_the_nearest_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "grading_of_mine.py").write_text("def good(text): return 1.0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        resolve("delethink.rewards", "grading_of_mina:good")
    assert "Did you mean 'grading_of_mine'?" in str(caught.value)
    assert "Searched: the installed packages, " in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_task_gets_the_seed_it_takes() -> None:
    args = {"min_steps": 1, "max_steps": 3}
    assert make_task("automaton", args, 7) == AutomatonTask(1, 3, seed=7)
    assert make_task("automaton", args | {"seed": 2}, 7) == AutomatonTask(1, 3, seed=2)


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        ("automatn", {}, "Did you mean 'automaton'"),
        ("automaton", {"min_steps": 1}, "needs 'max_steps'"),
        ("automaton", {"widht": 3}, "Did you mean 'width'"),
        ("automaton", {"min_steps": "few", "max_steps": 3}, "must be whole numbers, got"),
        (
            "reasoning_gym/chain_sum",
            {"template": 3},
            "the task 'reasoning_gym/chain_sum': argument",
        ),
        ("automaton/x", {"min_steps": 1, "max_steps": 2}, "has no members"),
    ],
)
def test_mistakes_are_explained(name: str, args: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make_task(name, args, 0)


def test_installed_packages_are_looked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each evaluated trace asks for a name, and a look takes longer than the trace's own work."""
    looks = []
    monkeypatch.setattr(registry, "entry_points", lambda **wanted: looks.append(wanted) or ())
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(3):
        resolve("delethink.rewards", "exact")
    assert looks == [{"group": "delethink.rewards"}]


def test_a_package_that_is_installed_meanwhile_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="unknown task 'late'"):
        resolve("delethink.tasks", "late")
    metadata = tmp_path / "theirs-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[delethink.tasks]\nlate = delethink.envs.automaton:AutomatonTask\n"
    )
    invalidate_caches()
    assert resolve("delethink.tasks", "late") is AutomatonTask
