"""The task protocol, its optional methods, and the selection of problems.

A task has ``problem(split, index)``, which returns the same problem for the same arguments. These
attributes are optional:

- ``size(split)``: number of different problems (``None`` for unlimited);
- ``rewards``: names and weights of its rewards;
- ``left_out``: number of problems removed by each filter;
- ``demonstrations(problem)``: a right and a wrong answer, to check the grader.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from delethink.errors import ConfigError
from delethink.types import Problem

SPLITS = ("train", "heldout")
_MAX_TRIES = 50  # problems examined for each problem requested


class Task(Protocol):
    """A stream of problems."""

    def problem(self, split: str, index: int) -> Problem:
        """Return problem ``index`` of ``split`` (``"train"`` or ``"heldout"``)."""
        ...


@dataclass(frozen=True)
class SelectedProblems:
    """Problems of a split, and the number of overlong ones skipped."""

    problems: list[Problem]
    overlong: int = 0  # skipped problems with too long a query
    longest: int = 0  # tokens of the longest skipped query


def task_size(task: Task, split: str) -> int | None:
    """Return the number of different problems in a split; ``None`` for unlimited."""
    size: Callable[[str], int | None] | None = getattr(task, "size", None)
    return None if size is None else size(split)


def rewards_of(task: Task) -> dict[str, float]:
    """Return the names and weights of a task's rewards; empty if it names none."""
    return dict(getattr(task, "rewards", {}))


def left_out_of(task: Task) -> dict[str, int]:
    """Return the number of problems removed by each filter of a task."""
    return dict(getattr(task, "left_out", {}))


def demonstrations_of(task: Task, problem: Problem) -> tuple[str | None, str | None]:
    """Return a right and a wrong answer; ``None`` where the task has none."""
    show: Callable[[Problem], tuple[str | None, str | None]] | None = getattr(
        task, "demonstrations", None
    )
    return (None, None) if show is None else show(problem)


def select_problems(
    task: Task,
    split: str,
    number: int,
    query_length: Callable[[Problem], int] | None = None,
    max_query_tokens: int | None = None,
) -> SelectedProblems:
    """Return the first ``number`` problems with a query of at most ``max_query_tokens`` tokens.

    Longer ones are skipped and counted. Training problems repeat in another order once all have
    been returned; held-out problems do not repeat.

    Raises:
        ConfigError: the split has too few problems.
    """
    size = task_size(task, split)
    if size is not None and split == "heldout" and size < number:
        raise ConfigError(
            f"{number} held-out problems are asked for and the task has {size}; "
            + (
                f"set evaluation.num_problems={size}"
                if size > 1
                else "hold some out, such as a tenth by task.args.heldout_share=0.1, or take "
                "another file by task.args.eval_dataset, or train without evaluation: "
                "evaluation.num_problems=0"
            )
        )
    selected: list[Problem] = []
    overlong = longest = index = 0
    tries = number * _MAX_TRIES if size is None or split == "train" else size
    while len(selected) < number and index < tries:
        problem = task.problem(split, index)
        index += 1
        length = query_length(problem) if query_length and max_query_tokens else 0
        if max_query_tokens and length > max_query_tokens:
            overlong, longest = overlong + 1, max(longest, length)
        else:
            selected.append(problem)
    if len(selected) < number:
        raise ConfigError(
            f"got a request for {number} problems of the split {split!r}, and only "
            f"{len(selected)} of {index} have a query of at most {max_query_tokens} tokens (the "
            f"longest has {longest}); raise task.max_query_tokens or request fewer problems"
        )
    return SelectedProblems(selected, overlong, longest)


def check_split(split: str) -> None:
    """Raise a ``ConfigError`` unless ``split`` is ``"train"`` or ``"heldout"``."""
    if split not in SPLITS:
        raise ConfigError(f"split must be 'train' or 'heldout', got {split!r}")


def as_problem(value: Any, source: str) -> Problem:
    """Return a problem from outside: a ``Problem``, or a mapping with its fields.

    Args:
        value: the problem.
        source: what gave it, for the error text.

    Raises:
        ConfigError: it is no problem, or one of its parts has another type.
    """
    if isinstance(value, Mapping):
        unknown = set(value) - {field.name for field in fields(Problem)}
        if unknown or not {"prompt", "answer"} <= set(value):
            raise ConfigError(
                f"{source} needs a prompt and an answer, and may have metadata and before; got "
                f"{sorted(map(str, value))}"
            )
        value = Problem(**value)
    if not isinstance(value, Problem):
        raise ConfigError(f"{source} must be a delethink.Problem, got {value!r:.80}")
    prompt, answer, before = value.prompt, value.answer, value.before
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise ConfigError(
            f"{source}: prompt and answer must be texts, got {prompt!r:.80} and {answer!r:.80}"
        )
    if not isinstance(value.metadata, Mapping):
        raise ConfigError(f"{source}: metadata must be a mapping, got {value.metadata!r:.80}")
    if not isinstance(before, Sequence) or not all(map(_is_message, before)):
        raise ConfigError(
            f"{source}: before must be messages such as {{'role': 'user', 'content': '...'}}, got "
            f"{before!r:.80}"
        )
    return value


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )
