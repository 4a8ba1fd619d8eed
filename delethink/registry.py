"""Names for environments, tasks, rewards, carryovers and borders.

Each name stands for ``"module:object"``, so that the library imports no dataset and no grader.
Third parties add theirs through entry points, in the groups ``delethink.envs``,
``delethink.tasks``, ``delethink.rewards``, ``delethink.carryovers`` and ``delethink.borders``; a
program names what it defines itself with ``register``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

from delethink.errors import ConfigError, UserError, did_you_mean

_SHIPPED = {
    "delethink.envs": {"thinking": "delethink.envs.thinking:ThinkingEnv"},
    "delethink.tasks": {"automaton": "delethink.envs.automaton:AutomatonTask"},
    "delethink.rewards": {"exact": "delethink.rewards.exact:exact_match"},
    "delethink.carryovers": {
        "tail": "delethink.carryover:Tail",
        "head_tail": "delethink.carryover:HeadTail",
        "none": "delethink.carryover:Nothing",
        "full": "delethink.carryover:Full",
        "state_block": "delethink.carryover:StateBlock",
        "summary": "delethink.carryover:Summary",
        "sink_window": "delethink.carryover:SinkWindow",
    },
    "delethink.borders": {"line_break": "delethink.border:LineBreak"},
}
_IN_PROCESS: dict[str, dict[str, Any]] = {group: {} for group in _SHIPPED}

Named = TypeVar("Named")


def names(group: str) -> dict[str, str]:
    """Every known name of a group, ``"delethink.tasks"`` say, and what it stands for."""
    _check_group(group)
    found = {point.name: point.value for point in entry_points(group=group)}
    own = {name: f"{o.__module__}:{o.__qualname__}" for name, o in _IN_PROCESS[group].items()}
    return _SHIPPED[group] | found | own


def register(group: str, name: str) -> Callable[[Named], Named]:
    """A decorator that gives a class or function a name for as long as the program runs.

    Example: ``@register("delethink.carryovers", "every_other")`` above a class.

    Raises:
        ConfigError: no such group, or the name is taken by something else.
    """
    _check_group(group)

    def decorate(named: Named) -> Named:
        known = names(group).get(name)
        own = f"{getattr(named, '__module__', '')}:{getattr(named, '__qualname__', '')}"
        if known is not None and known != own:  # the same one again is a module that was reloaded
            raise ConfigError(f"the {_kind(group)} {name!r} is taken: it stands for {known}")
        _IN_PROCESS[group][name] = named
        return named

    return decorate


def resolve(group: str, name: str) -> Any:
    """The object that ``name`` stands for.

    Raises:
        ConfigError: no such name (the text names the nearest one), or it stands for nothing.
    """
    known = names(group)
    if name in _IN_PROCESS[group]:
        return _IN_PROCESS[group][name]
    if name not in known:
        raise ConfigError(f"unknown {_kind(group)} {name!r}.{did_you_mean(name, known)}")
    module, _, attribute = known[name].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except UserError:
        raise
    except (ImportError, AttributeError) as problem:
        raise ConfigError(
            f"the {_kind(group)} {name!r} stands for {known[name]}, which cannot be loaded: "
            f"{problem}"
        ) from problem


def make(group: str, value: Any) -> Any:
    """What a setting describes: a name, or ``{"name": ..., "args": {...}}``; others as they are.

    Raises:
        ConfigError: an unknown name or parameter (the text names the nearest one), or a missing
        one.
    """
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        return value
    kind = _kind(group)
    if unknown := set(value) - {"name", "args"}:
        key = min(map(str, unknown))
        raise ConfigError(f"unknown key {key!r} of a {kind}.{did_you_mean(key, ('name', 'args'))}")
    name, args = value.get("name"), dict(value.get("args") or {})
    if not isinstance(name, str):
        raise ConfigError(f"a {kind} is a name, or a mapping with name and args; got {value!r}")
    made = resolve(group, name)
    signature = inspect.signature(made)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    if not open_ended and (wrong := sorted(map(str, set(args) - set(signature.parameters)))):
        raise ConfigError(
            f"the {kind} {name!r} has no parameter {wrong[0]!r}."
            f"{did_you_mean(wrong[0], signature.parameters) or ' It has none.'}"
        )
    try:
        signature.bind(**args)
    except TypeError as problem:
        raise ConfigError(f"the {kind} {name!r}: {problem}") from None
    return made(**args)


def _kind(group: str) -> str:
    return group.rpartition(".")[2].removesuffix("s")


def _check_group(group: str) -> None:
    if group not in _SHIPPED:
        raise ConfigError(f"unknown group {group!r}.{did_you_mean(group, _SHIPPED)}")
