"""Reward functions: their parameters, and the way each is executed.

A reward is a function with any of these parameters, by name:

- ``text``: the sampled text, without the query;
- ``answer``: the gold answer;
- ``metadata``, ``prompt``: of the problem;
- ``length``, ``budget``: sampled tokens, and their maximum;
- ``num_chunks``, ``max_chunks``;
- ``stop``: a ``TraceStop``;
- ``correct``: value of the recipe's accuracy reward for the same trace.

Other parameters are settings. A setting ``end`` with the default ``</think>`` is the model's mark
of the end of thinking, and ``start`` with the default ``<think>`` that of its start, unless the
recipe sets them (``thinking_marks``).

A reward returns a number, or ``None`` where not applicable, and may be ``async``. A function with a
parameter ``completions`` or ``completion_ids`` follows TRL and is called with columns of a batch
and returns a list.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, overload

from delethink.errors import ConfigError, MissingExtraError, did_you_mean
from delethink.scoring.isolation import check_isolation
from delethink.thinking_marks import AUTO, check_mark_setting
from delethink.types import END_OF_THINKING, START_OF_THINKING, Attempt

Function = TypeVar("Function", bound=Callable[..., Any])
RewardKind = Literal["light", "isolated", "thread", "async", "trl"]

POOL_INPUT = "run_program"  # not for recipes: the scorer passes the sandbox of its pool
_ATTEMPT_INPUTS = ("text", "length", "budget", "num_chunks", "max_chunks", "stop")
INPUTS = (*_ATTEMPT_INPUTS, "answer", "metadata", "prompt", "correct")
# Settings that are the marks of the model, with the default that says so, and their attribute of an
# attempt.
_MARKS = {
    "start": (START_OF_THINKING, "start_of_thinking"),
    "end": (END_OF_THINKING, "end_of_thinking"),
}


@dataclass(frozen=True)
class Traits:
    """Execution of a reward function."""

    kind: RewardKind = "isolated"
    requires: tuple[str, str] | None = None  # a package and its extra
    prepare: Callable[[], None] | None = None  # runs once per verifier, without time limit
    evaluates_output: bool = False  # runs what the model wrote, so only inside the isolation
    only_expressions: bool = False  # evaluates arithmetic only
    warm_up: Callable[[Mapping[str, Any]], None] | None = None  # see evaluates_output
    control: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None  # see evaluates_output


def light(function: Function) -> Function:
    """Mark a function with linear run time. The scorer calls such a function directly."""
    return _marked(function, Traits("light"))


def isolated(
    package: str, extra: str, prepare: Callable[[], None] | None = None
) -> Callable[[Function], Function]:
    """Mark a function to run in a verifier process, because of hangs or memory.

    It requires ``package``, which is in ``extra`` of this library. ``prepare`` runs once per
    verifier, without time limit.
    """
    return lambda function: _marked(function, Traits("isolated", (package, extra), prepare))


@overload
def evaluates_output(package: Function) -> Function: ...


@overload
def evaluates_output(
    package: str | None = None,
    extra: str = "",
    prepare: Callable[[], None] | None = None,
    *,
    only_expressions: bool = False,
    warm_up: Callable[[Mapping[str, Any]], None] | None = None,
    control: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
) -> Callable[[Function], Function]: ...


def evaluates_output(
    package: Any = None,
    extra: str = "",
    prepare: Callable[[], None] | None = None,
    *,
    only_expressions: bool = False,
    warm_up: Callable[[Mapping[str, Any]], None] | None = None,
    control: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
) -> Any:
    """Mark a function that evaluates model output as code, to run only inside the isolation.

    Each call runs in a fork of a process that has loaded the function once. A call that fails is
    repeated on a harmless output. If that works, the model's output is to blame and scores 0;
    otherwise the reward is broken and gives none.

    Args:
        package: required package, which is in ``extra`` of this library; or the function, where the
            decorator has no parentheses.
        extra: name of the extra.
        prepare: runs once per process, without time limit.
        only_expressions: refuse evaluated code beyond literals, operators and calls.
        warm_up: loads what the call needs, before the fork; it must not read the model's output.
        control: returns the arguments of a call with a right answer, from those of a failed one.
            Its value must be positive. By default the text is empty, and any value will do.
    """
    if callable(package):
        return evaluates_output()(package)
    requires = (package, extra) if package else None
    traits = Traits("isolated", requires, prepare, True, only_expressions, warm_up, control)
    return lambda function: _marked(function, traits)


def runs_programs(function: Function) -> Function:
    """Mark a function that runs programs in the sandbox ``run_program``, to wait in a thread."""
    return _marked(function, Traits("thread", evaluates_output=True))


def _marked(function: Function, traits: Traits) -> Function:
    function.__delethink_traits__ = traits  # type: ignore[attr-defined]
    return function


def traits_of(function: Callable[..., Any]) -> Traits:
    """Return the traits of ``function``. Unmarked functions are isolated if importable."""
    marked = getattr(function, "__delethink_traits__", None)
    if isinstance(marked, Traits):
        return marked
    parameters = inspect.signature(function).parameters
    if "completions" in parameters or "completion_ids" in parameters:
        return Traits("trl")
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - for instances
    ):
        return Traits("async")
    return Traits("isolated" if is_importable(function) else "thread")


def is_marked(function: Callable[..., Any]) -> bool:
    """Return whether a decorator of this module declared the way of execution."""
    return isinstance(getattr(function, "__delethink_traits__", None), Traits)


def is_importable(function: Callable[..., Any]) -> bool:
    """Return whether another process can import the function by its name."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    return bool(module) and module != "__main__" and name.isidentifier()


