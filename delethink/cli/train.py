"""``delethink train``."""

from __future__ import annotations

import importlib.util

from delethink.cli.process import set_up_process
from delethink.config import load_recipe
from delethink.errors import MissingExtraError
from delethink.training.preflight import prepare


def run(recipe_path: str, overrides: list[str]) -> int:
    """Checks the recipe before anything heavy is imported, then trains."""
    recipe = load_recipe(recipe_path, overrides)
    _require("torch", "transformers", "trl", "datasets", "accelerate", "rich", "matplotlib")
    prepared = prepare(recipe)
    set_up_process()
    from delethink.training.progress import Reporter
    from delethink.training.run import train

    train(prepared, Reporter())
    return 0


def _require(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "train")
