"""Records of an evaluation on disk: append-only JSON lines, one per trace.

A line is written in one call when its trace ends. A killed process loses the traces in flight and
leaves at most one partial line, removed by the next process. Sampled tokens go to a second file
first, since results do not need them. The last line for a trace counts.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from delethink.errors import RunDirectoryError
from delethink.json_io import (
    as_mapping,
    get_count,
    get_flag,
    get_list,
    get_number,
    get_text,
    optional,
    read_json,
    read_json_lines,
)
from delethink.redaction import json_text
from delethink.tokens import TokenIds, as_list

_TRACES = "traces.jsonl"
_TOKENS = "tokens.jsonl"
_SETTINGS = "settings.json"
PROBLEMS = "problems.jsonl"  # prompt and gold answer of each problem, for people and the viewer


class SampleKey(NamedTuple):
    """Identity of a trace: a sample of a problem in a setting."""

    setting: str  # key of the setting
    problem: int
    sample: int


@dataclass(frozen=True, slots=True)  # slots save memory: there is one per trace and budget
class BudgetOutcome:
    """Outcome of a trace at one budget."""

    budget: int  # budget in tokens
    score: float  # 1 if right, else 0
    length: int  # thinking tokens
    chunks: int  # number of chunks
    processed: int  # tokens of all prompts and outputs, the work without a prefix cache
    out_of_budget: bool  # the budget ended the trace
    vote: str | None  # answer for majority votes; ``None`` if there is none
    forced: bool = False  # the answer was forced when the budget was spent
    is_marked: bool = True  # the model wrote the end of thinking, or marks none


@dataclass(frozen=True, slots=True)
class Record:
    """A trace with its outcome at every budget, or the error that ended it."""

    key: SampleKey
    outcomes: tuple[BudgetOutcome, ...]
    query_tokens: int  # length of the query
    started: float  # start time in seconds since the epoch
    ended: float  # end time in seconds since the epoch
    error: str | None = None  # reason of a failed trace, which has no outcomes
    output_ids: tuple[TokenIds, ...] = ()  # sampled tokens of each chunk, stored in a separate file
    # beside them: ``query_ids``, and for each chunk ``logprobs``, ``prompts`` and ``roles``
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON, without the tokens."""
        values = asdict(replace(self, output_ids=(), details={}))
        del values["key"], values["output_ids"], values["details"]
        return {**self.key._asdict(), **values}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Record:
        """Return the record that ``to_json`` wrote.

        Raises:
            KeyError, ValueError: a value is missing, or has another type.
        """
        values = {"error": None, **as_mapping(values, "the record")}
        return cls(
            SampleKey(
                get_text(values, "setting"),
                get_count(values, "problem"),
                get_count(values, "sample"),
            ),
            tuple(map(_outcome, get_list(values, "outcomes"))),
            query_tokens=get_count(values, "query_tokens"),
            started=get_number(values, "started"),
            ended=get_number(values, "ended"),
            error=optional(get_text, values, "error"),
        )


def _outcome(values: Any) -> BudgetOutcome:
    values = {"forced": False, "is_marked": True, **as_mapping(values, "an outcome")}
    return BudgetOutcome(
        budget=get_count(values, "budget"),
        score=get_number(values, "score"),
        length=get_count(values, "length"),
        chunks=get_count(values, "chunks"),
        processed=get_count(values, "processed"),
        out_of_budget=get_flag(values, "out_of_budget"),
        vote=optional(get_text, values, "vote"),
        forced=get_flag(values, "forced"),
        is_marked=get_flag(values, "is_marked"),
    )


