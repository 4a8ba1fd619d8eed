"""The examples of docs/ and README are what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from delethink.config import load_recipe
from delethink.registry import names

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "tasks_and_rewards.md").read_text("utf-8")
RECIPE: dict[str, Any] = {
    "name": "documented",
    "model": "toy",
    "task": {"name": "automaton"},
    "thinking": {"context_size": 96, "carryover_size": 48, "max_chunks": 8, "head_size": 0},
    "training": {"max_steps": 1, "num_generations": 4},
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_an_example_is_a_recipe(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | yaml.safe_load(text)))
    load_recipe(path)


@pytest.mark.parametrize("text", blocks("python"))
def test_an_example_runs(text: str) -> None:
    exec(compile(text, "docs/tasks_and_rewards.md", "exec"), {})


@pytest.mark.parametrize("group", ["tasks", "rewards"])
def test_every_name_is_in_a_table(group: str) -> None:
    for name in names(f"delethink.{group}"):
        assert re.search(rf"^\|.*`{name}(?:/NAME)?`.*\|", TEXT, flags=re.MULTILINE), name
