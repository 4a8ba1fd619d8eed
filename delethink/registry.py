"""Registered names of environments, tasks, rewards, engines, carryovers and boundaries.

A name stands for ``"module:object"``, so the library imports objects only when they are used.
Packages add names through entry points in the groups ``delethink.envs``, ``delethink.tasks``,
``delethink.rewards``, ``delethink.engines``, ``delethink.carryovers`` and ``delethink.boundaries``.
A program adds names with ``register``. A name with a colon is itself ``module:object``: of an
installed module, or of a file beside the recipe or in the working directory. ``family/member``
names a task of a family, whose factory is called with ``member=`` (``reasoning_gym/chain_sum``).
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from delethink.errors import ConfigError, UserError, did_you_mean
from delethink.json_io import kind_of_file

_PRESETS = (
    "deepscaler",
    "openmath",
    "math_500",
    "aime_2024",
    "aime_2025",
    "aime_2026",
    "hmmt_2025",
    "hmmt_nov_2025",
    "hmmt_feb_2026",
    "beyond_aime",
    "imo_answerbench",
    "gpqa_diamond",
    "supergpqa",
    "livecodebench",
    "livecodebench_v6",
    "crosswordbench",
)
_SHIPPED = {
    "delethink.envs": {"thinking": "delethink.envs.thinking:ThinkingEnv"},
    "delethink.tasks": {
        "automaton": "delethink.envs.automaton:AutomatonTask",
        "dataset": "delethink.envs.dataset:dataset_task",
        "reasoning_gym": "delethink.envs.gym:GymTask",
        **{name: f"delethink.envs.presets:{name}" for name in _PRESETS},
        "aime24": "delethink.envs.presets:aime_2024",  # names used by other evaluators
        "aime25": "delethink.envs.presets:aime_2025",
        "aime26": "delethink.envs.presets:aime_2026",
    },
    "delethink.rewards": {
        "chunks": "delethink.rewards.length:chunks",
        "closes_thinking": "delethink.rewards.format:closes_thinking",
        "code": "delethink.rewards.code:passes_tests",
        "cosine": "delethink.rewards.length:cosine",
        "crossword": "delethink.rewards.match:crossword",
        "exact": "delethink.rewards.match:exact_match",
        "format": "delethink.rewards.format:well_formed",
        "language": "delethink.rewards.format:language",
        "math": "delethink.rewards.math:math_equal",
        "multiple_choice": "delethink.rewards.match:multiple_choice",
        "normalized": "delethink.rewards.match:normalized_match",
        "numeric": "delethink.rewards.numeric:numeric",
        "overlong": "delethink.rewards.length:overlong",
        "reasoning_gym": "delethink.rewards.reasoning_gym:gym_score",
        "ternary": "delethink.rewards.length:ternary",
    },
    "delethink.engines": {
        "transformers": "delethink.engines.transformers:TransformersEngine",
        "vllm": "delethink.engines.vllm:VllmPool",
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
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")  # of files as tasks; also compressed
_MAX_LISTED_NAMES = 20  # of a user's folder or module
_SEARCHED: list[str] = []  # folders of ``search_folder``

Named = TypeVar("Named")


def names(group: str) -> dict[str, str]:
    """Return all names of a group, such as ``"delethink.tasks"``, with their ``module:object``."""
    _kind(group)
    found = _entry_points(group, tuple(sys.path))
    own = {name: f"{o.__module__}:{o.__qualname__}" for name, o in _IN_PROCESS[group].items()}
    return _SHIPPED[group] | found | own


@cache
def _entry_points(group: str, path: tuple[str, ...]) -> dict[str, str]:
    """Return the entry points of a group. A search takes tens of ms, so each path has one."""
    return {point.name: point.value for point in entry_points(group=group)}


def register(group: str, name: str) -> Callable[[Named], Named]:
    """Return a decorator that registers a class or function in this process.

    Example: ``@register("delethink.carryovers", "last_lines")`` above a class.

    Raises:
        ConfigError: the group is unknown, or the name is taken.
    """
    kind = _kind(group)

    def decorate(named: Named) -> Named:
        known = names(group).get(name)
        own = f"{getattr(named, '__module__', '')}:{getattr(named, '__qualname__', '')}"
        if known is not None and known != own:  # an equal path comes from a reloaded module
            raise ConfigError(f"the {kind} {name!r} is taken by {known}; choose another name")
        _IN_PROCESS[group][name] = named
        return named

    return decorate


def resolve(group: str, name: str) -> Any:
    """Import and return the object of a name.

    Raises:
        ConfigError: the name is unknown, or its object cannot be imported.
    """
    kind = _kind(group)
    if ":" in name:
        return _import_path(kind, name)
    known = names(group)
    if name in _IN_PROCESS[group]:
        return _IN_PROCESS[group][name]
    if name not in known:
        _entry_points.cache_clear()  # a package may have been installed since the last search
        known = names(group)
    if name not in known:
        raise ConfigError(f"unknown {kind} {name!r}.{did_you_mean(name, known)}")
    module, _, attribute = known[name].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except UserError:
        raise
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the {kind} {name!r} stands for {known[name]}, which cannot be loaded: {error}"
        ) from error


def make(group: str, value: Any, **defaults: Any) -> Any:
    """Create the object of a setting.

    Args:
        group: the group of the name.
        value: a name, or ``{"name": ..., "args": {...}}``. Other values are returned unchanged.
        defaults: arguments such as ``seed``, used if the object accepts them and ``args`` has none.

    Raises:
        UserError: a name or parameter is unknown or missing, or a value is invalid.
    """
    if not isinstance(value, str | Mapping):
        return value
    kind = _kind(group)
    name, args = parse_named(group, value)
    family, slash, member = name.partition("/") if group == "delethink.tasks" else (name, "", "")
    factory = resolve(group, family)
    parameters = inspect.signature(factory).parameters
    if slash and "member" not in parameters:
        raise ConfigError(
            f"the {kind} {family!r} has no members, got {name!r}; write {family!r} alone"
        )
    args |= {"member": member} if slash else {}
    args = {k: v for k, v in defaults.items() if k in parameters} | args
    _check_arguments(f"the {kind} {name!r}", args, parameters)
    try:
        return factory(**args)
    except TypeError as error:  # a value of a wrong type
        raise ConfigError(f"the {kind} {name!r}: {error}") from error


def parse_named(group: str, value: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and the arguments of a setting: a name, or ``{"name": ..., "args": ...}``.

    Raises:
        ConfigError: the mapping has another form.
    """
    kind = _kind(group)
    if isinstance(value, str):
        return value, {}
    if unknown := set(value) - {"name", "args"}:
        key = min(map(str, unknown))
        raise ConfigError(f"unknown key {key!r} of a {kind}.{did_you_mean(key, ('name', 'args'))}")
    name, args = value.get("name"), value.get("args")
    if not isinstance(name, str) or not (args is None or isinstance(args, Mapping)):
        raise ConfigError(
            f"a {kind} must be a name, or a mapping with name and args; got {value!r:.80}"
        )
    return name, dict(args or {})


