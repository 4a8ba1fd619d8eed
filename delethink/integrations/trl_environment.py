"""A recipe's task and rewards behind TRL's ``environment_factory``, for a LongCoT baseline.

    task = LongcotTask.from_recipe("recipe.yaml", budget=4096)
    GRPOTrainer(
        model=...,
        reward_funcs=[task.reward],
        environment_factory=task.environment,
        train_dataset=Dataset.from_list(task.rows(1000)),
        args=GRPOConfig(max_completion_length=4096, ...),
    )

TRL's environments append to one growing context, so they cannot express a reset. The policy answers
once, with at most ``budget`` tokens: that is LongCoT, and never Delethink.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delethink.chunking import ChunkSpec
from delethink.config import Recipe
from delethink.errors import ConfigError
from delethink.integrations.episodes import EpisodeSource
from delethink.integrations.releases import check_release
from delethink.scoring.rollouts import make_attempt
from delethink.types import Chunk, Problem, StopReason, Trace, TraceStop


class TaskEnvironment:
    """The problem of one completion, as ``GRPOTrainer`` resets it for each row. It has no tools."""

    def __init__(self, source: EpisodeSource) -> None:
        self._source = source
        self._problem: Problem | None = None

    def reset(self, split: str = "train", index: int | None = None, **columns: Any) -> str:
        """Return the text of a problem, which TRL appends to the user's message.

        Raises:
            ConfigError: the row names no problem, or the problem has earlier messages.
        """
        if index is None:
            raise ConfigError(
                "a row must have the columns prompt, split and index, as those of rows(); got "
                f"{', '.join(sorted(columns)) or 'none'}"
            )
        problem = self._source.problem(split, index)
        if problem.before:
            raise ConfigError(
                f"the problem {split}/{index} has earlier messages, which an environment cannot "
                "add; use a data set of whole prompts and for_trl() instead"
            )
        self._problem = problem
        return problem.prompt


@dataclass
class LongcotTask:
    """Rows, environments and reward of a recipe's task, for one completion of a budget.

    Args:
        source: task, tokenizer and rewards.
        budget: maximum tokens of a completion: ``max_completion_length`` of TRL's arguments.
    """

    source: EpisodeSource
    budget: int

    @classmethod
    def from_recipe(
        cls, recipe: Recipe | str | Path, budget: int, overrides: Sequence[str] = ()
    ) -> LongcotTask:
        """Return the task of a recipe; its chunk sizes are not used.

        Raises:
            UserError: the recipe is wrong.
            ConfigError: the installed TRL was not tried.
        """
        check_release("trl", "1.16", "1.17")
        return cls(EpisodeSource.from_recipe(recipe, overrides), budget)

    def rows(self, num_problems: int, split: str = "train") -> list[dict[str, Any]]:
        """Return rows for ``datasets.Dataset.from_list``; each names a problem, without its text.

        Raises:
            ConfigError: the split has too few problems.
        """
        if num_problems > (size := self.source.size(split)):
            raise ConfigError(
                f"{num_problems} problems were asked for, and the split {split!r} has {size}"
            )
        return [
            {"prompt": [{"role": "user", "content": ""}], "split": split, "index": index}
            for index in range(num_problems)
        ]

    @property
    def environment(self) -> Callable[[], TaskEnvironment]:
        """Return the factory of environments."""
        return lambda: TaskEnvironment(self.source)

    @property
    def reward(self) -> Callable[..., Any]:
        """Return the reward function: the weighted sum of the recipe."""

        async def recipe_reward(
            completion_ids: Sequence[Sequence[int]],
            environments: Sequence[TaskEnvironment],
            log_metric: Callable[[str, float], None] | None = None,
            **columns: Any,
        ) -> list[float | None]:
            pairs = zip(environments, completion_ids, strict=True)
            attempts = [self._attempt(environment, tuple(ids)) for environment, ids in pairs]
            scores = await self.source.scorer.score(attempts)
            if log_metric is not None:
                log_metric("verifier/errors", float(sum(bool(score.errors) for score in scores)))
            return [score.total for score in scores]

        return recipe_reward

    def _attempt(self, environment: TaskEnvironment, ids: tuple[int, ...]) -> Any:
        problem = environment._problem
        assert problem is not None, "TRL resets an environment before each completion"
        is_whole = ids[-1:] != () and ids[-1] in self.source.eos_ids
        stop = StopReason.EOS if is_whole else StopReason.LENGTH
        chunk = Chunk((), ids, (), stop, policy_version=None)
        trace = Trace((), (chunk,), TraceStop.COMPLETED if is_whole else TraceStop.BUDGET)
        return make_attempt(problem, trace, self.source.tokenizer, ChunkSpec.longcot(self.budget))
