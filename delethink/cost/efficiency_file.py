"""Fitted efficiencies as a file, so that a calibration can be used again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from delethink.cost.hardware import Efficiency
from delethink.errors import ConfigError, did_you_mean


def write_efficiency(efficiency: Efficiency, path: Path) -> None:
    """Writes JSON."""
    try:
        path.write_text(json.dumps(dataclasses.asdict(efficiency), indent=2) + "\n", "utf-8")
    except OSError as problem:
        raise ConfigError(f"cannot write {path}: {problem.strerror}") from None


def read_efficiency(path: Path) -> Efficiency:
    """Reads what ``write_efficiency`` wrote; a figure that is left out keeps its default.

    Raises:
        ConfigError: no such file, an unknown figure, or one that is not positive.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ConfigError(f"cannot read efficiencies from {path}: {problem}") from None
    known = {field.name for field in dataclasses.fields(Efficiency)}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no efficiencies: a JSON object is needed")
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{path}: unknown figure {name!r}.{did_you_mean(name, known)}")
        may_be_zero = name.endswith("_seconds") or name == "spread"
        if name != "source" and not (
            isinstance(value, int | float) and (value > 0 or (may_be_zero and value == 0))
        ):
            raise ConfigError(f"{path}: {name} must be a positive number, got {value!r}")
    return Efficiency(**values)
