"""List of the traces in a folder or file, read while it grows.

Files are found once per refresh, without following links out of the folder, and only what was
found is ever opened. A damaged line is skipped and counted.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from delethink.errors import TraceFileError, UserError
from delethink.evaluation.records import PROBLEMS, Record
from delethink.json_io import get_count, get_text, parse_json
from delethink.trace_index import TOKEN_STATS, TRACE_INDEX, TraceSummary

_OTHER_FILES = {"metrics.jsonl", "resumed.jsonl", "tokens.jsonl", PROBLEMS, TRACE_INDEX}
_OTHER_FOLDERS = {"checkpoints", "superseded", TOKEN_STATS}
_MAX_FILES = 20_000
_BATCH = 500  # lines between two looks of others at the list
_MAX_LINE_BYTES = 2**28


class ListedTrace(NamedTuple):
    """A trace of the list, and its place on disk."""

    name: str  # identity in addresses: file and line
    file: Path
    begin: int  # first byte of its line; row of a Parquet file
    end: int
    place: str  # the step or the setting
    sample: int | None
    summary: TraceSummary
    error: str | None = None
    problem: int | None = None  # its number in an evaluation

    @property
    def key(self) -> tuple[Path, str, int, int]:
        """Return the identity of an evaluation's trace: folder, setting, problem, sample."""
        return self.file.parent, self.place, self.problem or 0, self.sample or 0


class _FileState(NamedTuple):
    """Progress in a file."""

    read: int  # bytes
    lines: int
    inode: int


class _ProblemLine(NamedTuple):
    """A problem of an evaluation: the beginnings of its texts, and its place in the file."""

    prompt: str
    answer: str
    begin: int
    end: int


