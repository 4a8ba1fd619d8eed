"""Atomic checkpoints: complete or absent, written between batches only.

The trainer of ``transformers`` saves and loads weights, optimizer, scheduler, random states and its
own state. A checkpoint here also holds the state of the run and a list of its files with their
sizes. It is written under another name, and renamed when all files are on the disk.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from delethink.errors import RunDirectoryError
from delethink.training.run_directory import PART, move_into_place, write_text
from delethink.training.weights import has_adapters, merged_state_dict

# Messages of torch.save if it cannot write; they do not include the reason of the system.
_TORCH_WRITE_ERRORS = (
    "PytorchStreamWriter",
    "inline_container",
    "iostream error",
    "file write failed",
)
_PREFIX, _STATE_FILE, _WRITING = "checkpoint-", "delethink.json", f"writing{PART}"


class Checkpoint(NamedTuple):
    """A complete checkpoint."""

    path: Path
    step: int  # optimizer steps done
    run_state: dict[str, Any]


def find_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest complete checkpoint, and the names of incomplete ones with reasons.

    A checkpoint is complete if every file exists in its full size.
    """
    steps = [
        int(number)
        for entry in folder.glob(f"{_PREFIX}*")
        if (number := entry.name.removeprefix(_PREFIX)).isdecimal()
    ]
    rejected: list[str] = []
    for step in sorted(steps, reverse=True):
        path = folder / f"{_PREFIX}{step}"
        try:
            return Checkpoint(path, step, _read_state(path)), rejected
        except (OSError, ValueError, KeyError) as error:
            rejected.append(f"{path.name} ({error})")
    return None, rejected


def remove_unfinished(folder: Path) -> bool:
    """Remove checkpoints whose writing was interrupted, and return whether there were any."""
    unfinished = list(folder.glob(f"*{PART}"))
    for path in unfinished:
        shutil.rmtree(path)
    return bool(unfinished)


class AtomicCheckpoints(Trainer):  # type: ignore[misc]  # transformers' trainer is untyped
    """Mixin for trainers: write complete checkpoints.

    The trainer needs an attribute ``is_between_batches``, true when a checkpoint may be written.

    Args:
        run_state: returns the state of the run, to save beside the trainer's own.
    """

    def __init__(self, *args: Any, run_state: Callable[[], dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._run_state = run_state
        self._writing: Path | None = None  # directory of the checkpoint being written
        self.add_callback(_BetweenBatches(self))

    def save_weights(self, name: str) -> None:
        """Save the weights alone, completely or not at all.

        Raises:
            RunDirectoryError: they cannot be written.
        """
        self._write_complete(Path(self.args.output_dir) / name, self._save_merged)

    def _save_merged(self, path: Path) -> None:
        """Save merged weights, which load like any other, and the adapters beside them."""
        model = self.accelerator.unwrap_model(self.model)
        if not has_adapters(model):
            self.save_model(str(path))
            return
        self.save_model(str(path / "adapter"))
        base = model.get_base_model()
        base.save_pretrained(path, state_dict=merged_state_dict(base))
        self.processing_class.save_pretrained(path)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        name = f"{_PREFIX}{self.state.global_step}"

        def write(part: Path) -> None:
            self._writing = part.parent
            try:
                super(AtomicCheckpoints, self)._save_checkpoint(model, trial)
            finally:
                self._writing = None
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                _write_state(part, self.state.global_step, self._run_state())

        self._write_complete(folder / name, write)
        if self.args.should_save:
            rotate_checkpoints(str(folder), self.args.save_total_limit)

    def _write_complete(self, path: Path, write: Callable[[Path], None]) -> None:
        """Call ``write`` with a temporary directory, and move its result to ``path``."""
        writing = path.parent / _WRITING
        try:
            if self.args.should_save:
                shutil.rmtree(writing, ignore_errors=True)
                (writing / path.name).mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            write(writing / path.name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                move_into_place(writing / path.name, path)
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


class _BetweenBatches(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Delay checkpoints until the trainer is between batches."""

    def __init__(self, trainer: AtomicCheckpoints) -> None:
        self._trainer, self._is_due = trainer, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Decide whether to save after this step."""
        is_due = self._is_due or control.should_save
        control.should_save = is_due and self._trainer.is_between_batches
        self._is_due = is_due and not control.should_save
        return control


def _write_state(path: Path, step: int, run_state: dict[str, Any]) -> None:
    sizes = {
        str(file.relative_to(path)): file.stat().st_size
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
    state = {"step": step, "run": run_state, "files": sizes}
    write_text(path / _STATE_FILE, json.dumps(state, indent=2))


def _read_state(path: Path) -> dict[str, Any]:
    """Return the state of the run in a checkpoint.

    Raises:
        OSError, ValueError, KeyError: the checkpoint is incomplete.
    """
    if not (path / _STATE_FILE).is_file():
        raise ValueError(f"{_STATE_FILE} is missing")
    state = json.loads((path / _STATE_FILE).read_text(encoding="utf-8"))
    for name, size in state["files"].items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise ValueError(f"{name} is incomplete")
    return dict(state["run"])


def _write_error(error: BaseException, folder: Path) -> str | None:
    """Return the system's reason why a file could not be written; ``None`` for other errors.

    The writers of weights and tensors wrap the system's error in errors of their own.
    """
    while True:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        text = str(error)
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
            if f"os error {code})" in text:
                return os.strerror(code)
        if any(words in text for words in _TORCH_WRITE_ERRORS):
            free = shutil.disk_usage(folder).free
            return f"a file was not written completely, with {free / 1e9:.1f} GB free"
        cause = error.__cause__ or error.__context__
        if cause is None:
            return None
        error = cause
