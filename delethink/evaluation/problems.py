"""Where an evaluation's problems and their score come from: the one seam to tasks and rewards."""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delethink.errors import ConfigError, did_you_mean
from delethink.registry import names, resolve
from delethink.types import Problem

Score = Callable[[Problem, str], Awaitable[float | None]]  # (problem, stitched text) -> 0 or 1

_PROBLEM_KEYS = ("problem", "prompt", "question")
_ANSWER_KEYS = ("answer", "solution", "gold")


@dataclass(frozen=True)
class Problems:
    """Held-out problems and how an answer to one is scored."""

    name: str
    problems: tuple[Problem, ...]
    reward: str
    score: Score


def load_problems(
    task: str,
    arguments: Mapping[str, Any],
    limit: int | None,
    reward: str | None = None,
    split: str = "heldout",
) -> Problems:
    """The problems of a registered task, or of a local file of JSON lines.

    Args:
        task: a registered name, or a path that ends with ``.jsonl``.
        arguments: of the task; for a file ``problem_key`` and ``answer_key``.
        limit: the first so many; ``None`` for all of a task that says how many it has, or 256.
        reward: what scores them; ``None`` for the task's own, or ``"exact"``.
        split: of a registered task.

    Raises:
        ConfigError: no such task, file, column or reward, or no problem.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"the number of problems must be at least 1, got {limit}")
    if task.endswith(".jsonl"):
        problems, own = tuple(_read(Path(task).expanduser(), arguments)[:limit]), {}
    else:
        made = _make(task, arguments)
        problems = tuple(made.problem(split, i) for i in range(_number(made, split, limit)))
        own = dict(getattr(made, "rewards", {}))
    if not problems:
        raise ConfigError(f"the task {task} has no problem")
    chosen = reward or next(iter(own), "exact")
    return Problems(task, problems, chosen, _scorer(resolve("delethink.rewards", chosen)))


def _make(task: str, arguments: Mapping[str, Any]) -> Any:
    if task not in names("delethink.tasks") and ("/" in task or "." in task):
        raise ConfigError(
            f"no task is called {task!r}, and a file of problems must end with .jsonl: one JSON "
            "object a line, with the problem and its answer"
        )
    make = resolve("delethink.tasks", task)
    try:
        inspect.signature(make).bind(**arguments)
    except TypeError as problem:
        raise ConfigError(f"--task-arg of {task!r}: {problem}") from None
    return make(**arguments)


def _number(task: Any, split: str, limit: int | None) -> int:
    size = getattr(task, "size", None)
    most: int | None = size(split) if callable(size) else None
    if most is None:
        return limit or 256
    return most if limit is None else min(limit, most)


def _read(path: Path, arguments: Mapping[str, Any]) -> list[Problem]:
    if unknown := set(arguments) - {"problem_key", "answer_key"}:
        name = min(unknown)
        raise ConfigError(
            f"unknown --task-arg {name!r} of a file."
            f"{did_you_mean(name, ('problem_key', 'answer_key'))}"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise ConfigError(f"cannot read the problems of {path}: {reason}") from None
    return [_problem(path, i, line, arguments) for i, line in enumerate(lines, 1) if line.strip()]


def _problem(path: Path, number: int, line: str, arguments: Mapping[str, Any]) -> Problem:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise ConfigError(f"{path}, line {number}: not a JSON object")
    asked, answer = (
        _value(row, (arguments[key],) if key in arguments else usual, key, f"{path}, line {number}")
        for key, usual in (("problem_key", _PROBLEM_KEYS), ("answer_key", _ANSWER_KEYS))
    )
    return Problem(asked, answer)


def _value(row: dict[str, Any], keys: tuple[str, ...], option: str, where: str) -> str:
    for key in keys:
        if row.get(key) not in (None, ""):
            return str(row[key])
    raise ConfigError(
        f"{where}: no column {' or '.join(map(repr, keys))}; it has "
        f"{', '.join(sorted(row)) or 'none'}: name the right one with --task-arg {option}=NAME"
    )


def _scorer(reward: Callable[[str, str], float]) -> Score:
    async def score(problem: Problem, text: str) -> float | None:
        return reward(text, problem.answer)

    return score
