"""The run directory of a recipe, and the settings allowed to change when a run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from delethink.config import Recipe, dump_recipe, load_recipe
from delethink.engines.loading import digest
from delethink.errors import ConfigError, RunDirectoryError, UserError
from delethink.output import output_path
from delethink.training.run_directory import RunDirectory

# Settings of speed, memory and storage, which change neither the traces nor the training.
_MAY_CHANGE = {
    "output",
    "preflight",
    "scoring.num_verifiers",
    "trainer.cpus_per_rank",
    "trainer.gpus_per_rank",
    "training.forward_tokens",
    "training.gradient_checkpointing",
    "training.max_failed_share",
    "training.on_nonfinite",
    "training.report_to",
    "training.save_steps",
    "training.save_total_limit",
}
# Settings of the engine with an effect on the traces; all others may change.
_ENGINE_MUST_MATCH = {
    "engine.name",
    "engine.dtype",
    "engine.chunk_timeout",
    "engine.rollout_timeout",
    "engine.order",
}
_MAX_STEPS = "training.max_steps"
_SCHEDULES_OVER_ALL_STEPS = ("linear", "cosine")


class RunLocation(NamedTuple):
    """The directory of a run."""

    directory: RunDirectory
    exists: bool  # the run was started before
    changed: dict[str, list[Any]]  # [old, new] value of each changed setting, by dotted key

    def is_finished(self, recipe: Recipe) -> bool:
        """Return whether the run has all steps of the recipe and its table."""
        return self.exists and self.directory.finished_step == recipe.training.max_steps


def load_run(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Return the recipe of a run directory, to resume the run there.

    Raises:
        ConfigError: the directory holds no run, or an override is wrong.
    """
    if not RunDirectory.holds_run(path):
        raise ConfigError(
            f"{path} is a directory without a run; give a recipe or the directory of a run"
        )
    recipe = load_recipe(path / "config.yaml", overrides or ())
    return recipe.model_copy(update={"output": path})


def run_path(recipe: Recipe) -> Path:
    """Return the run directory of a recipe: ``output``, or a new one under ``runs``."""
    name = f"{recipe.name}-seed{recipe.seed}-{datetime.now():%Y%m%d-%H%M%S}"
    return output_path(recipe.output or Path("runs") / name)


def open_run(recipe: Recipe) -> RunLocation:
    """Create the run directory of a resolved recipe, or open an existing one.

    Raises:
        RunDirectoryError: the directory cannot be written, or holds other files or another run.
    """
    path = run_path(recipe)
    if not RunDirectory.holds_run(path):
        directory = RunDirectory.create(path, dump_recipe(recipe), digest(recipe.model))
        return RunLocation(directory, False, {})
    changed = changed_settings(path, recipe)
    return RunLocation(RunDirectory.reopen(path), True, changed)


def changed_settings(path: Path, recipe: Recipe) -> dict[str, list[Any]]:
    """Compare a resolved recipe with the recipe of the run in a directory.

    Returns:
        The [old, new] values of different settings, by dotted key.

    Raises:
        RunDirectoryError: the initial weights differ, or a setting not allowed to.
    """
    try:
        before = load_recipe(path / "config.yaml")
    except UserError as error:
        raise RunDirectoryError(
            f"cannot resume the run in {path}, because its config.yaml cannot be read ({error}); "
            "choose another directory with output=PATH"
        ) from None
    old, new = _flatten(before.model_dump(mode="json")), _flatten(recipe.model_dump(mode="json"))
    changed = {
        key: [old.get(key), new.get(key)]
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }
    if wrong := [key for key in changed if not _may_change(key)]:
        listed = ", ".join(
            f"{key} ({changed[key][0]} there, {changed[key][1]} here)" for key in wrong
        )
        raise RunDirectoryError(
            f"{path} holds a run of another recipe: {listed}; give the same values to resume it, "
            "or choose another directory with output=PATH"
        )
    first, now = RunDirectory(path).first_weights, digest(recipe.model)
    if None not in (first, now) and first != now:
        raise RunDirectoryError(
            f"{path} holds a run of other initial weights than those of {recipe.model} now; "
            "restore them to resume it, or choose another directory with output=PATH"
        )
    changed.pop("output", None)
    if _MAX_STEPS in changed:
        _check_max_steps(path, old[_MAX_STEPS], recipe)
    return changed


def _may_change(key: str) -> bool:
    is_of_engine = key.startswith("engine.") and key not in _ENGINE_MUST_MATCH
    return is_of_engine or key in _MAY_CHANGE or key == _MAX_STEPS


def _check_max_steps(path: Path, old: int, recipe: Recipe) -> None:
    """Refuse another number of steps if the steps done so far would have been different."""
    new, schedule = recipe.training.max_steps, recipe.training.lr_scheduler_type
    if schedule in _SCHEDULES_OVER_ALL_STEPS:
        raise RunDirectoryError(
            f"{path} holds a run of {_MAX_STEPS}={old}, not {new}; with "
            f"training.lr_scheduler_type={schedule} the learning rate of every step depends on it: "
            "give the same value to resume the run, or start from its weights in another "
            f"directory: model={path}/checkpoints/final output=PATH"
        )
    metrics = RunDirectory(path).read_metrics()
    done = metrics[-1]["step"] if metrics else 0
    if new < done:
        raise RunDirectoryError(
            f"{path} holds a run that has done {done} steps, more than {_MAX_STEPS}={new}"
        )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves by dotted key; an empty mapping is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
