"""The ``delethink train`` command."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from delethink.cli.process import set_up_process
from delethink.config import Recipe, load_recipe
from delethink.errors import MissingExtraError
from delethink.training.checkpointing import load_run, open_run
from delethink.training.preflight import prepare


def run(recipe_path: str, overrides: list[str]) -> int:
    """Check the recipe before heavy imports, then train."""
    recipe = read_recipe(recipe_path, overrides)
    _require("torch", "transformers", "trl", "datasets", "accelerate", "rich", "matplotlib")
    prepared = prepare(recipe)
    location = open_run(prepared.recipe)
    from delethink.training.progress import TrainingProgress

    progress = TrainingProgress()
    if location.exists and location.directory.finished_step == recipe.training.max_steps:
        progress.finished(location.directory, prepared.recipe.thinking.spec())
        return 0
    set_up_process()
    if recipe.trainer.num_ranks > 1:
        from delethink.training.distributed import train_distributed

        train_distributed(prepared, location, progress, set_up_process)
    else:
        from delethink.training.trainer import train

        train(prepared, location, progress)
    return 0


def read_recipe(path: str, overrides: list[str]) -> Recipe:
    """Return the recipe of a file, or of a run directory to resume."""
    if (folder := Path(path)).is_dir():
        return load_run(folder, overrides)
    return load_recipe(path, overrides)


def _require(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "train")
