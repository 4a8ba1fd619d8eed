"""Every shipped recipe is one that ``delethink train`` takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from delethink.config import load_recipe
from delethink.errors import ConfigError
from delethink.registry import resolve

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*/*.yaml"))


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_parses(path: Path) -> None:
    load_recipe(path, [])


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_its_task_and_rewards_are_registered(path: Path) -> None:
    recipe = load_recipe(path, [])
    resolve("delethink.tasks", recipe.task.name)
    for reward in recipe.rewards:
        resolve("delethink.rewards", reward)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_takes_overrides_and_refuses_unknown_ones(path: Path) -> None:
    assert load_recipe(path, ["seed=7"]).seed == 7
    with pytest.raises(ConfigError, match="seeed"):
        load_recipe(path, ["seeed=7"])


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_has_a_readme_with_its_command(path: Path) -> None:
    readme = path.parent / "README.md"
    assert f"recipes/{name_of(path)}" in readme.read_text("utf-8")


def test_there_is_a_quickstart() -> None:
    assert "quickstart/recipe.yaml" in map(name_of, RECIPES)