@dataclass(frozen=True)
class Reward:
    """A reward function with its name in the recipe, its weight and its settings."""

    name: str
    function: Callable[..., Any]
    weight: float = 1.0
    args: Mapping[str, Any] = field(default_factory=dict)
    isolate: bool | None = None  # None: according to its traits

    def __post_init__(self) -> None:
        if self.kind == "trl":
            return
        parameters = self._parameters
        settings = [name for name in parameters if name not in (*INPUTS, POOL_INPUT)]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for name in self.args:
            if name not in settings and not takes_any:
                raise ConfigError(
                    f"the reward {self.name!r} has no setting {name!r}."
                    f"{did_you_mean(name, settings)}"
                )
        for name in settings:
            parameter = parameters[name]
            variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if parameter.default is parameter.empty and not variable and name not in self.args:
                raise ConfigError(
                    f"the reward {self.name!r} needs the setting {name!r}; write it under "
                    f"rewards.{self.name}.args, or use an input: {', '.join(INPUTS)}"
                )
        if "end" in self.args and self._reads("end"):
            end = check_mark_setting(self.args["end"])
            object.__setattr__(self, "args", {**self.args, "end": end})

    @property
    def kind(self) -> RewardKind:
        """Return the way of execution."""
        kind = traits_of(self.function).kind
        if self.isolate is None or kind in ("trl", "async") or self.needs_sandbox:
            return kind
        return "isolated" if self.isolate else ("thread" if kind == "isolated" else kind)

    @property
    def needs_correctness(self) -> bool:
        """Return whether the reward uses the value of the accuracy reward."""
        return self.kind != "trl" and "correct" in self._parameters

    @property
    def needs_sandbox(self) -> bool:
        """Return whether the function runs programs in the sandbox of the pool."""
        return POOL_INPUT in self._parameters

    @property
    def evaluates_output(self) -> bool:
        """Return whether the function runs what the model wrote."""
        return traits_of(self.function).evaluates_output

    def check(self, allow_unsafe_code: bool = False) -> None:
        """Raise a ``UserError`` if this machine cannot compute the reward."""
        traits = traits_of(self.function)
        if traits.requires and importlib.util.find_spec(traits.requires[0]) is None:
            raise MissingExtraError(*traits.requires)
        if not traits.evaluates_output or allow_unsafe_code:
            return
        if self.kind == "thread" and not self.needs_sandbox:
            raise ConfigError(
                f"the reward {self.name!r} evaluates model output as code, so isolated: false "
                "needs scoring.allow_unsafe_code: true (--allow-unsafe-code)"
            )
        if self.args.get("sandbox") is None:
            check_isolation()

    def arguments(self, attempt: Attempt, correct: float | None = None) -> dict[str, Any]:
        """Return the arguments of the function for ``attempt``, except for TRL's kind."""
        values: dict[str, Any] = {name: getattr(attempt, name) for name in _ATTEMPT_INPUTS}
        values |= {
            "answer": attempt.problem.answer,
            "metadata": dict(attempt.problem.metadata),
            "prompt": attempt.problem.prompt,
            "correct": correct,
        }
        names = self._parameters
        marks = {name: getattr(attempt, _MARKS[name][1]) for name in _MARKS if self._reads(name)}
        given = {k: v for k, v in self.args.items() if k not in marks or v != AUTO}
        return {name: values[name] for name in INPUTS if name in names} | marks | given

    def mark_setting(self, setting: str | None) -> str | None:
        """Return the setting of the end of thinking: that of the reward, where ``setting`` is auto.

        The mark that the accuracy reward looks for is the one that counts everywhere else.
        """
        if setting != AUTO or not self._reads("end"):
            return setting
        own: str | None = self.args.get("end", AUTO)
        return own

    def end_of_thinking(self, resolved: str | None) -> str | None:
        """Return the mark that the reward looks for, if ``resolved`` is the model's.

        ``None`` for a reward that reads the whole text, or looks for no mark.
        """
        if not self._reads("end"):
            return None
        end: str | None = self.args.get("end", AUTO)
        return resolved if end == AUTO else end

    def _reads(self, name: str) -> bool:
        """Return whether a setting is a mark of thinking."""
        parameter = None if self.kind == "trl" else self._parameters.get(name)
        return parameter is not None and parameter.default == _MARKS[name][0]

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters
