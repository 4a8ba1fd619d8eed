"""Traces on disk: typed records, stored without loss in JSON lines or Parquet.

A record is one line of a ``.jsonl`` file, or one row of a Parquet file or a ``datasets.Dataset``.
Each record has a version. Other versions than ``TRACE_VERSION`` are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from delethink.errors import MissingExtraError, TraceFileError, did_you_mean
from delethink.json_io import (
    as_mapping,
    get_count,
    get_ids,
    get_list,
    get_mapping,
    get_number,
    get_numbers,
    get_text,
    optional,
    parse_json,
    read_json_lines,
    shorten,
)
from delethink.redaction import json_text, redacted
from delethink.tokenization import Tokenizer, reward_text
from delethink.tokens import as_list
from delethink.types import Chunk, ChunkRole, Problem, StopReason, Trace, TraceStop

TRACE_VERSION = 1
_SUFFIXES = (".jsonl", ".parquet")
_SHOWN_NAMES = 5  # in the message about a record of something else
_JSON_COLUMNS = ("before", "metadata", "rewards", "reward_errors")  # no fixed schema


@dataclass(frozen=True)
class TraceRecord:
    """A trace with its problem, rewards and advantage.

    Example: ``TraceRecord(problem, trace, rewards={"exact": 1.0}, advantage=0.7)``.
    """

    problem: Problem
    trace: Trace
    rewards: Mapping[str, float | None] = field(default_factory=dict)  # None: does not apply
    advantage: float | None = None  # None for a trace without training
    text: str | None = None  # the decoded trace, for people only
    reward: float | None = None  # weighted sum of rewards; None: no reward applies, or one failed
    # cause of each reward without a value, or of 0 because its grader failed on the output
    reward_errors: Mapping[str, str] = field(default_factory=dict)

    def rescored(
        self, name: str, reward: Callable[[str, str], float], tokenizer: Tokenizer
    ) -> TraceRecord:
        """Return the record with the value of an additional reward."""
        text = reward_text(tokenizer, self.trace.output_ids)
        return replace(
            self, rewards={**self.rewards, name: float(reward(text, self.problem.answer))}
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON.

        Raises:
            TraceFileError: JSON would change the problem's metadata.
        """
        trace = self.trace
        return {
            "version": TRACE_VERSION,
            "before": [dict(message) for message in self.problem.before],
            "prompt": self.problem.prompt,
            "answer": self.problem.answer,
            "metadata": _check_metadata(self.problem.metadata),
            "query_ids": as_list(trace.query_ids),
            "stop": trace.stop.value,
            "length": trace.length,
            "reward": self.reward,
            "rewards": dict(self.rewards),
            "reward_errors": dict(self.reward_errors),
            "advantage": self.advantage,
            "text": self.text,
            "chunks": [_chunk_to_json(chunk) for chunk in trace.chunks],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TraceRecord:
        """Create a record from the values of ``to_json``.

        Raises:
            TraceFileError: the values have another version, or are no record.
        """
        if not isinstance(values, Mapping):
            raise TraceFileError(f"a record of a trace must be a mapping, got {shorten(values)}")
        version = values.get("version")
        if version is None and "chunks" not in values:
            names = ", ".join(map(shorten, list(values)[:_SHOWN_NAMES])) or "none"
            raise TraceFileError(f"this is no trace: it has no 'chunks', but {names}")
        if type(version) is not int or version != TRACE_VERSION:
            raise TraceFileError(
                f"the trace has version {shorten(version)}; this delethink reads version "
                f"{TRACE_VERSION}: use the delethink release of the file"
            )
        try:
            record = cls(
                problem=Problem(
                    get_text(values, "prompt"),
                    get_text(values, "answer"),
                    get_mapping(values, "metadata"),
                    tuple(map(_texts, get_list(values, "before"))),
                ),
                trace=Trace(
                    get_ids(values, "query_ids"),
                    tuple(map(_chunk_from_json, get_list(values, "chunks"))),
                    TraceStop(get_text(values, "stop")),
                ),
                rewards=_rewards(get_mapping(values, "rewards")),
                reward=optional(get_number, values, "reward"),
                reward_errors=_texts(get_mapping(values, "reward_errors")),
                advantage=optional(get_number, values, "advantage"),
                text=optional(get_text, values, "text"),
            )
            length = get_count(values, "length")
        except KeyError as error:
            raise TraceFileError(
                f"the trace has no {error.args[0]!r}, required in version {version}"
            ) from None
        except ValueError as error:
            raise TraceFileError(f"the trace cannot be read: {error}") from None
        if record.trace.length != length:
            raise TraceFileError(
                f"the trace has {record.trace.length} sampled tokens, and its length field is "
                f"{length}"
            )
        return record


def write_traces(
    path: str | Path, records: Iterable[TraceRecord], *, overwrite: bool = False
) -> None:
    """Write a new ``.jsonl`` or ``.parquet`` file, completely or not at all.

    Args:
        path: the file.
        records: the traces.
        overwrite: replace an existing file, once the new one is complete.

    Raises:
        TraceFileError: the suffix is unknown, the file exists already or cannot be written, or JSON
            or Parquet would change a record.
    """
    path = _check_suffix(path)
    if path.exists() and not overwrite:
        raise TraceFileError(
            f"{path} exists already; choose another file, or replace it with overwrite=True"
        )
    part = path.with_name(path.name + ".part")
    try:
        if path.suffix == ".parquet":
            rows, arrow = [_row(record) for record in records], _pyarrow()
            arrow.parquet.write_table(arrow.Table.from_pylist(rows, schema=_schema()), part)
        else:
            lines = [json_text(record.to_json(), allow_nan=False) + "\n" for record in records]
            for line in lines:
                if "\\ud" in line:  # half a surrogate pair could not be read
                    parse_json(line, "a trace", TraceFileError)
            part.write_text("".join(lines), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise TraceFileError(f"cannot write {path}: {error.strerror or error}") from None
    except ValueError as error:  # NaN, or half a surrogate pair in Parquet
        if isinstance(error, TraceFileError):
            raise
        raise TraceFileError(f"a trace cannot be written to {path}: {error}") from None


def read_traces(path: str | Path) -> Iterator[TraceRecord]:
    """Yield the records of a ``.jsonl`` or ``.parquet`` file.

    Raises:
        TraceFileError: the suffix is unknown, the file cannot be read, or a record is invalid; the
            text has its number.
    """
    path = _check_suffix(path)
    try:
        is_parquet = path.suffix == ".parquet"
        for number, row in _parquet_rows(path) if is_parquet else _json_rows(path):
            try:
                yield TraceRecord.from_json(_from_row(row) if is_parquet else row)
            except TraceFileError as error:
                raise TraceFileError(f"{path}, record {number}: {error}") from None
    except OSError as error:
        raise TraceFileError(f"cannot read {path}: {error.strerror or error}") from None


def to_dataset(records: Iterable[TraceRecord]) -> Any:
    """Return a ``datasets.Dataset`` with one row for each record.

    Raises:
        MissingExtraError: ``datasets`` is not installed.
    """
    try:
        from datasets import Dataset, Features
    except ImportError:
        raise MissingExtraError("datasets", "train") from None
    rows = [_row(record) for record in records]
    return Dataset.from_list(rows, features=Features.from_arrow_schema(_schema()))


def from_dataset(dataset: Iterable[Mapping[str, Any]]) -> Iterator[TraceRecord]:
    """Yield the records of a dataset created by ``to_dataset``.

    Raises:
        TraceFileError: a row is no record.
    """
    for row in dataset:
        yield TraceRecord.from_json(_from_row(row))


def _chunk_to_json(chunk: Chunk) -> dict[str, Any]:
    values = {
        "prompt_ids": as_list(chunk.prompt_ids),
        "carried": chunk.carried,
        "output_ids": as_list(chunk.output_ids),
        "logprobs": list(chunk.logprobs),
        "stop": chunk.stop.value,
        "policy_version": chunk.policy_version,
        "role": chunk.role.value,
    }
    if chunk.error is not None:
        values["error"] = chunk.error
    if chunk.worker is not None:
        values["worker"] = chunk.worker
    return values


def _chunk_from_json(values: Any) -> Chunk:
    if not isinstance(values, Mapping):
        raise ValueError(f"a chunk must be a mapping, got {shorten(values)}")
    chunk = Chunk(
        prompt_ids=get_ids(values, "prompt_ids"),
        output_ids=get_ids(values, "output_ids"),
        logprobs=get_numbers(values, "logprobs"),
        stop=StopReason(get_text(values, "stop")),
        carried=get_count(values, "carried"),
        policy_version=optional(get_count, values, "policy_version"),
        error=optional(get_text, {"error": None, **values}, "error"),
        role=ChunkRole(get_text(values, "role")),
        worker=optional(get_text, {"worker": None, **values}, "worker"),
    )
    if len(chunk.logprobs) not in (0, len(chunk.output_ids)):
        raise ValueError(
            f"a chunk has {len(chunk.output_ids)} sampled tokens and {len(chunk.logprobs)} "
            "log-probs"
        )
    if chunk.carried > len(chunk.prompt_ids):
        raise ValueError(
            f"a chunk carries {chunk.carried} tokens, and its prompt has {len(chunk.prompt_ids)}"
        )
    return chunk


def _texts(values: Any) -> dict[str, str]:
    """Return a mapping from text to text."""
    values = as_mapping(values, "a mapping of texts")
    return {key: get_text(values, key) for key in values}


def _rewards(values: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: optional(get_number, values, name) for name in values}


def json_like(value: Any) -> Any:
    """Return ``value`` after JSON: tuples become lists, and unknown types become text."""
    text = json.dumps(value, default=str, skipkeys=True)
    return json.loads(text, parse_constant=str)


def _check_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse metadata that JSON would change, such as tuples and keys other than text."""
    for key, value in metadata.items():
        try:
            same = isinstance(key, str) and _read_back(value) == value
        except (TypeError, ValueError, RecursionError):
            same = False
        if not same:
            raise TraceFileError(
                f"the problem's metadata {key!r} is {value!r:.80}, which JSON would change; use "
                "text, numbers, lists and mappings with text keys"
            )
    return dict(metadata)


def _dump(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _read_back(value: Any) -> Any:
    return parse_json(_dump(value), "metadata", TraceFileError)


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    return read_json_lines(path, TraceFileError, partial="read", place="record")


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    arrow = _pyarrow()
    try:
        file = arrow.parquet.ParquetFile(path)
        columns = set(file.schema_arrow.names)
        if missing := sorted(set(_schema().names) - columns):
            raise TraceFileError(f"{path} has no column {missing[0]!r} and is no file of traces")
        rows = (row for batch in file.iter_batches(batch_size=64) for row in batch.to_pylist())
        yield from enumerate(rows, start=1)
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise TraceFileError(f"{path} is not Parquet: {error}") from None


def _row(record: TraceRecord) -> dict[str, Any]:
    """Return a Parquet row. Columns without a fixed schema hold JSON."""
    values = redacted(record.to_json())
    for key in _JSON_COLUMNS:
        values[key] = _dump(values[key])
    values["chunks"] = [{"error": None, "worker": None, **chunk} for chunk in values["chunks"]]
    return values


def _from_row(row: Mapping[str, Any]) -> dict[str, Any]:
    try:
        texts = {key: get_text(row, key) for key in _JSON_COLUMNS}
    except KeyError as error:
        raise TraceFileError(f"the trace has no {error.args[0]!r}") from None
    except ValueError as error:
        raise TraceFileError(f"the trace cannot be read: {error}") from None
    parsed = {key: parse_json(texts[key], f"{key!r}", TraceFileError) for key in texts}
    return {**row, **parsed}


def _schema() -> Any:
    arrow = _pyarrow()
    text, number, real = arrow.string(), arrow.int64(), arrow.float64()
    ids = arrow.list_(number)
    chunk = {
        **dict.fromkeys(("prompt_ids", "output_ids"), ids),
        **dict.fromkeys(("carried", "policy_version"), number),
        **dict.fromkeys(("stop", "role", "error", "worker"), text),
        "logprobs": arrow.list_(real),
    }
    texts = ("prompt", "answer", "stop", "text", *_JSON_COLUMNS)
    return arrow.schema(
        {
            **dict.fromkeys(texts, text),
            **dict.fromkeys(("version", "length"), number),
            **dict.fromkeys(("reward", "advantage"), real),
            "query_ids": ids,
            "chunks": arrow.list_(arrow.struct(chunk)),
        }
    )


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "train") from None
    return pyarrow


def _check_suffix(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise TraceFileError(
            f"unknown suffix {path.suffix!r} of {path}.{did_you_mean(path.suffix, _SUFFIXES)}"
        )
    return path
