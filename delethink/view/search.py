"""Searches in the texts of traces: problem, gold answer, and everything that the model wrote.

Traces of a run store their text. Those of an evaluation, and of files without texts, are decoded
from their tokens. Decoded texts are kept, up to a bound, so that a longer query is answered fast.
"""

from __future__ import annotations

import json
import mmap
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from delethink.errors import UserError
from delethink.view.index import ListedTrace, TraceIndex, is_inside, read_slice
from delethink.view.traces import TraceOpener

_MAX_SEARCH_S = 8.0  # after it the list shows what was found so far, and says so
_MAX_KEPT_CHARACTERS = 64_000_000
_TEXT_MARK = b'"text":'
_TEXT_KEYS = ("prompt", "answer", "text")  # of a stored trace


class TextSearch:
    """Finds the traces that hold a text. Case does not matter.

    Args:
        index: the list.
        opener: knows the tokenizers.
    """

    def __init__(self, index: TraceIndex, opener: TraceOpener) -> None:
        self.index, self.opener = index, opener
        self._kept: OrderedDict[str, str] = OrderedDict()  # texts in small letters, by trace
        self._characters = 0
        self._lock = threading.Lock()

    def matching(self, rows: Sequence[ListedTrace], text: str) -> tuple[list[ListedTrace], str]:
        """Return the rows with a text, in their order, and a note on what was not searched."""
        low = text.lower()
        found = {row.name for row in rows if low in _shown(row)}
        others = [row for row in rows if row.name not in found]
        end = time.monotonic() + _MAX_SEARCH_S
        notes = set()
        for searched, (row, is_hit, note) in enumerate(self._hits(others, text), start=1):
            if is_hit:
                found.add(row.name)
            if note:
                notes.add(note)
            if time.monotonic() > end and searched < len(others):
                notes.add(
                    f"searched the texts of {searched:,} of {len(others):,} traces in "
                    f"{_MAX_SEARCH_S:.0f} s; filter the list to search the others"
                )
                break
        return [row for row in rows if row.name in found], "; ".join(sorted(notes))

    def _hits(
        self, rows: Sequence[ListedTrace], text: str
    ) -> Iterator[tuple[ListedTrace, bool, str]]:
        """Yield each row, whether it holds the text, and why its tokens could not be searched."""
        by_file: dict[Path, list[ListedTrace]] = {}
        for row in rows:
            by_file.setdefault(row.file, []).append(row)
        for file, own in by_file.items():
            if not is_inside(file, self.index.root):
                continue
            if own[0].sample is not None:
                yield from self._evaluated_hits(own, text)
            elif file.suffix == ".jsonl":
                yield from self._stored_hits(file, own, text)
            else:
                yield from self._table_hits(file, own, text)

    def _stored_hits(
        self, file: Path, rows: Sequence[ListedTrace], text: str
    ) -> Iterator[tuple[ListedTrace, bool, str]]:
        """Search lines of JSON; only a line with the text somewhere is read as JSON."""
        ways = _ways(text)
        try:
            with (
                file.open("rb") as opened,
                mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
            ):
                for row in rows:
                    line = data[row.begin : row.end]
                    low = line.lower()
                    if any(way in low for way in ways) and _is_in_texts(line, text.lower()):
                        yield row, True, ""
                    elif _has_text(low):
                        yield row, False, ""
                    else:
                        yield row, *self._decoded_hit(row, text)
        except (OSError, ValueError):  # gone, or empty
            return

    def _table_hits(
        self, file: Path, rows: Sequence[ListedTrace], text: str
    ) -> Iterator[tuple[ListedTrace, bool, str]]:
        from delethink.trace_io import read_traces

        by_number = {row.begin: row for row in rows}
        low = text.lower()
        try:
            for number, record in enumerate(read_traces(file), start=1):
                row = by_number.get(number)
                if row is None:
                    continue
                stored = f"{record.problem.prompt}\n{record.problem.answer}\n{record.text or ''}"
                if low in stored.lower() or record.text is not None:
                    yield row, low in stored.lower(), ""
                else:
                    ids = [i for chunk in record.trace.chunks for i in chunk.output_ids]
                    yield row, *self._hit_in(row, ids, low)
        except UserError:
            return

    def _evaluated_hits(
        self, rows: Sequence[ListedTrace], text: str
    ) -> Iterator[tuple[ListedTrace, bool, str]]:
        problems: dict[tuple[Path, int | None], str] = {}
        for row in rows:
            key = row.file.parent, row.problem
            if key not in problems:
                prompt, gold = self.index.problem_texts(row)
                problems[key] = f"{prompt}\n{gold or ''}".lower()
            if text.lower() in problems[key]:
                yield row, True, ""
            else:
                yield row, *self._decoded_hit(row, text)

    def _decoded_hit(self, row: ListedTrace, text: str) -> tuple[bool, str]:
        """Return whether the decoded tokens of a trace hold a text, and why they have none."""
        with self._lock:
            kept = self._kept.get(row.name)
        if kept is not None:
            return text.lower() in kept, ""
        try:
            ids = self._sampled_ids(row)
        except (UserError, KeyError, ValueError, TypeError):
            return False, ""
        return self._hit_in(row, ids, text.lower())

    def _hit_in(self, row: ListedTrace, ids: list[int], low: str) -> tuple[bool, str]:
        is_evaluation = row.sample is not None
        folder = row.file.parent if is_evaluation else self.opener.home(row.file)
        tokenizer, advice = self.opener.tokenizer(folder, row.place if is_evaluation else None)
        if tokenizer is None:
            return False, f"texts of tokens were not searched: {advice}"
        found = str(tokenizer.decode(ids)).lower()
        self._keep(row.name, found)
        return low in found, ""

    def _sampled_ids(self, row: ListedTrace) -> list[int]:
        if row.sample is None:
            chunks = self.index.read_line(row)["chunks"]
            return [int(i) for chunk in chunks for i in chunk["output_ids"]]
        part = self.index.tokens.get(row.key)
        if part is None:
            return []
        line = read_slice(row.file.parent / "tokens.jsonl", *part, self.index.root, row.name)
        return [int(i) for output in _output_ids(line) for i in output]

    def _keep(self, name: str, text: str) -> None:
        with self._lock:
            self._characters += len(text) - len(self._kept.pop(name, ""))
            self._kept[name] = text
            while self._characters > _MAX_KEPT_CHARACTERS:
                self._characters -= len(self._kept.popitem(last=False)[1])


