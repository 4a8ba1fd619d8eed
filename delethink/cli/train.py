"""``delethink train``."""

from __future__ import annotations

import os
import warnings

from delethink.config import load_recipe
from delethink.errors import MissingExtraError


def run(recipe_path: str, overrides: list[str]) -> int:
    """Checks the recipe before anything heavy is imported, then trains."""
    recipe = load_recipe(recipe_path, overrides)
    _quieten()
    try:
        from delethink.training.progress import Reporter
        from delethink.training.run import train
    except ModuleNotFoundError as missing:
        raise MissingExtraError(missing.name or "a package", "train") from None
    train(recipe, Reporter())
    return 0


def _quieten() -> None:
    """Keeps the libraries' own chatter off the screen; a value the user has set stays."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # The workers call vLLM themselves; TRL's own use of it, which this is about, is off.
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