class ResultsDirectory:
    """Output folder of an evaluation. Open with ``create`` or ``resume``, then close."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.forced: dict[str, list[str]] = {}  # changes under --force, for results.json
        self._files: dict[str, int] = {}
        self._created: list[Path] = []  # folders created here, innermost first

    @classmethod
    def create(cls, path: Path, settings: Mapping[str, Any]) -> ResultsDirectory:
        """Create the folder of a new evaluation.

        Raises:
            RunDirectoryError: the folder cannot be written, or is not empty.
        """
        directory = cls(path)
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                found = (path / _SETTINGS).exists()
                reason = "already holds an evaluation" if found else "is not empty"
                resume = "continue it with --resume, or " if found else ""
                raise RunDirectoryError(f"{path} {reason}; {resume}choose another with -o PATH")
            directory._created = [p for p in (path, *path.parents) if not p.exists()]
            path.mkdir(parents=True, exist_ok=True)
        except RunDirectoryError:
            raise
        except OSError as error:
            raise _write_error(path, error) from None
        directory._open(settings)
        return directory

    @classmethod
    def resume(
        cls, path: Path, settings: Mapping[str, Any], force: bool = False
    ) -> ResultsDirectory:
        """Open the folder of an interrupted evaluation.

        Settings and samples may be added: they leave the seeds of existing samples unchanged.

        Raises:
            RunDirectoryError: no evaluation in the folder, other settings without ``force``, or
                another process writing there.
        """
        try:
            found = read_json(path / _SETTINGS, RunDirectoryError)
            before = as_mapping(found, _SETTINGS)
            forced = get_list({"forced": [], **before}, "forced")
        except (RunDirectoryError, ValueError) as error:
            raise RunDirectoryError(
                f"{path} holds no evaluation to resume (no readable {_SETTINGS}: {error}); leave "
                "out --resume"
            ) from None
        before.pop("forced", None)
        changed = [
            f"{name} was {json.dumps(old)} and is now {json.dumps(settings.get(name))}"
            for name, old in before.items()
            if not _may_change(name, old, settings.get(name))
        ]
        if changed and not force:
            raise RunDirectoryError(
                f"{path} holds an evaluation with other settings: {'; '.join(changed)}; choose "
                "another folder with -o PATH, or mix them knowingly with --force"
            )
        directory = cls(path)
        if forced + changed:
            directory.forced = {"forced": forced + changed}
        directory._open(settings)
        return directory

    def append(self, record: Record) -> None:
        """Write the lines of a record.

        Raises:
            RunDirectoryError: a line cannot be written; the file keeps its whole lines only.
        """
        if record.output_ids:
            output_ids = [as_list(ids) for ids in record.output_ids]
            tokens = {**record.key._asdict(), "output_ids": output_ids, **record.details}
            self._append(_TOKENS, tokens)
        self._append(_TRACES, record.to_json())

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        line = (json_text(values, separators=(",", ":")) + "\n").encode()
        file = self._files[name]
        end = os.lseek(file, 0, os.SEEK_END)
        try:
            if os.write(file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(file, end)
            raise _write_error(self.path / name, error) from None

    def read(self) -> Iterator[Record]:
        """Yield the record of every whole line.

        Raises:
            RunDirectoryError: a whole line is not a record.
        """
        path = self.path / _TRACES
        advice = "delete the line, and its trace is sampled again"
        lines = read_json_lines(path, RunDirectoryError, partial="skip")
        while True:
            try:
                number, values = next(lines)
            except StopIteration:
                return
            except RunDirectoryError as error:
                raise RunDirectoryError(f"{error}; {advice}") from None
            try:
                record = Record.from_json(values)
            except (ValueError, KeyError) as error:
                reason = f"{error} is missing" if isinstance(error, KeyError) else error
                raise RunDirectoryError(
                    f"{path}, line {number}: not a record of a trace ({reason}); {advice}"
                ) from None
            yield record

    def write(self, name: str, text: str) -> None:
        """Write a file atomically, in place of an earlier version.

        Raises:
            RunDirectoryError: the file cannot be written.
        """
        part = self.path / f"{name}.part"
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(self.path / name)
        except OSError as error:
            raise _write_error(self.path / name, error) from None

    def close(self) -> None:
        """Close the files; remove the folder if no trace was written. Safe to call twice."""
        if not self._files:
            return
        empty = os.fstat(self._files[_TRACES]).st_size == 0
        for file in self._files.values():
            os.close(file)
        self._files = {}
        if empty:
            for name in (_TRACES, _TOKENS, _SETTINGS, PROBLEMS):
                (self.path / name).unlink(missing_ok=True)
            with suppress(OSError):  # not empty: another program wrote there
                for folder in self._created:
                    folder.rmdir()

    def _open(self, settings: Mapping[str, Any]) -> None:
        """Open and lock the files, remove partial lines, and write the settings."""
        try:
            for name in (_TRACES, _TOKENS):
                flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
                self._files[name] = file = os.open(self.path / name, flags, 0o644)
                try:  # two processes in one folder would sample every trace twice
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise
                except OSError:
                    pass  # a file system without locks
                os.ftruncate(file, _end_of_last_line(file))
        except BlockingIOError:
            raise RunDirectoryError(
                f"another process is writing to {self.path}: wait until it ends, or choose "
                "another folder with -o PATH"
            ) from None
        except OSError as error:
            raise _write_error(self.path, error) from None
        self.write(_SETTINGS, json_text({**settings, **self.forced}, indent=2) + "\n")


def _may_change(name: str, old: Any, new: Any) -> bool:
    """Return whether a value may change on resume; an old one of another type may not."""
    try:
        return _is_compatible(name, old, new)
    except (TypeError, AttributeError, KeyError):
        return False


def _is_compatible(name: str, old: Any, new: Any) -> bool:
    if name == "command":
        return True
    if name == "samples":
        return bool(new >= old)
    if name == "models":
        return all(new.get(model) == weights for model, weights in old.items())
    if name == "settings":
        # Shared keys only: another release may store more or fewer of them.
        return all(
            any(all(one[key] == other[key] for key in one.keys() & other.keys()) for other in new)
            for one in old
        )
    return bool(old == new)


def _end_of_last_line(file: int) -> int:
    """Return the offset after the last whole line, searched from the end."""
    end = os.fstat(file).st_size
    while end:
        begin = max(0, end - 2**16)
        found = os.pread(file, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def _write_error(path: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(f"cannot write {path}: {error.strerror or error}")
