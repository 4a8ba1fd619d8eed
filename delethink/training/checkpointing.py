"""Checkpoints, and the rules by which a run is resumed from its newest one.

The trainer of ``transformers`` saves and loads weights, optimizer, scheduler, random states and its
own state. A checkpoint here also holds the state of the run and a list of its files with their
sizes. Checkpoints are complete or absent: a folder gets its name when all files are on the disk.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from delethink.config import Recipe, dump_recipe, load_recipe
from delethink.engines.loading import digest
from delethink.engines.weight_files import check_values
from delethink.errors import ConfigError, ModelError, RunDirectoryError, UserError
from delethink.json_io import (
    as_mapping,
    get_count,
    get_ids,
    get_mapping,
    read_json,
)
from delethink.output import output_path
from delethink.redaction import hidden_settings, hide_settings, json_text
from delethink.registry import search_folder, searched_folders
from delethink.training.run_directory import (
    PART,
    TRAINED_SETTING,
    RunDirectory,
    move_into_place,
    write_text,
)

if TYPE_CHECKING:
    from delethink.training.progress import TrainingProgress

FINAL_CHECKPOINT = "final"
CHECKPOINT_PREFIX = "checkpoint-"
_STATE_FILE, _WRITING = "delethink.json", f"writing{PART}"

# Messages of torch.save for a failed write; they do not include the reason of the system.
_TORCH_WRITE_ERROR = "PytorchStreamWriter|inline_container|iostream error|file write failed"

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
    f"engine.{key}" for key in ("name", "dtype", "chunk_timeout", "rollout_timeout", "order")
}
_MAX_STEPS = "training.max_steps"

# -- the run directory of a recipe -------------------------------------------------------------


class RunLocation(NamedTuple):
    """The directory of a run."""

    directory: RunDirectory
    exists: bool  # the run was started before
    changed: dict[str, list[Any]]  # [old, new] value of each changed setting, by dotted key


def load_run(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a run directory, to resume the run there.

    Raises:
        ConfigError: the directory holds no run, or an override is wrong.
    """
    if not RunDirectory.holds_run(path):
        raise ConfigError(
            f"{path} is a directory without a run; give a recipe or the directory of a run"
        )
    for folder in RunDirectory(path).module_folders:
        search_folder(folder)
    recipe = load_recipe(path / "config.yaml", overrides)
    if hidden := hidden_settings(recipe.model_dump(mode="json")):
        raise ConfigError(
            f"{path / 'config.yaml'} does not hold the secrets of the run: to resume it, give "
            f"{' '.join(f'{key}=VALUE' for key in hidden)}"
        )
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
        directory = RunDirectory.create(
            path, dump_recipe(recipe), digest(recipe.model), searched_folders()
        )
        return RunLocation(directory, False, {})
    changed = changed_settings(path, recipe)
    return RunLocation(RunDirectory.reopen(path), True, changed)


