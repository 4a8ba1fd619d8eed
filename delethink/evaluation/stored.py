"""Evaluations on disk: their settings, records, lengths and LongCoT traces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from delethink.errors import RunDirectoryError, UserError
from delethink.evaluation.records import Record, ResultsDirectory, SampleKey
from delethink.evaluation.settings import Setting
from delethink.json_io import (
    as_mapping,
    get_count,
    get_ids,
    get_list,
    get_text,
    read_json,
    read_json_lines,
)
from delethink.types import Chunk, StopReason, Trace, TraceStop

_SETTINGS = "settings.json"


@dataclass(frozen=True)
class StoredEvaluation:
    """An evaluation on disk."""

    path: Path
    label: str  # name in tables
    values: Mapping[str, Any]  # of settings.json
    settings: tuple[Setting, ...]

    def records(self) -> Iterator[Record]:
        """Yield the records of its samples, with the keys of its settings."""
        old = [replace(setting, label=None) for setting in self.settings]
        keys = {each.key: own.key for each, own in zip(old, self.settings, strict=True)}
        samples = get_count(self.values, "samples")
        for record in ResultsDirectory(self.path).read():
            key = record.key
            if key.setting in keys and key.sample < samples:
                yield replace(record, key=key._replace(setting=keys[key.setting]))


def read_evaluation(path: Path, label: str | None = None) -> StoredEvaluation:
    """Return the evaluation of a folder; ``label`` stands before the names of its models.

    Raises:
        RunDirectoryError: the folder holds no evaluation, or one that cannot be read.
    """
    if not path.exists():
        raise RunDirectoryError(f"there is no folder {path}")
    if not (path / _SETTINGS).is_file():
        raise RunDirectoryError(f"{path} holds no evaluation (no {_SETTINGS})")
    try:
        values = as_mapping(read_json(path / _SETTINGS, RunDirectoryError), _SETTINGS)
        get_count(values, "samples")
        settings = tuple(
            Setting.from_dict(
                each := as_mapping(one, "a setting"),
                label=None if label is None else f"{label}: {get_text(each, 'model')}",
            )
            for one in get_list(values, "settings")
        )
        if not settings:
            raise ValueError("there are no settings")
    except (KeyError, ValueError, SyntaxError, UserError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise RunDirectoryError(f"{path / _SETTINGS} cannot be read: {reason}") from None
    return StoredEvaluation(path, label or path.name, values, settings)


def thinking_lengths(path: Path) -> list[float]:
    """Return the lengths of an evaluation's LongCoT traces, or of those of its first setting.

    Raises:
        RunDirectoryError: the folder holds no evaluation, or no trace.
    """
    stored = read_evaluation(path)
    chosen = next((each for each in stored.settings if each.mode == "longcot"), stored.settings[0])
    last = {
        record.key: float(max(1, record.outcomes[-1].length))
        for record in stored.records()
        if record.key.setting == chosen.key and record.outcomes
    }
    if not last:
        raise RunDirectoryError(f"{path} holds no traces of {chosen.key}")
    return list(last.values())


def longcot_traces(path: Path) -> list[Trace]:
    """Return the LongCoT traces of an evaluation, from its first model that has some.

    Raises:
        RunDirectoryError: the folder holds no evaluation, none with LongCoT, or no tokens.
    """
    stored = read_evaluation(path)
    chosen = next((each for each in stored.settings if each.mode == "longcot"), None)
    if chosen is None:
        raise RunDirectoryError(
            f"{path} has no LongCoT traces: evaluate with --mode longcot too, or sample with --task"
        )
    completed = {
        record.key
        for record in stored.records()
        if record.outcomes and not record.outcomes[-1].out_of_budget
    }
    traces: dict[SampleKey, Trace] = {}
    lines = read_json_lines(path / "tokens.jsonl", RunDirectoryError, partial="skip")
    for number, line in lines:
        try:
            values = {"query_ids": [], **as_mapping(line, "the tokens")}
            key = SampleKey(
                get_text(values, "setting"),
                get_count(values, "problem"),
                get_count(values, "sample"),
            )
            query, outputs = get_ids(values, "query_ids"), get_list(values, "output_ids")
            if key.setting != chosen.key or not query or len(outputs) != 1:
                continue
            output = get_ids({"output_ids": outputs[0]}, "output_ids")
        except (KeyError, ValueError) as error:
            raise RunDirectoryError(f"{path / 'tokens.jsonl'}, line {number}: {error}") from None
        is_complete = key in completed
        stop = StopReason.EOS if is_complete else StopReason.LENGTH
        end = TraceStop.COMPLETED if is_complete else TraceStop.BUDGET
        traces[key] = Trace(query, (Chunk(query, output, (), stop, policy_version=None),), end)
    if not traces:
        raise RunDirectoryError(
            f"{path} has no tokens of {chosen.key} with their queries (--no-tokens, or an earlier "
            "release): evaluate again, or sample with --task"
        )
    return list(traces.values())
