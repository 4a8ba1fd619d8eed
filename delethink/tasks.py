"""What the library knows of any task, and what it assumes where a task does not say.

A task has ``problem(split, index)``, the same problem for ever for the same arguments; all else is
optional. ``size(split)`` is how many different problems there are (``None``: no end), ``rewards``
the rewards that score it and their weights, ``left_out`` how many problems each filter took away,
``demonstrations(problem)`` a right and a wrong answer, for a check of the grader.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from delethink.errors import ConfigError
from delethink.types import Problem

SPLITS = ("train", "heldout")
_MOST_TRIED = 50  # problems that are looked at for each one that is wanted, before giving up


class Task(Protocol):
    """A stream of problems."""

    def problem(self, split: str, index: int) -> Problem:
        """Problem ``index`` of ``split`` (``"train"`` or ``"heldout"``)."""
        ...


@dataclass(frozen=True)
class Taken:
    """Problems of a split, and what was passed over for them."""

    problems: list[Problem]
    overlong: int = 0  # whose query is longer than allowed
    longest: int = 0  # tokens of the longest query passed over


def size_of(task: Task, split: str) -> int | None:
    """How many different problems a split has; ``None`` where it has no end."""
    size: Callable[[str], int | None] | None = getattr(task, "size", None)
    return None if size is None else size(split)


def rewards_of(task: Task) -> dict[str, float]:
    """The names and weights of the rewards that score a task; none where it names none."""
    return dict(getattr(task, "rewards", {}))


def left_out_of(task: Task) -> dict[str, int]:
    """How many problems each filter of a task took away."""
    return dict(getattr(task, "left_out", {}))


def demonstrations_of(task: Task, problem: Problem) -> tuple[str | None, str | None]:
    """What a flawless and what a wrong answer look like; ``None`` where the task has none."""
    show: Callable[[Problem], tuple[str | None, str | None]] | None = getattr(
        task, "demonstrations", None
    )
    return (None, None) if show is None else show(problem)


def take(
    task: Task,
    split: str,
    number: int,
    query_length: Callable[[Problem], int] | None = None,
    most_tokens: int | None = None,
) -> Taken:
    """The first ``number`` problems of a split whose query has at most ``most_tokens`` tokens.

    Longer ones are passed over and counted. Training problems come again, in another order, when
    all have been seen; held-out problems do not.

    Raises:
        ConfigError: there are not that many.
    """
    size = size_of(task, split)
    if size is not None and split == "heldout" and size < number:
        raise ConfigError(
            f"{number} held-out problems are asked for and the task has {size}; set "
            f"evaluation.num_problems={size}" + ("" if size else " or hold some out")
        )
    taken: list[Problem] = []
    overlong = longest = index = 0
    tries = number * _MOST_TRIED if size is None or split == "train" else size
    while len(taken) < number and index < tries:
        problem = task.problem(split, index)
        index += 1
        length = 0 if query_length is None or most_tokens is None else query_length(problem)
        if most_tokens is not None and length > most_tokens:
            overlong, longest = overlong + 1, max(longest, length)
        else:
            taken.append(problem)
    if len(taken) < number:
        raise ConfigError(
            f"{number} problems are asked for of the split {split!r}, but only {len(taken)} of "
            f"{index} have a query of at most {most_tokens} tokens (the longest has {longest}); "
            "raise task.max_query_tokens or ask for fewer"
        )
    return Taken(taken, overlong, longest)


def check_split(split: str) -> None:
    """Raises a ``ConfigError`` unless ``split`` is one of the two."""
    if split not in SPLITS:
        raise ConfigError(f"split must be 'train' or 'heldout', got {split!r}")
