"""What an evaluation writes: append-only lines, one a trace, and what it was asked.

A line is written when its trace has ended, in one call, so that a killed process loses what was in
flight and leaves at most one line cut short, which the next one takes back. What was sampled goes
to a file of its own, before the line, so that results are read without it: its last line for a
trace counts.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from delethink.errors import RunDirectoryError
from delethink.tokens import as_list

_TRACES = "traces.jsonl"
_TOKENS = "tokens.jsonl"
_SETTINGS = "settings.json"


class Place(NamedTuple):
    """Which trace: a sample of a problem in a setting."""

    setting: str  # its key
    problem: int
    sample: int


@dataclass(frozen=True, slots=True)  # there are many
class Outcome:
    """A trace at one budget.

    ``vote`` is the answer in a form in which equal
    ones are equal, ``None`` where there is none.
    """

    budget: int
    score: float  # 1 or 0
    length: int  # thinking tokens
    chunks: int
    processed: int  # tokens of all prompts and outputs: what an engine without a cache reads
    out_of_budget: bool
    vote: str | None
    forced: bool = False  # the answer was asked for when the budget was spent


@dataclass(frozen=True, slots=True)
class Record:
    """A line: a trace with its outcome at every budget, or why there is none."""

    place: Place
    outcomes: tuple[Outcome, ...]
    query_tokens: int
    started: float  # seconds since the epoch
    ended: float
    error: str | None = None
    output_ids: tuple[tuple[int, ...], ...] = ()  # of each chunk; in a file of its own

    def as_line(self) -> bytes:
        """JSON without the tokens, with an end of line."""
        return _line(
            {
                **self.place._asdict(),
                "outcomes": [asdict(outcome) for outcome in self.outcomes],
                "query_tokens": self.query_tokens,
                "started": self.started,
                "ended": self.ended,
                "error": self.error,
            }
        )

    @classmethod
    def from_line(cls, values: Mapping[str, Any]) -> Record:
        """A line as it was written, without its tokens."""
        return cls(
            place=Place(values["setting"], values["problem"], values["sample"]),
            outcomes=tuple(Outcome(**outcome) for outcome in values["outcomes"]),
            query_tokens=values["query_tokens"],
            started=values["started"],
            ended=values["ended"],
            error=values["error"],
        )


class ResultsDirectory:
    """Where an evaluation writes. Open it with ``create`` or ``resume``, then close it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mixed: dict[str, list[str]] = {}  # what changed under --force, for the results
        self._files: dict[str, int] = {}
        self._made: list[Path] = []  # folders that were not there before, innermost first

    @classmethod
    def create(cls, path: Path, settings: Mapping[str, Any]) -> ResultsDirectory:
        """Makes the directory of a new evaluation.

        Raises:
            RunDirectoryError: it cannot be written, or holds something already.
        """
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                there = (path / _SETTINGS).exists()
                what = "already holds an evaluation" if there else "is not empty"
                more = "go on with --resume, or " if there else ""
                raise RunDirectoryError(f"{path} {what}; {more}choose another with -o PATH")
            made = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
        except RunDirectoryError:
            raise
        except OSError as error:
            raise _cannot_write(path, error) from None
        directory = cls(path)
        directory._made = made
        directory._open(settings)
        return directory

    @classmethod
    def resume(
        cls, path: Path, settings: Mapping[str, Any], force: bool = False
    ) -> ResultsDirectory:
        """Goes on with an evaluation; more settings and more samples may be asked for.

        Raises:
            RunDirectoryError: there is none, it was asked something else and ``force`` is off, or a
                line before the last one cannot be read.
        """
        try:
            before = dict(json.loads((path / _SETTINGS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise RunDirectoryError(
                f"{path} holds no evaluation to go on with (no {_SETTINGS} that can be read); "
                "leave out --resume"
            ) from None
        mixed = before.pop("forced", [])
        changed = [
            f"{name} was {json.dumps(old)} and is now {json.dumps(settings.get(name))}"
            for name, old in before.items()
            if not _may_become(name, old, settings.get(name))
        ]
        if changed and not force:
            raise RunDirectoryError(
                f"{path} was asked something else: {'; '.join(changed)}; choose another folder "
                "with -o PATH, or mix them knowingly with --force"
            )
        directory = cls(path)
        if mixed + changed:
            directory.mixed = {"forced": mixed + changed}
        directory._open(settings)
        return directory

    def append(self, record: Record) -> None:
        """Writes one line.

        Raises:
            RunDirectoryError: it cannot be written; the file ends where it ended before.
        """
        if record.output_ids:
            output_ids = [as_list(ids) for ids in record.output_ids]
            self._append(_TOKENS, _line({**record.place._asdict(), "output_ids": output_ids}))
        self._append(_TRACES, record.as_line())

    def _append(self, name: str, line: bytes) -> None:
        file = self._files[name]
        end = os.lseek(file, 0, os.SEEK_END)
        try:
            if os.write(file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(file, end)
            raise _cannot_write(self.path / name, error) from None

    def read(self) -> Iterator[Record]:
        """Every whole line, one at a time.

        Raises:
            RunDirectoryError: a whole line is no record.
        """
        with (self.path / _TRACES).open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield Record.from_line(json.loads(line))
                except (ValueError, KeyError, TypeError):
                    raise RunDirectoryError(
                        f"{self.path / _TRACES}, line {number}, is no record of a trace: take the "
                        "line away, and its trace is played again"
                    ) from None

    def write(self, name: str, text: str) -> None:
        """Writes a whole file in place of the one before, never half of it.

        Raises:
            RunDirectoryError: it cannot be written.
        """
        part = self.path / f"{name}.part"
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(self.path / name)
        except OSError as error:
            raise _cannot_write(self.path / name, error) from None

    def close(self) -> None:
        """Closes the file; takes the directory back if nothing was written. Safe to call twice."""
        if not self._files:
            return
        empty = os.fstat(self._files[_TRACES]).st_size == 0
        for file in self._files.values():
            os.close(file)
        self._files = {}
        if empty:
            for name in (_TRACES, _TOKENS, _SETTINGS):
                (self.path / name).unlink(missing_ok=True)
            with suppress(OSError):  # somebody put something there
                for folder in self._made:
                    folder.rmdir()

    def _open(self, settings: Mapping[str, Any]) -> None:
        try:
            for name in (_TRACES, _TOKENS):
                flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
                self._files[name] = os.open(self.path / name, flags, 0o644)
                self._lock(self._files[name])
                os.ftruncate(self._files[name], _end_of_last_line(self._files[name]))
            self.write(_SETTINGS, json.dumps({**settings, **self.mixed}, indent=2) + "\n")
        except OSError as error:
            raise _cannot_write(self.path, error) from None

    def _lock(self, file: int) -> None:
        """Two that write to one folder would sample every trace twice."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunDirectoryError(
                f"another process is writing to {self.path}: wait until it has ended, or choose "
                "another folder with -o PATH"
            ) from None
        except OSError:
            pass  # a file system without locks


def _may_become(name: str, old: Any, new: Any) -> bool:
    """Samples and settings may be added: the seeds of those that there are stay the same."""
    if name == "samples":
        return bool(new >= old)
    if name == "models":
        return all(new.get(model) == weights for model, weights in old.items())
    if name == "settings":
        return all(setting in new for setting in old)
    return bool(old == new)


def _end_of_last_line(file: int) -> int:
    """Where the last whole line ends, looked for from the end."""
    end = os.fstat(file).st_size
    while end:
        begin = max(0, end - 2**16)
        found = os.pread(file, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def _cannot_write(path: Path, problem: OSError) -> RunDirectoryError:
    return RunDirectoryError(f"cannot write {path}: {problem.strerror or problem}")


def _line(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, separators=(",", ":")) + "\n").encode()
