"""Reasons of failed rewards name the line of the user's code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from delethink.scoring import reasons
from delethink.scoring.reasons import MAX_REASON_CHARACTERS, describe

MODULE = """
import json

def outer(value):
    return inner(value)

def inner(value):
    return json.loads(value)["x"]
"""


def reason_of(folder: Path, value: str) -> str:
    path = folder / "my_rewards.py"
    path.write_text(MODULE)
    scope: dict[str, object] = {}
    exec(compile(MODULE, str(path), "exec"), scope)
    with pytest.raises((KeyError, ValueError)) as caught:
        scope["outer"](value)  # type: ignore[operator]
    return describe(caught.value)


def test_the_innermost_line_of_the_users_code_is_named(tmp_path: Path) -> None:
    assert reason_of(tmp_path, "{}") == "KeyError: 'x' (my_rewards.py, line 8, in inner)"


def test_lines_of_installed_code_are_not_named(tmp_path: Path) -> None:
    reason = reason_of(tmp_path, "{")  # raised inside the standard library's json
    assert reason.startswith("JSONDecodeError: ")
    assert reason.endswith("(my_rewards.py, line 8, in inner)")


def test_a_long_message_leaves_room_for_the_place(tmp_path: Path) -> None:
    reason = reason_of(tmp_path, json.dumps("y" * 9)[1:] + "z" * 9000)
    assert len(reason) <= MAX_REASON_CHARACTERS
    assert "my_rewards.py, line 8" in reason


def test_an_exception_without_a_place_or_text() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise ValueError

    assert describe(Broken()) == "Broken: "
    assert describe(ValueError("no")) == "ValueError: no"


def test_a_module_whose_folder_begins_like_the_library_is_the_users() -> None:
    path = f"{Path(reasons.__file__).parents[1]}_rewards.py"
    scope: dict[str, object] = {}
    exec(compile("def broken():\n    raise ValueError('no')", path, "exec"), scope)
    with pytest.raises(ValueError, match="no") as caught:
        scope["broken"]()  # type: ignore[operator]
    assert describe(caught.value).endswith("_rewards.py, line 2, in broken)")
