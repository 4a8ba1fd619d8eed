"""Index of the traces of a run: a short line for each, so that a viewer opens at once.

Sampling appends to ``trace_index.jsonl`` beside the folder ``traces``. A line holds file, first and
last byte of the trace, and its summary. Whoever reads it checks it against the files: traces
without a line are read themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delethink.json_io import get_count, get_number, get_text, optional
from delethink.redaction import json_text

TRACE_INDEX = "trace_index.jsonl"
TOKEN_STATS = "token_stats"  # folder with values of single tokens, in files named as in ``traces``
_PROMPT_CHARACTERS, _ANSWER_CHARACTERS = 160, 60

# Of the values of a summary, in order.
_TYPES: tuple[Any, ...] = (str, str, str, (int, float, type(None)), str, int, int)


@dataclass(slots=True)
class TraceSummary:
    """A line of a list of traces. Not frozen, which would make a long list slower to read."""

    prompt: str  # its beginning
    answer: str  # of the gold answer, the beginning
    group: str  # the same for all traces of one problem
    reward: float | None
    stop: str
    chunks: int
    length: int  # sampled tokens

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TraceSummary:
        """Return the summary of a trace's plain values (``TraceRecord.to_json``).

        Raises:
            KeyError, ValueError: a value is missing, or has another type.
        """
        prompt, answer = get_text(values, "prompt"), get_text(values, "answer")
        chunks = values["chunks"]
        if not isinstance(chunks, list):
            raise ValueError("'chunks' must be a list")
        thinking = sum(not isinstance(c, dict) or c.get("role") != "carryover" for c in chunks)
        return cls(
            prompt=prompt[:_PROMPT_CHARACTERS],
            answer=answer[:_ANSWER_CHARACTERS],
            group=group_key(prompt, answer),
            reward=optional(get_number, values, "reward"),
            stop=get_text(values, "stop"),
            chunks=thinking,
            length=get_count(values, "length"),
        )

    @classmethod
    def from_list(cls, values: Any) -> TraceSummary:
        """Return the summary that ``as_list`` made.

        Raises:
            ValueError: the values have another form.
        """
        if not isinstance(values, list) or len(values) != len(_TYPES):
            raise ValueError("no summary of a trace")
        if not all(map(isinstance, values, _TYPES)):
            raise ValueError("no summary of a trace")
        return cls(*values)

    def as_list(self) -> list[Any]:
        """Return plain values for JSON."""
        return [getattr(self, name) for name in self.__slots__]


def group_key(prompt: str, answer: str) -> str:
    """Return a short key of a problem."""
    digest = hashlib.blake2b(f"{prompt}\0{answer}".encode("utf-8", "replace"), digest_size=6)
    return digest.hexdigest()


def index_lines(
    file: str, begin: int, lines: Iterable[str], records: Iterable[Mapping[str, Any]]
) -> str:
    """Return the lines of the index for traces that are appended to a file.

    Args:
        file: path relative to the run.
        begin: size of the file before.
        lines: each line in ASCII, with its end.
        records: the plain values of each line.
    """
    found = []
    for line, record in zip(lines, records, strict=True):
        end = begin + len(line)
        found.append(json_text([file, begin, end, TraceSummary.of(record).as_list()]) + "\n")
        begin = end
    return "".join(found)


def without_files(text: str, files: set[str]) -> str:
    """Return an index without the lines of some files."""
    starts = tuple(f'["{file}",' for file in files)
    kept = [line for line in text.splitlines(keepends=True) if not line.startswith(starts)]
    return "".join(kept) if starts else text


def index_path(run: Path) -> Path:
    """Return the path of a run's index."""
    return run / TRACE_INDEX
