"""Names for environments, tasks, rewards, carryovers and boundaries.

Each name stands for ``"module:object"``, so that the library imports no dataset and no grader.
Third parties add theirs through entry points, in the groups ``delethink.envs``,
``delethink.tasks``, ``delethink.rewards``, ``delethink.carryovers`` and ``delethink.boundaries``; a
program names what it defines itself with ``register``. ``family/member`` is the member of a family
of tasks: its factory is called with ``member=`` (``reasoning_gym/chain_sum``). A name with a colon
is ``module:object`` itself, of an installed module or one in the working directory.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

from delethink.errors import ConfigError, UserError, did_you_mean

_PRESETS = (
    "deepscaler",
    "openmath",
    "math_500",
    "aime_2024",
    "aime_2025",
    "hmmt_2025",
    "gpqa_diamond",
    "livecodebench",
    "crosswordbench",
)
_SHIPPED = {
    "delethink.envs": {"thinking": "delethink.envs.thinking:ThinkingEnv"},
    "delethink.tasks": {
        "automaton": "delethink.envs.automaton:AutomatonTask",
        "dataset": "delethink.envs.dataset:dataset_task",
        "reasoning_gym": "delethink.envs.gym:GymTask",
        **{name: f"delethink.envs.presets:{name}" for name in _PRESETS},
        "aime24": "delethink.envs.presets:aime_2024",  # as evaluators call them
        "aime25": "delethink.envs.presets:aime_2025",
    },
    "delethink.rewards": {
        "chunks": "delethink.rewards.length:chunks",
        "closes_thinking": "delethink.rewards.format:closes_thinking",
        "code": "delethink.rewards.code:passes_tests",
        "cosine": "delethink.rewards.length:cosine",
        "crossword": "delethink.rewards.crossword:crossword",
        "exact": "delethink.rewards.exact:exact_match",
        "format": "delethink.rewards.format:well_formed",
        "language": "delethink.rewards.format:language",
        "math": "delethink.rewards.math:math_equal",
        "multiple_choice": "delethink.rewards.choice:multiple_choice",
        "normalized": "delethink.rewards.exact:normalized_match",
        "numeric": "delethink.rewards.numeric:numeric",
        "overlong": "delethink.rewards.length:overlong",
        "reasoning_gym": "delethink.rewards.reasoning_gym:gym_score",
        "ternary": "delethink.rewards.length:ternary",
    },
    "delethink.engines": {
        "transformers": "delethink.engines.transformers:TransformersEngine",
        "vllm": "delethink.engines.ray:RayPool",
    },
    "delethink.carryovers": {
        "tail": "delethink.carryover:Tail",
        "head_tail": "delethink.carryover:HeadTail",
        "none": "delethink.carryover:Nothing",
        "full": "delethink.carryover:Full",
        "state_block": "delethink.carryover:StateBlock",
        "summary": "delethink.carryover:Summary",
        "sink_window": "delethink.carryover:SinkWindow",
    },
    "delethink.boundaries": {"line_break": "delethink.carryover:LineBreak"},
}
_IN_PROCESS: dict[str, dict[str, Any]] = {group: {} for group in _SHIPPED}

Named = TypeVar("Named")


def names(group: str) -> dict[str, str]:
    """Every known name of a group, ``"delethink.tasks"`` say, and what it stands for."""
    _check_group(group)
    found = _installed(group, tuple(sys.path))
    own = {name: f"{o.__module__}:{o.__qualname__}" for name, o in _IN_PROCESS[group].items()}
    return _SHIPPED[group] | found | own


@cache
def _installed(group: str, path: tuple[str, ...]) -> dict[str, str]:
    """What packages on a path name; a look at them all takes tens of milliseconds."""
    return {point.name: point.value for point in entry_points(group=group)}


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
    kind = _kind(group)
    if ":" in name:
        return _imported(kind, name)
    known = names(group)
    if name in _IN_PROCESS[group]:
        return _IN_PROCESS[group][name]
    if name not in known:
        _installed.cache_clear()  # the package may have been installed meanwhile
        known = names(group)
    if name not in known:
        raise ConfigError(f"unknown {_kind(group)} {name!r}.{did_you_mean(name, known)}")
    module, _, attribute = known[name].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except UserError:
        raise
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the {_kind(group)} {name!r} stands for {known[name]}, which cannot be loaded: {error}"
        ) from error


def make(group: str, value: Any, **defaults: Any) -> Any:
    """What a setting describes: a name, or ``{"name": ..., "args": {...}}``; others as they are.

    Args:
        group: where the name is looked up.
        value: the setting.
        defaults: arguments for what takes them (``seed``, say), where the setting has none.

    Raises:
        UserError: an unknown name or parameter (the text names the nearest one), a missing one, or
            a value that cannot be used.
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
    family, slash, member = name.partition("/") if group == "delethink.tasks" else (name, "", "")
    made = resolve(group, family)
    parameters = inspect.signature(made).parameters
    if slash and "member" not in parameters:
        raise ConfigError(f"the {kind} {family!r} is no family: {name!r} names nothing")
    args |= {"member": member} if slash else {}
    args = {k: v for k, v in defaults.items() if k in parameters} | args
    _check_arguments(f"the {kind} {name!r}", args, parameters)
    try:
        return made(**args)
    except TypeError as error:  # a word where a number belongs
        raise ConfigError(f"the {kind} {name!r}: {error}") from error


def make_task(name: str, args: Mapping[str, Any], seed: int) -> Any:
    """The task called ``name``, made with ``args``, and with ``seed`` where it takes one.

    Raises:
        UserError: no such name, or arguments that it does not take.
    """
    return make("delethink.tasks", {"name": name, "args": dict(args)}, seed=seed)


def _check_arguments(
    what: str, args: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]
) -> None:
    kinds = {p.kind for p in parameters.values()}
    wrong = sorted(map(str, set(args) - set(parameters)))
    if wrong and inspect.Parameter.VAR_KEYWORD not in kinds:
        near = did_you_mean(wrong[0], parameters) or " It has none."
        raise ConfigError(f"{what} has no parameter {wrong[0]!r}.{near}")
    for key, parameter in parameters.items():
        open_ended = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if not open_ended and parameter.default is parameter.empty and key not in args:
            example = "reasoning_gym/chain_sum" if key == "member" else f"{key}=... in its args"
            raise ConfigError(f"{what} needs {key!r}; write {example}")


def _imported(kind: str, path: str) -> Any:
    module, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing there hides an installed module
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"there is no {kind} {path!r}, which is written module:object: {error}"
        ) from None


def _kind(group: str) -> str:
    plural = group.rpartition(".")[2]
    return "boundary" if plural == "boundaries" else plural.removesuffix("s")


def _check_group(group: str) -> None:
    if group not in _SHIPPED:
        raise ConfigError(f"unknown group {group!r}.{did_you_mean(group, _SHIPPED)}")