def _shown(row: ListedTrace) -> str:
    """Return the texts of a row in the list, in small letters."""
    summary = row.summary
    shown = (summary.prompt, summary.answer, row.place, row.name, row.error or "")
    return "\n".join(shown).lower()


def _ways(text: str) -> set[bytes]:
    """Return a text as it may stand in JSON, in small letters: as it is, or with escapes."""
    return {json.dumps(text, ensure_ascii=is_escaped)[1:-1].encode().lower()
            for is_escaped in (True, False)}  # fmt: skip


def _has_text(line: bytes) -> bool:
    """Return whether the line of a trace stores its decoded text."""
    _, mark, value = line.partition(_TEXT_MARK)
    return bool(mark) and not value.lstrip().startswith(b"null")


def _is_in_texts(line: bytes, low: str) -> bool:
    try:  # token ids and names of fields are no text
        values = json.loads(line)
        return any(low in str(values.get(key) or "").lower() for key in _TEXT_KEYS)
    except (ValueError, AttributeError, RecursionError):
        return False


def _output_ids(line: bytes) -> Iterable[Any]:
    """Return the sampled tokens of a line, without reading the log-probs beside them."""
    begin = line.find(b'"output_ids":')
    end = line.find(b"]]", begin)
    if 0 <= begin < end:
        try:
            found: list[Any] = json.loads(line[begin + len(b'"output_ids":') : end + 2])
            return found
        except ValueError:  # written in another way
            pass
    return list(json.loads(line)["output_ids"])
