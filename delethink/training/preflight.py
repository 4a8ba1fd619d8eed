"""What can be known to be wrong with a recipe before anything heavy is imported."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from delethink.config import Recipe, dump_recipe
from delethink.errors import ConfigError
from delethink.registry import resolve
from delethink.serving.checkpoint import locate
from delethink.serving.factory import choose_engine
from delethink.training.run_directory import RunDirectory


class Prepared(NamedTuple):
    """A recipe whose names are known and whose run directory is made."""

    recipe: Recipe
    task: Any
    rewards: dict[str, Any]  # by name: (stitched text, gold answer) -> float
    run: RunDirectory


def prepare(recipe: Recipe) -> Prepared:
    """Resolves every name of a recipe, then makes its run directory.

    Raises:
        UserError: a name, an argument, a model folder, an engine or an output folder is wrong;
            nothing is left behind.
    """
    rewards = {name: resolve("delethink.rewards", name) for name in recipe.rewards}
    task = _make_task(recipe)
    locate(recipe.model)
    choose_engine(recipe.engine)
    run = RunDirectory.create(_output(recipe), dump_recipe(recipe))
    return Prepared(recipe, task, rewards, run)


def _make_task(recipe: Recipe) -> Any:
    make = resolve("delethink.tasks", recipe.task.name)
    try:
        return make(**{"seed": recipe.seed} | recipe.task.args)
    except TypeError as problem:
        raise ConfigError(f"task.args of {recipe.task.name!r}: {problem}") from None


def _output(recipe: Recipe) -> Path:
    if recipe.output is not None:
        return recipe.output.expanduser()
    return Path("runs") / f"{recipe.name}-seed{recipe.seed}-{datetime.now():%Y%m%d-%H%M%S}"