def make_task(
    name: str, args: Mapping[str, Any], seed: int, heldout_share: float | None = None
) -> Any:
    """Create a task from its name and arguments, with ``seed`` if its factory accepts one.

    The name may also be a data file, for the task ``dataset``; ``heldout_share`` is the default of
    a file.

    Raises:
        UserError: the name or an argument is unknown.
    """
    if ":" not in name and kind_of_file(path := Path(name).expanduser()) in DATA_SUFFIXES:
        shared = {} if heldout_share is None else {"heldout_share": heldout_share}
        name, args = "dataset", {"dataset": str(path), **shared, **args}
    elif files := _data_files(name):
        raise ConfigError(f"unknown task {name!r}. Did you mean {files[0]!r}?")
    return make("delethink.tasks", {"name": name, "args": dict(args)}, seed=seed)


def _data_files(name: str) -> list[str]:
    """Return the data files with the stem ``name`` in the working directory, if it is no task."""
    if name in names("delethink.tasks") or not re.fullmatch(r"[\w-]+", name):
        return []
    return [name + suffix for suffix in DATA_SUFFIXES if Path(name + suffix).is_file()]


def _check_arguments(
    what: str, args: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]
) -> None:
    kinds = {p.kind for p in parameters.values()}
    wrong = sorted(map(str, set(args) - set(parameters)))
    if wrong and inspect.Parameter.VAR_KEYWORD not in kinds:
        near = did_you_mean(wrong[0], parameters) or " It has none."
        raise ConfigError(f"{what} has no parameter {wrong[0]!r}.{near}")
    for key, parameter in parameters.items():
        variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if not variadic and parameter.default is parameter.empty and key not in args:
            example = "reasoning_gym/chain_sum" if key == "member" else f"{key}=... in its args"
            raise ConfigError(f"{what} needs {key!r}; write {example}")


