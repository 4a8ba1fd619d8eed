"""The reward of an environment: a name, a mapping or a function becomes one number a trace."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from delethink.errors import ConfigError, RewardError, did_you_mean
from delethink.registry import parse_named, resolve
from delethink.scoring.reward import INPUTS, Reward, is_marked
from delethink.types import Attempt

if TYPE_CHECKING:
    from delethink.scoring.pool import VerifierPool
    from delethink.scoring.scorer import Scorer

RewardFunction = Callable[..., Any]  # its parameters name its inputs, as in a recipe

# Verifiers of all environments of a process, by its id because a fork needs its own; their users.
_POOLS: dict[int, VerifierPool] = {}
_USERS: WeakSet[EpisodeReward] = WeakSet()

_INPUTS = [name for name in INPUTS if name != "correct"]  # an environment has one reward


class EpisodeReward:
    """The reward of finished traces.

    A light reward, and a function that this program passes without a mark, is called directly. Any
    other one goes through a ``Scorer`` with its isolation, started by the first trace.

    Args:
        reward: a registered name, ``{"name": ..., "args": {...}}``, or a function. Parameters name
            the inputs, as ``delethink.scoring.reward`` lists them.

    Raises:
        UserError: the reward is unknown, lacks a setting or a package, or needs other inputs.
    """

    def __init__(self, reward: RewardFunction | str | Mapping[str, Any]) -> None:
        self.reward = _make_reward(reward)
        self._scorer: Scorer | None = None

    def __call__(self, attempt: Attempt) -> float:
        """Return the reward of a trace.

        Raises:
            RewardError: the value is no finite number, or a verifier failed.
        """
        reward = self.reward
        own = reward.isolate is False and reward.kind == "thread"
        if own or reward.kind == "light":
            return self._number(reward.function(**reward.arguments(attempt)))
        return self._number(self._score(attempt))

    def close(self) -> None:
        """Stop the verifiers, unless another environment uses them. A call starts them again."""
        _USERS.discard(self)
        self._scorer = None
        if not _USERS and os.getpid() in _POOLS:
            _POOLS.pop(os.getpid()).close()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which starts verifiers of its own."""
        return self.__dict__ | {"_scorer": None}

    def _score(self, attempt: Attempt) -> float | None:
        pool = _POOLS.get(os.getpid())
        if self._scorer is None or self._scorer.pool is not pool:
            from delethink.scoring.pool import VerifierPool  # most rewards need no verifier
            from delethink.scoring.scorer import Scorer

            pool = _POOLS.setdefault(os.getpid(), pool or VerifierPool())
            self._scorer = Scorer([self.reward], pool=pool)
            _USERS.add(self)
        # A thread of its own, as the one of a notebook has an event loop already.
        with ThreadPoolExecutor(1) as thread:
            (score,) = thread.submit(self._scorer.score_now, [attempt]).result()
        for reason in score.errors.values():
            raise RewardError(
                f"the reward {self.reward.name!r} has no value for this trace ({reason}); the "
                "episode has ended: call reset() to go on, or use another reward"
            )
        return score.total

    def _number(self, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise RewardError(
                f"the reward {self.reward.name!r} returned {value!r:.80}, and an environment needs "
                "a finite number for every trace; return one, such as 0.0"
            )
        return number


def _make_reward(given: RewardFunction | str | Mapping[str, Any]) -> Reward:
    isolate: bool | None = None
    if isinstance(given, str | Mapping):
        name, args = parse_named("delethink.rewards", given)
        function = resolve("delethink.rewards", name)
    elif callable(given):
        name = getattr(given, "__name__", None) or type(given).__name__
        function, args = given, {}
        isolate = None if is_marked(given) else False  # another process may not have it
    else:
        raise ConfigError(
            "a reward must be a registered name, a mapping with name and args, or a function; "
            f"got {given!r:.80}"
        )
    _check_signature(name, function, args)
    reward = Reward(name, function, args=args, isolate=isolate)
    if reward.kind == "trl" or reward.needs_correctness:
        raise ConfigError(
            f"the reward {name!r} cannot score a single trace: use it in a recipe, or pass a "
            "function of text and answer"
        )
    reward.check()
    return reward


def _check_signature(name: str, function: RewardFunction, args: Mapping[str, Any]) -> None:
    """Raise a ``ConfigError`` if the function cannot be called with inputs by name."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C
        raise ConfigError(
            f"the reward {name!r} does not say its parameters; wrap it: def reward(text, answer)"
        ) from None
    parameters = signature.parameters
    if is_marked(function) or "completions" in parameters or "completion_ids" in parameters:
        return  # checked by its own tests, or TRL's convention, which is refused later
    for key, parameter in parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ConfigError(
                f"the reward {name!r} takes {key!r} by position, and inputs are given by name; "
                "remove the '/' from its parameters"
            )
        variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if variable and not set(parameters) & set(INPUTS):
            raise ConfigError(
                f"the reward {name!r} names no input, so it would be called without any; name "
                f"those that it reads: {', '.join(_INPUTS)}"
            )
        needed = parameter.default is parameter.empty and not variable
        if needed and key not in INPUTS and key not in args:
            raise ConfigError(
                f"the reward {name!r} needs {key!r}, which is no input."
                f"{did_you_mean(key, _INPUTS)} A setting is written in its args: "
                "{'name': ..., 'args': {...}}"
            )
    if signature.return_annotation in (None, "None"):
        raise ConfigError(
            f"the reward {name!r} is declared to return None, and an environment needs a number "
            "for every trace"
        )
