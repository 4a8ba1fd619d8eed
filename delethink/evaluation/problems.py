"""Where an evaluation's problems and their score come from: the one seam to tasks and rewards."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delethink.config import RewardConfig, ScoringConfig
from delethink.errors import ConfigError
from delethink.registry import make_task
from delethink.scoring import Scorer, make_scorer
from delethink.tasks import left_out_of, rewards_of, size_of, take
from delethink.types import Attempt, Problem

Grade = Callable[[Attempt], Awaitable[float | None]]  # 0 or 1; None: cannot be told

_FILES = (".jsonl", ".json", ".parquet", ".csv")
_USUAL_COLUMNS = {
    "problem_key": "problem|prompt|question",
    "answer_key": "answer|solution|gold",
}
_ENDLESS = 256  # problems of a task without an end, where no number is asked for


@dataclass(frozen=True)
class Problems:
    """Held-out problems and how an answer to one is graded.

    Close it after use: rewards that may hang have processes of their own.
    """

    name: str
    problems: tuple[Problem, ...]
    reward: str
    grade: Grade
    scorer: Scorer | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)  # rows of a data set, by reason

    def close(self) -> None:
        """Ends the processes of its reward."""
        if self.scorer is not None:
            self.scorer.close()


def load_problems(
    task: str,
    arguments: Mapping[str, Any],
    limit: int | None,
    reward: str | None = None,
    split: str = "heldout",
    seed: int = 0,
) -> Problems:
    """The problems of a registered task, or of a local file, all of which is then held out.

    Args:
        task: a registered name (``aime_2024``, ``reasoning_gym/chain_sum``), or a file.
        arguments: of the task; a file takes those of the task ``dataset``.
        limit: the first so many; ``None`` for all, or 256 of a task without an end.
        reward: what grades them; ``None`` for the task's own first one.
        split: of a registered task.
        seed: of a task that takes one.

    Raises:
        UserError: no such task, file, column, package or reward, or no problem.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"the number of problems must be at least 1, got {limit}")
    name, given = _named(task, arguments)
    made = make_task(name, given, seed)
    size = size_of(made, split)
    number = (limit or _ENDLESS) if size is None else min(limit or size, size)
    if not number:
        raise ConfigError(f"the task {task} has no problem in its split {split!r}")
    chosen = reward or next(iter(rewards_of(made)), "exact")
    scorer = make_scorer({chosen: RewardConfig()}, chosen, ScoringConfig())
    taken = tuple(take(made, split, number).problems)
    return Problems(task, taken, chosen, _grade(scorer), scorer, left_out_of(made))


def _named(task: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    path = Path(task).expanduser()
    if path.suffix not in _FILES:
        return task, dict(arguments)
    whole = {"dataset": str(path), "heldout_share": 1.0}
    return "dataset", {**whole, **_USUAL_COLUMNS, **arguments}


def _grade(scorer: Scorer) -> Grade:
    async def grade(attempt: Attempt) -> float | None:
        # No task of its own: an interrupt in one would be lost.
        known: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        known.set_result(await scorer.parts(attempt))
        (score,) = await scorer.finish([attempt], [known])
        if scorer.accuracy in score.errors:
            raise RuntimeError(f"{scorer.accuracy}: {score.errors[scorer.accuracy]}")
        return score.parts[scorer.accuracy]

    return grade