def changed_settings(path: Path, recipe: Recipe) -> dict[str, list[Any]]:
    """Return the [old, new] values of settings that a run and a recipe do not share, by dotted key.

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
    old, new = (_flatten(hide_settings(each.model_dump(mode="json"))) for each in (before, recipe))
    changed = {
        key: [old.get(key), new.get(key)]
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }
    wrong = [
        f"{key} ({there} there, {here} here)"
        for key, (there, here) in changed.items()
        if key not in _MAY_CHANGE | {_MAX_STEPS}
        and (not key.startswith("engine.") or key in _ENGINE_MUST_MATCH)
    ]
    if wrong:
        raise RunDirectoryError(
            f"{path} holds a run of another recipe: {', '.join(wrong)}; give the same values to "
            "resume it, or choose another directory with output=PATH"
        )
    directory = RunDirectory(path)
    first, now = directory.first_weights, digest(recipe.model)
    if None not in (first, now) and first != now:
        raise RunDirectoryError(
            f"{path} holds a run of other initial weights than those of {recipe.model} now; "
            "restore them to resume it, or choose another directory with output=PATH"
        )
    changed.pop("output", None)
    if _MAX_STEPS in changed:
        _check_max_steps(directory, old[_MAX_STEPS], recipe)
    return changed


def _check_max_steps(directory: RunDirectory, old: int, recipe: Recipe) -> None:
    """Refuse another number of steps if the steps done so far would have been different."""
    new, schedule = recipe.training.max_steps, recipe.training.lr_scheduler_type
    if schedule in ("linear", "cosine"):  # over all steps
        raise RunDirectoryError(
            f"{directory.path} holds a run of {_MAX_STEPS}={old}, not {new}; with "
            f"training.lr_scheduler_type={schedule} the learning rate of every step depends on it: "
            "give the same value to resume the run, or start from its weights in another "
            f"directory: model={directory.checkpoints / FINAL_CHECKPOINT} output=PATH"
        )
    metrics = directory.read_metrics()
    if metrics and new < (done := metrics[-1]["step"]):
        raise RunDirectoryError(
            f"{directory.path} holds a run that has done {done} steps, more than {_MAX_STEPS}={new}"
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


# -- checkpoints -------------------------------------------------------------------------------


class Checkpoint(NamedTuple):
    """A complete checkpoint."""

    path: Path
    step: int  # optimizer steps done
    run_state: dict[str, Any]


def resume(location: RunLocation, recipe: Recipe, progress: TrainingProgress) -> Checkpoint | None:
    """Reset a run directory to its newest complete checkpoint, and return the checkpoint.

    Without one, the run starts at the first step.

    Raises:
        RunDirectoryError: the run is finished and its last checkpoint is gone, or a file cannot be
            written.
    """
    directory = location.directory
    for unfinished in directory.checkpoints.glob(f"*{PART}"):
        shutil.rmtree(unfinished)
        progress.log("removed an incomplete checkpoint")
    checkpoint = _newest_checkpoint(directory.checkpoints, progress)
    step = checkpoint.step if checkpoint else 0
    finished = directory.finished_step
    if finished is not None and step < finished:
        raise RunDirectoryError(
            f"{directory.path} holds a finished run of {finished} steps whose last checkpoint is "
            f"gone; to train further, start from its weights: "
            f"model={directory.checkpoints / FINAL_CHECKPOINT} output=PATH"
        )
    for key, (old, new) in location.changed.items():
        progress.log(f"{key} was {old} and is {new} from here on")
    rows = directory.read_table()
    if step < recipe.training.max_steps or _MAX_STEPS in location.changed:
        rows = [row for row in rows if row["setting"] != TRAINED_SETTING]
    directory.write_table(rows)
    superseded = directory.reset_to(step, dump_recipe(recipe), location.changed)
    start = f"after step {step}" if step else "from the first step, as there is no checkpoint"
    progress.log(f"resuming the run {start}")
    if superseded:
        progress.log(
            f"moved the files of {len(superseded)} later steps, up to step {superseded[-1]}, to "
            f"{directory.path / 'superseded'}; these steps run again"
        )
    return checkpoint


def _newest_checkpoint(folder: Path, progress: TrainingProgress) -> Checkpoint | None:
    """Return the newest checkpoint of which every file exists in its full size."""
    numbers = [
        path.name.removeprefix(CHECKPOINT_PREFIX) for path in folder.glob(f"{CHECKPOINT_PREFIX}*")
    ]
    for step in sorted((int(number) for number in numbers if number.isdecimal()), reverse=True):
        path = folder / f"{CHECKPOINT_PREFIX}{step}"
        try:
            if not (path / _STATE_FILE).is_file():
                raise ValueError(f"{_STATE_FILE} is missing")
            found = read_json(path / _STATE_FILE, RunDirectoryError)
            state = as_mapping(found, _STATE_FILE)
            for name, size in get_mapping(state, "files").items():
                if not (path / name).is_file() or (path / name).stat().st_size != size:
                    raise ValueError(f"{name} is incomplete")
            run_state = get_mapping(state, "run")
            get_count(get_mapping(run_state, "prompts"), "next")
            get_ids(run_state, "skipped_steps")
        except (OSError, ValueError, KeyError) as error:
            progress.log(f"skipped an incomplete checkpoint: {path.name} ({error})")
            continue
        _check_weights(path)
        return Checkpoint(path, step, run_state)
    return None


def _check_weights(path: Path) -> None:
    """Refuse a checkpoint whose weights cannot be read or are not finite."""
    try:
        check_values(sorted(path.glob("*.safetensors")))
    except ModelError as error:
        raise RunDirectoryError(
            f"cannot resume from the checkpoint {path.name}: {error}. To resume from an earlier "
            f"one, or from the first step, delete {path}"
        ) from None


def write_run_state(path: Path, step: int, run_state: dict[str, Any]) -> None:
    """Write the state of the run into a checkpoint, with a list of its files."""
    sizes = {
        str(file.relative_to(path)): file.stat().st_size
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
    state = {"step": step, "run": run_state, "files": sizes}
    write_text(path / _STATE_FILE, json_text(state, indent=2))


@contextmanager
def complete_folder(path: Path, is_writer: bool, wait: Callable[[], None]) -> Iterator[Path]:
    """Let all ranks fill a temporary folder, and rename the folder when they are done.

    ``is_writer`` is true on the rank that creates and moves it, and ``wait`` waits for all ranks.

    Raises:
        RunDirectoryError: a file cannot be written.
    """
    from safetensors import SafetensorError

    writing = path.parent / _WRITING
    part = writing / path.name
    try:
        if is_writer:
            shutil.rmtree(writing, ignore_errors=True)
            part.mkdir(parents=True)
        wait()
        yield part
        wait()
        if is_writer:
            move_into_place(part, path)
            writing.rmdir()
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _write_error(error, path.parent)
        if reason is None:
            raise
        shutil.rmtree(writing, ignore_errors=True)
        raise RunDirectoryError(
            f"cannot write the checkpoint {path}: {reason}; earlier checkpoints are complete: "
            "free some space, and the same command resumes from the newest"
        ) from error


def _write_error(error: BaseException, folder: Path) -> str | None:
    """Return the system's reason why a file could not be written; ``None`` for other errors."""
    while True:  # the writers of weights and tensors wrap the system's error in their own
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        text = str(error)
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
            if f"os error {code})" in text:
                return os.strerror(code)
        if re.search(_TORCH_WRITE_ERROR, text):
            free = shutil.disk_usage(folder).free
            return f"a file was not written completely, with {free / 1e9:.1f} GB free"
        cause = error.__cause__ or error.__context__
        if cause is None:
            return None
        error = cause