def search_folder(folder: str | os.PathLike[str]) -> None:
    """Find modules of ``module:object`` names in this folder too."""
    path = os.path.abspath(folder)
    if path not in sys.path:
        sys.path.append(path)  # last, so that no file there hides an installed module
    if path not in _SEARCHED:
        _SEARCHED.append(path)


def searched_folders() -> list[str]:
    """Return the folders of ``search_folder`` so far."""
    return list(_SEARCHED)


def _import_path(kind: str, path: str) -> Any:
    module, _, attribute = path.partition(":")
    search_folder(os.getcwd())
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise ConfigError(
            f"cannot import the {kind} {path!r}, which must be written module:object, such as "
            "my_module:my_function for my_module.py"
        )
    try:
        loaded = import_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(_import_reason(kind, path, module, error)) from error
    try:
        found = getattr(loaded, attribute)
    except AttributeError:
        own = [name for name in vars(loaded) if not name.startswith("_")]
        file = getattr(loaded, "__file__", None) or "no file"
        raise ConfigError(
            f"the {kind} {path!r}: {module} ({file}) has no {attribute!r}."
            f"{_nearest(attribute, own)}"
        ) from None
    if not callable(found):
        raise ConfigError(
            f"the {kind} {path!r} must be a function or a class, and it is a {type(found).__name__}"
        )
    return found


def _nearest(name: str, allowed: Collection[str]) -> str:
    """Return the nearest of a user's names, or all of them if they are few."""
    hint = did_you_mean(name, allowed)
    return hint if len(allowed) <= _MAX_LISTED_NAMES or "Did you" in hint else ""


def _import_reason(kind: str, path: str, module: str, error: BaseException) -> str:
    """Return why a user's module cannot be imported: absent, or with a fault in its own lines."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and f"{module}.".startswith(f"{missing}."):
        files = {file.stem for folder in _SEARCHED for file in Path(folder).glob("*.py")}
        near = _nearest(module, files)
        return (
            f"no module {missing!r} for the {kind} {path!r}.{near} Searched: the installed "
            f"packages, {', '.join(_SEARCHED)}"
        )
    if isinstance(error, SyntaxError):
        place = f"{Path(error.filename or module).name}, line {error.lineno}"
        return f"the {kind} {path!r} cannot be imported: {error.msg} ({place})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).parent.as_posix() in _SEARCHED]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"the {kind} {path!r} cannot be imported: {type(error).__name__}: {error}{place}"


def _kind(group: str) -> str:
    """Return the noun for an object of a group, such as ``"task"``."""
    if group not in _SHIPPED:
        raise ConfigError(f"unknown group {group!r}.{did_you_mean(group, _SHIPPED)}")
    return "boundary" if group == "delethink.boundaries" else group.split(".")[1].removesuffix("s")
