"""Presets of ``delethink eval``: what they set, and how results compare with published ones."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

from delethink.cli.arguments import sizes
from delethink.errors import ConfigError
from delethink.evaluation.targets import TARGETS, Comparison, compare

# Section 5 and appendix D of the paper. Its C, m, head and temperature are the defaults.
_PRESETS: dict[str | None, dict[str, Any]] = {"paper": {"samples": 256, "bootstrap": 128}}
_PRESETS |= {name: dict(target.arguments) for name, target in TARGETS.items()}
_DEFAULTS = {
    "samples": 4,
    "mode": "delethink,longcot",
    "context_size": "8k",
    "max_chunks": "5",
}

# Options that make another evaluation than a target's, with the value that does not.
_SAME: dict[str, Any] = {
    "reward": None,
    "reward_arg": [],
    "end_of_thinking": "auto",
    "split": "heldout",
    "num_problems": None,
    "temperature": 0.6,
    "top_p": 1.0,
    "top_k": None,
    "min_p": None,
    "head_size": None,
    "head_outside": False,
    "carryover": None,
    "boundary": None,
    "force_answer": 0,
}
_HARMLESS_VALUES = (None, 0, 0.0, -1, 1.0)  # of options that cut the distribution off


def apply_preset(arguments: argparse.Namespace) -> None:
    """Set the options that were left out, from the preset and then from the defaults.

    Raises:
        ConfigError: no model or task is given.
    """
    preset = _PRESETS.get(arguments.preset, {})
    for name, value in (*preset.items(), *_DEFAULTS.items()):
        given = getattr(arguments, name)
        if given is None or given is False:
            setattr(arguments, name, [value] if name == "model" else value)
    missing = [option for option in ("model", "task") if getattr(arguments, option) is None]
    if missing:
        raise ConfigError(
            f"--{missing[0]} is needed: name a model and a task, or a --preset that has both "
            f"({', '.join(TARGETS)})"
        )


def compared(arguments: argparse.Namespace, rows: Iterable[Any]) -> list[Comparison]:
    """Return the comparison with published results; empty without a target, or if others count."""
    if arguments.preset not in TARGETS or list(changed_options(arguments)):
        return []
    return compare(TARGETS[arguments.preset], rows, arguments.samples)


def changed_options(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the options with which the numbers of the target are not to be expected."""
    target = TARGETS[arguments.preset].arguments
    if len(arguments.model) > 1 or "," in arguments.model[0]:
        yield "--model"
    if arguments.task != target["task"]:
        yield "--task"
    for name in ("context_size", "carryover_size"):
        option = f"--{name.replace('_', '-')}"
        if sizes(getattr(arguments, name), option) != sizes(str(target[name]), option):
            yield option
    if any(not pair.startswith("dataset=") for pair in arguments.task_arg):
        yield "--task-arg"
    for name, same in _SAME.items():
        value = getattr(arguments, name, same)
        harmless = name in ("top_p", "top_k", "min_p") and value in _HARMLESS_VALUES
        if value != same and not harmless:
            yield f"--{name.replace('_', '-')}"


def comparison_lines(arguments: argparse.Namespace, rows: Iterable[Any]) -> list[str]:
    """Return the lines to print after an evaluation of a target."""
    if arguments.preset not in TARGETS:
        return []
    changed = ", ".join(changed_options(arguments))
    if changed:
        return [f"{arguments.preset}: not compared with the paper, because of {changed}"]
    return [f"{arguments.preset}: {one.text()}" for one in compared(arguments, rows)]
