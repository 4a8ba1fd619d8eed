"""What can be known to be wrong with a recipe before anything heavy is imported."""

from __future__ import annotations

import inspect
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
    _check_engine(recipe)
    run = RunDirectory.create(_output(recipe), dump_recipe(recipe))
    return Prepared(recipe, task, rewards, run)


def _make_task(recipe: Recipe) -> Any:
    make = resolve("delethink.tasks", recipe.task.name)
    signature = inspect.signature(make)
    args = dict(recipe.task.args)
    if "seed" in signature.parameters:
        args.setdefault("seed", recipe.seed)
    try:
        signature.bind(**args)
    except TypeError as problem:
        raise ConfigError(f"task.args of {recipe.task.name!r}: {problem}") from None
    return make(**args)


def _check_engine(recipe: Recipe) -> None:
    """Settings of workers that an engine in this process would ignore are refused."""
    if choose_engine(recipe.engine) == "vllm":
        return
    for key, default in (("num_workers", 1), ("gpus_per_worker", 0.0), ("dtype", "float32")):
        if (value := getattr(recipe, key)) != default:
            raise ConfigError(
                f"{key}={value} is for vLLM's workers; the engine here is transformers, in this "
                f"process, with the trainer's own float32 weights: leave it out or set engine=vllm"
            )


def _output(recipe: Recipe) -> Path:
    if recipe.output is not None:
        return recipe.output.expanduser()
    return Path("runs") / f"{recipe.name}-seed{recipe.seed}-{datetime.now():%Y%m%d-%H%M%S}"
