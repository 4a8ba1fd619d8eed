"""Names for environments, tasks and rewards: the library imports no dataset and no grader.

Each name stands for ``"module:object"``. Third parties add theirs through the entry-point groups
``delethink.envs``, ``delethink.tasks`` and ``delethink.rewards``.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from delethink.errors import ConfigError, did_you_mean

_SHIPPED = {
    "delethink.envs": {"thinking": "delethink.envs.thinking:ThinkingEnv"},
    "delethink.tasks": {"automaton": "delethink.envs.automaton:AutomatonTask"},
    "delethink.rewards": {"exact": "delethink.rewards.exact:exact_match"},
}


def names(group: str) -> dict[str, str]:
    """Every known name of a group, ``"delethink.tasks"`` say, and what it stands for."""
    found = {point.name: point.value for point in entry_points(group=group)}
    return _SHIPPED[group] | found


def resolve(group: str, name: str) -> Any:
    """The object that ``name`` stands for.

    Raises:
        ConfigError: no such name; the text names the nearest one.
    """
    known = names(group)
    if name not in known:
        kind = group.rpartition(".")[2].removesuffix("s")
        raise ConfigError(f"unknown {kind} {name!r}.{did_you_mean(name, known)}")
    module, _, attribute = known[name].partition(":")
    return getattr(import_module(module), attribute)
