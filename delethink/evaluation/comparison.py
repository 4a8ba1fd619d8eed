"""Finished or interrupted evaluations in one table, with paired comparisons between them.

Any two evaluations of the same problems compare: a served model and a local one, two checkpoints,
two seeds of sampling. Sampling differs between them, and problems pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from delethink.errors import ConfigError, RunDirectoryError, UserError
from delethink.evaluation.records import Record, ResultsDirectory
from delethink.evaluation.results import AnalysisSettings, Results, summarise
from delethink.evaluation.settings import Setting
from delethink.json_io import as_mapping, get_count, get_list, get_text, read_json

_SETTINGS = "settings.json"
_SHOWN = ("engine", "samples", "temperature", "seed", "forced_answer_tokens", "top_p", "top_k")


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


def compare_evaluations(
    paths: Sequence[Path], analysis: AnalysisSettings
) -> tuple[list[StoredEvaluation], Results]:
    """Return the evaluations of some folders and their results in one table, baseline first.

    Raises:
        ConfigError: fewer than two folders, or evaluations of other problems or rewards.
        RunDirectoryError: a folder holds no evaluation.
    """
    if len(paths) < 2:
        raise ConfigError("a comparison needs at least two folders of evaluations")
    labels = _labels(paths)
    if len(set(labels)) < len(labels):
        raise ConfigError(f"a folder is named twice: {', '.join(map(str, paths))}")
    stored = [read_evaluation(path, label) for path, label in zip(paths, labels, strict=True)]
    first = stored[0]
    for other in stored[1:]:
        for name in ("problems_fingerprint", "reward", "reward_args"):
            if first.values.get(name) != other.values.get(name):
                raise ConfigError(
                    f"{first.path} and {other.path} cannot be compared: they differ in "
                    f"{_difference(name, first, other)}"
                )
    settings = [setting for each in stored for setting in each.settings]
    records = (record for each in stored for record in each.records())
    return stored, summarise(settings, records, analysis)


def differences(stored: Sequence[StoredEvaluation]) -> list[str]:
    """Return a sentence for each way of sampling in which the evaluations differ."""
    found = []
    for name in _SHOWN:
        values = {each.label: each.values.get(name) for each in stored}
        if len(set(map(str, values.values()))) > 1:
            listed = ", ".join(f"{label} {value}" for label, value in values.items())
            found.append(f"{name.replace('_', ' ')} differs: {listed}")
    return found


def _difference(name: str, first: StoredEvaluation, other: StoredEvaluation) -> str:
    if name != "problems_fingerprint":
        return f"{name} ({first.values.get(name)} and {other.values.get(name)})"
    sets = [
        f"{each.values.get('problems')} of {each.values.get('task')}" for each in (first, other)
    ]
    return f"their problems ({sets[0]} and {sets[1]}); evaluate both on the same problems and split"


def _labels(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ."""
    whole = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, whole)) + 1):
        labels = ["/".join(parts[-length:]) for parts in whole]
        if len(set(labels)) == len(set(whole)):
            return labels
    return [str(path) for path in paths]
