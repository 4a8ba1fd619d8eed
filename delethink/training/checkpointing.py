"""Checkpoints: whole or not there, made between batches of sampling only.

``transformers``' trainer saves and loads weights, optimizer, scheduler, random states and its own
state. What is added: a checkpoint is written under another name and renamed when all of it is on
the disk, it says which files belong to it, and it holds the state of the job.
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
from delethink.training.run_directory import PART, put_in_place, write_text
from delethink.training.weights import has_adapters, served_weights

# What torch.save says where it cannot write; the system's own reason is lost there.
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "iostream error", "file write failed")
_PREFIX, _STATE, _WRITING = "checkpoint-", "delethink.json", f"writing{PART}"


class Checkpoint(NamedTuple):
    """A whole checkpoint."""

    path: Path
    step: int  # optimizer steps done
    job: dict[str, Any]  # the job's own state


class Found(NamedTuple):
    """What a folder of checkpoints holds."""

    newest: Checkpoint | None
    rejected: list[str]  # names and why, of those that are not whole


def find(folder: Path) -> Found:
    """The newest checkpoint of which every file is there in its full size."""
    numbers = [
        int(number)
        for entry in folder.glob(f"{_PREFIX}*")
        if (number := entry.name.removeprefix(_PREFIX)).isdecimal()
    ]
    rejected: list[str] = []
    for step in sorted(numbers, reverse=True):
        path = folder / f"{_PREFIX}{step}"
        try:
            return Found(Checkpoint(path, step, _read_state(path)), rejected)
        except (OSError, ValueError, KeyError) as error:
            rejected.append(f"{path.name} ({error})")
    return Found(None, rejected)


def remove_unfinished(folder: Path) -> bool:
    """Takes away what a process that was killed while it wrote has left; whether there was any."""
    unfinished = list(folder.glob(f"*{PART}"))
    for path in unfinished:
        shutil.rmtree(path)
    return bool(unfinished)


class AtomicCheckpoints(Trainer):  # type: ignore[misc]  # transformers' trainer is untyped
    """A trainer whose checkpoints are whole, to be mixed into one.

    What it is mixed into says with ``is_between_batches`` when a checkpoint may be made.

    Args:
        job_state: what a checkpoint is to hold beside the trainer's own state.
    """

    def __init__(self, *args: Any, job_state: Callable[[], dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._job_state = job_state
        self._writing: Path | None = None  # where a checkpoint goes at this moment
        self.add_callback(_BetweenBatches(self))

    def save_weights(self, name: str) -> None:
        """Saves the weights alone, whole or not at all.

        Raises:
            RunDirectoryError: they cannot be written.
        """
        folder = Path(self.args.output_dir)
        self._write_whole(folder / name, self._save_served)

    def _save_served(self, path: Path) -> None:
        """A checkpoint that loads like any other; adapters are merged, and beside it alone."""
        model = self.accelerator.unwrap_model(self.model)
        if not has_adapters(model):
            self.save_model(str(path))
            return
        self.save_model(str(path / "adapter"))
        whole = model.get_base_model()
        whole.save_pretrained(path, state_dict=served_weights(whole))
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
                _write_state(part, self.state.global_step, self._job_state())

        self._write_whole(folder / name, write)
        if self.args.should_save:
            rotate_checkpoints(str(folder), self.args.save_total_limit)

    def _write_whole(self, path: Path, write: Callable[[Path], None]) -> None:
        """Has a folder written elsewhere and moves it to where it belongs."""
        writing = path.parent / _WRITING
        try:
            if self.args.should_save:
                shutil.rmtree(writing, ignore_errors=True)
                (writing / path.name).mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            write(writing / path.name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                put_in_place(writing / path.name, path)
                writing.rmdir()
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = _why_not_written(error, path.parent)
            if reason is None:
                raise
            shutil.rmtree(writing, ignore_errors=True)
            raise RunDirectoryError(
                f"cannot write the checkpoint {path}: {reason}; those before are whole: make room, "
                "and the same command goes on from the newest"
            ) from error


class _BetweenBatches(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Puts a checkpoint that is due off until the trainer is between batches."""

    def __init__(self, trainer: AtomicCheckpoints) -> None:
        self._trainer, self._due = trainer, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Decides for ``transformers``, which counts steps only."""
        due = self._due or control.should_save
        control.should_save = due and self._trainer.is_between_batches
        self._due = due and not control.should_save
        return control


def _write_state(path: Path, step: int, job: dict[str, Any]) -> None:
    sizes = {
        str(file.relative_to(path)): file.stat().st_size
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
    write_text(path / _STATE, json.dumps({"step": step, "job": job, "files": sizes}, indent=2))


def _read_state(path: Path) -> dict[str, Any]:
    """The job's state of a checkpoint.

    Raises:
        OSError, ValueError, KeyError: it is not whole.
    """
    if not (path / _STATE).is_file():
        raise ValueError(f"it has no {_STATE}")
    state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    for name, size in state["files"].items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise ValueError(f"{name} is not whole")
    return dict(state["job"])


def _why_not_written(problem: BaseException, folder: Path) -> str | None:
    """What the system said of a file that could not be written; ``None`` for another error.

    The writers of weights and of tensors wrap it into errors of their own.
    """
    while True:
        if isinstance(problem, OSError) and problem.strerror:
            return problem.strerror
        text = str(problem)
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
            if f"os error {code})" in text:
                return os.strerror(code)
        if any(words in text for words in _TORCH_WRITER):
            free = shutil.disk_usage(folder).free
            return f"a file could not be written to its end, with {free / 1e9:.1f} GB free"
        if problem.__cause__ is None and problem.__context__ is None:
            return None
        problem = problem.__cause__ or problem.__context__  # type: ignore[assignment]
