"""The ``delethink train`` command."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from delethink.cli.process import require_packages, set_up_process
from delethink.output import Waiting, open_console

if TYPE_CHECKING:
    from delethink.config import Recipe


def run(arguments: argparse.Namespace) -> int:
    """Check the recipe before heavy imports, then train."""
    waiting = Waiting(open_console(), "reading the recipe")
    try:
        return _run(arguments, waiting)
    finally:
        waiting.stop()


def _run(arguments: argparse.Namespace, waiting: Waiting) -> int:
    recipe = read_recipe(arguments.recipe, arguments.values)
    packages = ("torch", "transformers", "trl", "datasets", "accelerate", "rich", "matplotlib")
    require_packages("train", *packages)
    set_up_process()
    # Imported here because they load torch, which reads its variables at import.
    from delethink.training.checkpointing import open_run
    from delethink.training.preflight import prepare

    prepared = prepare(recipe)
    location = open_run(prepared.recipe)
    from delethink.training.progress import TrainingProgress

    waiting.stop()
    progress = TrainingProgress()
    folder = location.directory.path
    if location.exists and location.directory.finished_step == recipe.training.max_steps:
        progress.finished(location.directory, prepared.recipe.thinking.spec())
        return 0
    try:
        if recipe.trainer.uses_ray_train:
            from delethink.training.distributed import train_distributed

            train_distributed(prepared, location, progress, set_up_process)
        else:
            from delethink.training.startup import train

            train(prepared, location, progress)
    except KeyboardInterrupt:
        if not location.directory.holds_run(folder):
            raise
        raise KeyboardInterrupt(f"go on with: delethink train {shlex.quote(str(folder))}") from None
    return 0


def read_recipe(path: str, overrides: list[str]) -> Recipe:
    """Return the recipe of a file, or of a run directory to resume."""
    from delethink.config import load_recipe

    if (folder := Path(path)).is_dir():
        from delethink.training.checkpointing import load_run

        return load_run(folder, overrides)
    return load_recipe(path, overrides)
