"""Finished or interrupted evaluations in one table, with paired comparisons between them.

Any two evaluations of the same problems compare: a served model and a local one, two checkpoints,
two seeds of sampling. Sampling differs between them, and problems pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from delethink.errors import ConfigError
from delethink.evaluation.results import AnalysisSettings, Results, summarise
from delethink.evaluation.stored import StoredEvaluation, read_evaluation

_SHOWN = ("engine", "samples", "temperature", "seed", "forced_answer_tokens", "top_p", "top_k")


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
