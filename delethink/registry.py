"""Names for environments, tasks and rewards: the library imports no dataset and no grader.

Each name stands for ``"module:object"``. Third parties add theirs through the entry-point groups
``delethink.envs``, ``delethink.tasks`` and ``delethink.rewards``. ``family/member`` is the member
of a family of tasks: its factory is called with ``member=`` (``reasoning_gym/chain_sum``). A name
with a colon is ``module:object`` itself, of an installed module or one in the working directory.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from delethink.errors import ConfigError, did_you_mean

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
    # How rewards are put together; what the library itself needs of the room of rewards.
    "delethink.scoring": {
        "pool": "delethink.rewards.pool:PoolSettings",
        "reward": "delethink.rewards.reward:Reward",
        "rules": "delethink.rewards.combine:Rules",
        "scorer": "delethink.rewards.combine:Scorer",
        "answer": "delethink.rewards.answer:extract_answer",
    },
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
    kind = group.rpartition(".")[2].removesuffix("s")
    if ":" in name:
        return _imported(kind, name)
    known = names(group)
    if name not in known:
        raise ConfigError(f"unknown {kind} {name!r}.{did_you_mean(name, known)}")
    module, _, attribute = known[name].partition(":")
    return getattr(import_module(module), attribute)


def _imported(kind: str, path: str) -> Any:
    module, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing there hides an installed module
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as problem:
        raise ConfigError(
            f"there is no {kind} {path!r}, which is written module:object: {problem}"
        ) from None


def make_task(name: str, args: Mapping[str, Any], seed: int) -> Any:
    """The task called ``name``, made with ``args``, and with ``seed`` where it takes one.

    Raises:
        UserError: no such name, or arguments that it does not take.
    """
    family, slash, member = name.partition("/")
    make = resolve("delethink.tasks", family)
    parameters = inspect.signature(make).parameters
    given = {**args, **({"member": member} if slash else {})}
    if slash and "member" not in parameters:
        raise ConfigError(f"the task {family!r} is no family: {name!r} names nothing")
    if "seed" in parameters:
        given.setdefault("seed", seed)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in given:
        if key not in parameters and not open_ended:
            raise ConfigError(
                f"task.args of {name!r}: it takes no {key!r}.{did_you_mean(key, parameters)}"
            )
    for key, parameter in parameters.items():
        needed = (
            parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        )
        if needed and key not in given:
            example = "reasoning_gym/chain_sum" if key == "member" else f"{key}=... there"
            raise ConfigError(f"task.args of {name!r}: {key!r} is missing; write {example}")
    try:
        return make(**given)
    except TypeError as problem:  # a word where a number belongs
        raise ConfigError(f"task.args of {name!r}: {problem}") from problem