class TraceIndex:
    """The traces of a folder or a file. Methods may be called from several threads.

    ``rows`` grows; ``version`` changes with it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows: list[ListedTrace] = []
        self.by_name: dict[str, ListedTrace] = {}
        self.tokens: dict[tuple[Path, str, int, int], tuple[int, int]] = {}  # of evaluations
        self.damaged: dict[str, int] = {}  # lines by file
        self.unreadable: dict[str, str] = {}  # reasons by file or folder
        self.version = 0
        self.is_complete = False  # every file was read once
        self.is_gone = False
        self._files: dict[Path, _FileState] = {}
        self._labels: dict[Path, tuple[str, str]] = {}
        self._problems: dict[Path, dict[int, _ProblemLine]] = {}
        self._lock = threading.RLock()  # of the rows
        self._reading = threading.Lock()  # one refresh at a time

    def refresh(self) -> None:
        """Read what is new; returns at once while another thread is reading."""
        if not self._reading.acquire(blocking=False):
            return
        try:
            self.is_gone = not exists(self.root)
            if self.is_gone:
                return
            unreadable: dict[str, str] = {}
            if self.root.is_dir() and not self._files:
                with suppress(OSError):  # the files themselves are read
                    self._read_written_index()
            for file in trace_files(self.root, lambda error: _note(unreadable, error)):
                try:
                    self._read_file(file)
                except FileNotFoundError:
                    continue  # it went meanwhile
                except OSError as error:
                    _note(unreadable, error)
            self.unreadable = unreadable
            self.is_complete = True
        finally:
            self._reading.release()

    # -- reading ---------------------------------------------------------------------------------

    def _read_written_index(self) -> None:
        """Take the rows of the index that sampling wrote, as far as the files agree."""
        path = self.root / TRACE_INDEX
        if not path.is_file() or path.is_symlink():
            return
        known: dict[str, tuple[Path, int, int] | None] = {}  # file, size, inode
        states: dict[str, tuple[int, int]] = {}  # bytes and lines so far
        rows: list[ListedTrace] = []
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    name, begin, end, summary = json.loads(line)
                    found = TraceSummary.from_list(summary)
                    if name not in known:
                        known[name] = self._stat(name)
                except (ValueError, TypeError, RecursionError):
                    continue
                file = known[name]
                read, number = states.get(name, (0, 0))
                if file is None or begin != read or not begin < end <= file[1]:
                    continue
                states[name] = end, number + 1
                rows.append(self._row(file[0], number + 1, begin, end, found))
                if len(rows) >= _BATCH:
                    self._add(rows)
                    rows = []
        self._add(rows)
        for name, (read, number) in states.items():
            file = known[name]
            if file is not None:
                self._files[file[0]] = _FileState(read, number, file[2])

    def _stat(self, name: str) -> tuple[Path, int, int] | None:
        """Return path, size and inode of a file of the index, if it is inside the folder."""
        file = self.root / name
        try:
            stat = file.stat()
            return (file, stat.st_size, stat.st_ino) if is_inside(file, self.root) else None
        except OSError:
            return None

    def _read_file(self, file: Path) -> None:
        """Read what is new in a file.

        Raises:
            OSError: it cannot be read.
        """
        stat = file.stat()
        state = self._files.get(file)
        if state is not None and (state.inode != stat.st_ino or stat.st_size < state.read):
            self._forget(file)
            state = None
        state = state or _FileState(0, 0, stat.st_ino)
        if file.suffix == ".parquet":
            if state.read != stat.st_size:
                self._forget(file)
                self._read_parquet(file)
                self._files[file] = _FileState(stat.st_size, 0, stat.st_ino)
        elif stat.st_size > state.read:
            self._files[file] = self._read_lines(file, state)

    def _read_lines(self, file: Path, state: _FileState) -> _FileState:
        read, number = state.read, state.lines
        is_evaluation = (file.parent / "settings.json").is_file() and file.name == "traces.jsonl"
        rows: list[ListedTrace] = []
        with file.open("rb") as lines:
            lines.seek(read)
            while True:
                line = lines.readline(_MAX_LINE_BYTES)
                if not line.endswith(b"\n"):
                    break  # not whole yet
                begin, read, number = read, read + len(line), number + 1
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                    if is_evaluation:
                        row = self._evaluation_row(file, number, begin, read, values)
                    else:
                        row = self._row(file, number, begin, read, TraceSummary.of(values))
                except (ValueError, KeyError, TypeError, RecursionError):
                    self._count_damage(file)
                    continue
                rows.append(row)
                if len(rows) >= _BATCH:
                    self._add(rows)
                    rows = []
        self._add(rows)
        if is_evaluation:
            self._drop_repeated(file)
            self._read_tokens(file.parent / "tokens.jsonl")
        return _FileState(read, number, state.inode)

    def _row(
        self, file: Path, number: int, begin: int, end: int, summary: TraceSummary
    ) -> ListedTrace:
        name, place = self._labels_of(file)
        return ListedTrace(f"{name}:{number}", file, begin, end, place, None, summary)

    def _labels_of(self, file: Path) -> tuple[str, str]:
        """Return the name of a file inside the folder, and its step or stem."""
        if file not in self._labels:
            inside = file.name if file == self.root else file.relative_to(self.root).as_posix()
            step = re.fullmatch(r"step_0*(\d+)\.jsonl", file.name)
            self._labels[file] = inside, step[1] if step else file.stem
        return self._labels[file]

    def _evaluation_row(
        self, file: Path, number: int, begin: int, end: int, values: Any
    ) -> ListedTrace:
        record = Record.from_json(values)
        last = record.outcomes[-1] if record.outcomes else None
        line = self._problem_line(file.parent, record.key.problem)
        prompt, answer = (line.prompt, line.answer) if line else ("", "")
        stop = "error" if last is None else "budget" if last.out_of_budget else "completed"
        summary = TraceSummary(
            prompt=prompt or f"problem {record.key.problem}",
            answer=answer,
            group=f"{record.key.setting} · problem {record.key.problem}",
            reward=None if last is None else last.score,
            stop=stop,
            chunks=0 if last is None else last.chunks,
            length=0 if last is None else last.length,
        )
        name = f"{self._labels_of(file)[0]}:{number}"
        setting, sample = record.key.setting, record.key.sample
        return ListedTrace(
            name, file, begin, end, setting, sample, summary, record.error, record.key.problem
        )

    def _problem_line(self, folder: Path, number: int) -> _ProblemLine | None:
        if folder not in self._problems:
            found: dict[int, _ProblemLine] = {}
            path, end = folder / PROBLEMS, 0
            is_there = path.is_file() and is_inside(path, self.root)
            for line in path.read_bytes().splitlines(keepends=True) if is_there else ():
                begin, end = end, end + len(line)
                try:
                    values = json.loads(line)
                    texts = get_text(values, "prompt")[:160], get_text(values, "answer")[:60]
                    found[get_count(values, "problem")] = _ProblemLine(*texts, begin, end)
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
            self._problems[folder] = found
        return self._problems[folder].get(number)

    def _read_tokens(self, path: Path) -> None:
        """Find the sampled tokens of an evaluation's traces."""
        if not path.is_file() or not is_inside(path, self.root):
            return
        state = self._files.get(path, _FileState(0, 0, path.stat().st_ino))
        read = state.read
        with path.open("rb") as lines:
            lines.seek(read)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                begin, read = read, read + len(line)
                try:
                    values = json.loads(line)
                    key = (values["setting"], values["problem"], values["sample"])
                    self.tokens[path.parent, str(key[0]), int(key[1]), int(key[2])] = begin, read
                except (ValueError, KeyError, TypeError, RecursionError):
                    self._count_damage(path)
        self._files[path] = _FileState(read, 0, state.inode)

    def _read_parquet(self, file: Path) -> None:
        from delethink.trace_io import read_traces

        rows = []
        try:
            for number, record in enumerate(read_traces(file), start=1):
                summary = TraceSummary.of(record.to_json())
                rows.append(self._row(file, number, number, number, summary))
        except UserError:
            self._count_damage(file)
        self._add(rows)

    def _add(self, rows: list[ListedTrace]) -> None:
        if not rows:
            return
        with self._lock:
            self.rows.extend(rows)
            self.by_name |= {row.name: row for row in rows}
            self.version += 1

    def _drop_repeated(self, file: Path) -> None:
        """Keep the last line of each trace of an evaluation, as its results do."""
        last = {row.key: row.name for row in self.rows if row.file == file}
        if len(last) == sum(row.file == file for row in self.rows):
            return
        with self._lock:
            self.rows = [row for row in self.rows if row.file != file or last[row.key] == row.name]
            self.by_name = {row.name: row for row in self.rows}
            self.version += 1

    def _forget(self, file: Path) -> None:
        with self._lock:
            self.rows = [row for row in self.rows if row.file != file]
            self.by_name = {row.name: row for row in self.rows}
            self.damaged.pop(str(file), None)
            self._files.pop(file, None)
            self.version += 1

    def _count_damage(self, file: Path) -> None:
        with self._lock:
            self.damaged[str(file)] = self.damaged.get(str(file), 0) + 1
            self.version += 1

    # -- asking ----------------------------------------------------------------------------------

    def find(self, name: str) -> ListedTrace | None:
        """Return the row of a trace by its name."""
        with self._lock:
            return self.by_name.get(name)

    def snapshot(self) -> list[ListedTrace]:
        """Return the rows found so far."""
        with self._lock:
            return list(self.rows)

    def problem_texts(self, row: ListedTrace) -> tuple[str, str | None]:
        """Return the whole prompt of a trace of an evaluation, and its gold answer if stored."""
        line = self._problem_line(row.file.parent, row.problem or 0)
        if line is None:
            return row.summary.prompt, None
        path = row.file.parent / PROBLEMS
        try:
            values = read_part(path, line.begin, line.end, self.root, PROBLEMS)
            return get_text(values, "prompt"), get_text(values, "answer")
        except (TraceFileError, KeyError, ValueError):
            return line.prompt, line.answer

    def read_line(self, row: ListedTrace) -> Any:
        """Return the values of a row's line.

        Raises:
            TraceFileError: the file has gone, or its line is another one now.
        """
        return read_part(row.file, row.begin, row.end, self.root, row.name)


