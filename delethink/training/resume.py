"""What makes two recipes the same run, so that one can go on where the other was cut short."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from delethink.config import Recipe, load_recipe
from delethink.engines.loading import digest
from delethink.errors import ConfigError, RunDirectoryError, UserError
from delethink.training.run_directory import RunDirectory

# What decides where and how fast a run is made, and not what is sampled or trained on.
_MAY_DIFFER = {
    "output",
    "preflight",
    "scoring.num_verifiers",
    "trainer.cpus_per_rank",
    "training.forward_tokens",
    "training.gradient_checkpointing",
    "training.max_failed_share",
    "training.on_nonfinite",
    "training.report_to",
    "training.save_steps",
    "training.save_total_limit",
    "trainer.gpus_per_rank",
}
_OF_SAMPLING = {
    "engine.name",
    "engine.dtype",
    "engine.chunk_timeout",
    "engine.rollout_timeout",
    "engine.order",
}
_MAX_STEPS, _SCHEDULER = "training.max_steps", "training.lr_scheduler_type"
_PLANNED = ("linear", "cosine")  # learning rates that depend on the number of steps


def load_run(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe of a run directory, to go on there.

    Raises:
        ConfigError: it holds no run, or an override is wrong.
    """
    if not RunDirectory.holds_run(path):
        raise ConfigError(
            f"{path} is a folder without a run in it; give a recipe or a run's folder"
        )
    recipe = load_recipe(path / "config.yaml", overrides or ())
    return recipe.model_copy(update={"output": path})


def changes(path: Path, recipe: Recipe) -> dict[str, list[Any]]:
    """What a resolved recipe has other than the run in a directory: [old, new] by dotted key.

    Raises:
        RunDirectoryError: it is another run; the text names the keys.
    """
    try:
        before = load_recipe(path / "config.yaml")
    except UserError as error:
        raise RunDirectoryError(
            f"{path} holds a run that cannot be taken up, because its config.yaml cannot be read "
            f"({error}); choose another folder with output=PATH"
        ) from None
    old, new = _flat(before.model_dump(mode="json")), _flat(recipe.model_dump(mode="json"))
    changed = {
        key: [old.get(key), new.get(key)]
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }
    wrong = {key for key in changed if not _may_differ(key)}
    if wrong:
        listed = ", ".join(
            f"{key} ({changed[key][0]} there, {changed[key][1]} here)" for key in sorted(wrong)
        )
        raise RunDirectoryError(
            f"{path} holds a run of another recipe: {listed}; give the same values to go on with "
            "it, or choose another folder with output=PATH"
        )
    begun, now = RunDirectory(path).first_weights, digest(recipe.model)
    if None not in (begun, now) and begun != now:
        raise RunDirectoryError(
            f"{path} holds a run that began with other weights than those of {recipe.model} now; "
            "bring them back to go on with it, or choose another folder with output=PATH"
        )
    changed.pop("output", None)
    if _MAX_STEPS in changed:
        _check_max_steps(path, old[_MAX_STEPS], recipe)
    return changed


def _may_differ(key: str) -> bool:
    of_workers = key.startswith("engine.") and key not in _OF_SAMPLING
    return of_workers or key in _MAY_DIFFER or key == _MAX_STEPS


def _check_max_steps(path: Path, old: int, recipe: Recipe) -> None:
    """Steps may be added or left out as long as those that are done would have been the same."""
    new, scheduler = recipe.training.max_steps, recipe.training.lr_scheduler_type
    if scheduler in _PLANNED:
        raise RunDirectoryError(
            f"{path} holds a run of {_MAX_STEPS}={old}, not {new}: with {_SCHEDULER}={scheduler} "
            "the learning rate of every step depends on it; give the same value to go on, or start "
            f"from its weights in another folder: model={path}/checkpoints/final output=PATH"
        )
    metrics = RunDirectory(path).read_metrics()
    done = metrics[-1]["step"] if metrics else 0
    if new < done:
        raise RunDirectoryError(
            f"{path} holds a run that has done {done} steps, more than {_MAX_STEPS}={new}"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key; an empty mapping is one too."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
