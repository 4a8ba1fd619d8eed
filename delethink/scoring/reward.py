"""What a reward function is here, and how it is to be called.

A reward is a function of any of these parameters, by name: ``text`` (all that was sampled, without
the query), ``answer`` (the gold answer), ``metadata`` (of the problem), ``prompt``, ``length``
(sampled tokens), ``budget``, ``num_chunks``, ``max_chunks``, ``stop`` (a ``TraceStop``) and
``correct`` (what the recipe's accuracy reward gave the same trace). Further parameters are its
settings. It returns a number, or ``None`` where it does not apply; it may be ``async``.

A function with a parameter ``completions`` or ``completion_ids`` is TRL's kind: it is called with
whole columns and returns a list.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from delethink.errors import ConfigError, MissingExtraError, did_you_mean
from delethink.types import Attempt

Function = TypeVar("Function", bound=Callable[..., Any])
Kind = Literal["light", "isolated", "thread", "async", "trl"]

SEEN = (
    "text",
    "answer",
    "metadata",
    "prompt",
    "length",
    "budget",
    "num_chunks",
    "max_chunks",
    "stop",
    "correct",
)


@dataclass(frozen=True)
class Traits:
    """How a reward function is run."""

    kind: Kind = "isolated"
    requires: tuple[str, str] | None = None  # a package, and the extra that brings it
    check: Callable[[], None] | None = None  # raises a UserError where the machine cannot run it
    prepare: Callable[[], None] | None = None  # what a worker does once, outside the time limit


def light(function: Function) -> Function:
    """Marks a function that is linear in the text: it runs where it is called."""
    return _marked(function, Traits("light"))


def isolated(
    package: str, extra: str, prepare: Callable[[], None] | None = None
) -> Callable[[Function], Function]:
    """Marks a function that may hang or fill the memory: it runs in a worker that can be killed.

    It needs ``package``, which ``delethink[extra]`` installs.
    """
    return lambda function: _marked(function, Traits("isolated", (package, extra), None, prepare))


def threaded(check: Callable[[], None]) -> Callable[[Function], Function]:
    """Marks a function that waits for processes of its own: it runs in a thread."""
    return lambda function: _marked(function, Traits("thread", check=check))


def _marked(function: Function, traits: Traits) -> Function:
    function.__delethink_traits__ = traits  # type: ignore[attr-defined]
    return function


def traits_of(function: Callable[..., Any]) -> Traits:
    """How ``function`` is run; what nobody marked is isolated, where a worker can import it."""
    marked = getattr(function, "__delethink_traits__", None)
    if isinstance(marked, Traits):
        return marked
    parameters = inspect.signature(function).parameters
    if "completions" in parameters or "completion_ids" in parameters:
        return Traits("trl")
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - asked of an instance
    ):
        return Traits("async")
    return Traits("isolated" if is_importable(function) else "thread")


def is_importable(function: Callable[..., Any]) -> bool:
    """Whether another process can find the function by its module and name."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    return bool(module) and module != "__main__" and name.isidentifier()


@dataclass(frozen=True)
class Reward:
    """A function with its name in the recipe, its weight and its settings."""

    name: str
    function: Callable[..., Any]
    weight: float = 1.0
    args: Mapping[str, Any] = field(default_factory=dict)
    isolate: bool | None = None  # None: as the function is marked

    def __post_init__(self) -> None:
        if self.kind != "trl":
            self._check_arguments()

    @property
    def kind(self) -> Kind:
        """How it is run."""
        kind = traits_of(self.function).kind
        if self.isolate is None or kind in ("trl", "async"):
            return kind
        return "isolated" if self.isolate else ("thread" if kind == "isolated" else kind)

    @property
    def needs_correctness(self) -> bool:
        """Whether the accuracy reward has to come first."""
        return self.kind != "trl" and "correct" in self._parameters

    def check(self) -> None:
        """Raises a ``UserError`` where this machine cannot compute the reward."""
        traits = traits_of(self.function)
        if traits.requires and importlib.util.find_spec(traits.requires[0]) is None:
            raise MissingExtraError(*traits.requires)
        if traits.check is not None:
            traits.check()

    def arguments(self, attempt: Attempt, correct: float | None = None) -> dict[str, Any]:
        """What the function is called with for ``attempt``; not for TRL's kind."""
        known = {
            "text": attempt.text,
            "answer": attempt.problem.answer,
            "metadata": dict(attempt.problem.metadata),
            "prompt": attempt.problem.prompt,
            "length": attempt.length,
            "budget": attempt.budget,
            "num_chunks": attempt.num_chunks,
            "max_chunks": attempt.max_chunks,
            "stop": attempt.stop,
            "correct": correct,
        }
        names = self._parameters
        return {name: known[name] for name in SEEN if name in names} | dict(self.args)

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    def _check_arguments(self) -> None:
        parameters = self._parameters
        settings = [name for name in parameters if name not in SEEN]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for name in self.args:
            if name not in settings and not takes_any:
                raise ConfigError(
                    f"the reward {self.name!r} has no setting {name!r}."
                    f"{did_you_mean(name, settings)}"
                )
        for name, parameter in parameters.items():
            variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if variable or name in SEEN or name in self.args:
                continue
            if parameter.default is parameter.empty:
                raise ConfigError(
                    f"the reward {self.name!r} needs the setting {name!r}; write it under "
                    f"rewards.{self.name}.args, or take one of these: {', '.join(SEEN)}"
                )