def read_part(file: Path, begin: int, end: int, root: Path, name: str) -> Any:
    """Return the JSON value between two bytes of a file inside ``root``.

    Raises:
        TraceFileError: the file has gone, leads outside, or holds no JSON there.
    """
    return parse_json(read_slice(file, begin, end, root, name), name, TraceFileError)


def read_slice(file: Path, begin: int, end: int, root: Path, name: str) -> bytes:
    """Return the bytes of a file inside ``root`` between two places.

    Raises:
        TraceFileError: the file has gone, or leads outside.
    """
    try:
        if not is_inside(file, root):
            raise TraceFileError(f"{name} leads out of the folder")
        with file.open("rb") as lines:
            lines.seek(begin)
            return lines.read(end - begin)
    except OSError as error:
        raise TraceFileError(f"{name} cannot be read any more: {error.strerror}") from None


def is_inside(file: Path, root: Path) -> bool:
    """Return whether a file, after all links, is ``root`` or inside it."""
    real, home = file.resolve(), root.resolve()
    return real == home or home in real.parents


def exists(path: Path) -> bool:
    """Return whether a path exists, as far as it can be seen."""
    try:
        return path.exists()
    except OSError:  # a folder above it may not be entered
        return False


def _note(unreadable: dict[str, str], error: OSError) -> None:
    unreadable[str(error.filename)] = error.strerror or str(error)


def trace_files(root: Path, failed: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    """Yield the files of traces in a folder, in order of their names; or the file itself.

    ``failed`` gets the error of each folder that cannot be read.
    """
    if root.is_file():
        yield root
        return
    found = 0
    for folder, folders, names in os.walk(root, onerror=failed):
        folders[:] = sorted(name for name in folders if name not in _OTHER_FOLDERS)
        for name in sorted(names):
            if not name.endswith((".jsonl", ".parquet")) or name in _OTHER_FILES:
                continue
            file = Path(folder) / name
            if not file.is_symlink() or is_inside(file, root):
                found += 1
                if found > _MAX_FILES:
                    return
                yield file
