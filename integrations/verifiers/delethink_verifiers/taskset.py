"""Tasks and rewards of the library as a taskset, for this harness and any other."""

from __future__ import annotations

import atexit
import itertools
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import verifiers.v1 as vf
from pydantic import Field, model_validator

from delethink.config import Recipe, RewardConfig, ScoringConfig, load_recipe
from delethink.errors import ConfigError, RewardError
from delethink.registry import make_task
from delethink.scoring.scorer import Scorer, make_scorer
from delethink.tasks import Task, check_split, rewards_of, task_size
from delethink.types import Problem
from delethink_verifiers.record import KEY, attempt_of

_TOY_ARGS = {"min_steps": 4, "max_steps": 8}  # of the default source, which the toy model solves
_SCORE = f"{KEY}_score"  # of ``Trace.info``: the total reward, between metrics and rewards


class ProblemData(vf.TaskData):
    """A problem of the library."""

    answer: str = ""
    """The gold answer."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Further facts of the problem, as rewards get them."""
    own_rewards: dict[str, float] = Field(default_factory=dict)
    """Names and weights of the task's own rewards, used where none are configured."""


class ProblemTaskConfig(vf.TaskConfig):
    """Rewards in the form of recipes, under ``--env.taskset.task.*``."""

    score_by: dict[str, Any] = Field(default_factory=dict)
    """Section rewards of a recipe: a weight or a section for each name; unset, the task's own."""
    accuracy: str | None = None
    """Reward for right (1) or wrong (0); unset, the first."""
    scoring: dict[str, Any] = Field(default_factory=dict)
    """Section scoring of a recipe."""

    @model_validator(mode="after")
    def _check_rewards(self) -> ProblemTaskConfig:
        if self.score_by:
            _scorer(self.scorer_key({}))
        return self

    def scorer_key(self, own: Mapping[str, float]) -> str:
        """Return the settings of a scorer as JSON; ``own`` are the task's rewards."""
        return json.dumps([self.score_by or dict(own), self.accuracy, self.scoring])


class ProblemTasksetConfig(vf.TasksetConfig):
    """Source of the problems, under ``--env.taskset.*``."""

    task: ProblemTaskConfig = ProblemTaskConfig()
    recipe: Path | None = None
    """Recipe whose sections task, rewards, scoring and seed are taken where not set."""
    source: str = "automaton"
    """Registered task (``aime_2025``, ``reasoning_gym/chain_sum``), or a data file (JSONL)."""
    args: dict[str, Any] = Field(default_factory=lambda: dict(_TOY_ARGS))
    """Arguments of the task; unset with a source, none."""
    split: str = "heldout"
    """``heldout`` or ``train``."""
    seed: int = 0
    """Seed of tasks with random problems."""

    @model_validator(mode="after")
    def _check_source(self) -> ProblemTasksetConfig:
        if self.recipe is not None:
            self._fill(load_recipe(str(self.recipe)))
        elif "source" in self.model_fields_set and "args" not in self.model_fields_set:
            self.args = {}
        check_split(self.split)
        made = self.made()
        if task_size(made, self.split) == 0:
            raise ConfigError(f"the task {self.source} has no problem in its split {self.split!r}")
        if not self.task.score_by:
            _scorer(self.task.scorer_key(_own_rewards(made)))
        return self

    def _fill(self, recipe: Recipe) -> None:
        values = {"source": recipe.task.name, "args": dict(recipe.task.args), "seed": recipe.seed}
        for name, value in values.items():
            if name not in self.model_fields_set:
                setattr(self, name, value)
        scores = {name: reward.model_dump() for name, reward in recipe.rewards.items()}
        found = {
            "score_by": scores,
            "accuracy": recipe.evaluation.reward,
            "scoring": recipe.scoring.model_dump(),
        }
        update = {k: v for k, v in found.items() if k not in self.task.model_fields_set}
        self.task = self.task.model_copy(update=update)

    def made(self) -> Task:
        """Return the task of the library."""
        return _made_task(self.source, json.dumps(self.args), self.seed, self.split)


class ProblemTask(vf.Task[ProblemData, vf.State, ProblemTaskConfig]):
    """One problem, scored as a training run of the library would score it."""

    @vf.metric
    async def reward_parts(self, trace: vf.Trace) -> Mapping[str, float]:
        """Return the unweighted value of each reward.

        Raises:
            RewardError: there is no reward: the thinking did not end, or a reward failed.
        """
        scorer = _scorer(self.config.scorer_key(self.data.own_rewards))
        (score,) = await scorer.score([attempt_of(trace, problem_of(self.data))])
        if score.total is None:
            reason = "; ".join(f"{name}: {text}" for name, text in score.errors.items())
            raise RewardError(f"no reward: {reason or 'none of the rewards applies'}")
        trace.info[_SCORE] = score.total
        return {name: value for name, value in score.parts.items() if value is not None}

    @vf.reward(weight=1.0)
    async def recipe_reward(self, trace: vf.Trace) -> float:
        """Return the total reward, which the metric has computed before."""
        return float(trace.info[_SCORE])


class ProblemTaskset(vf.Taskset[ProblemTask, ProblemTasksetConfig]):
    """Problems of a registered task or of a data file."""

    def __init__(self, config: ProblemTasksetConfig) -> None:
        super().__init__(config)
        self._size = task_size(config.made(), config.split)
        self.INFINITE = self._size is None

    def load(self) -> Iterator[ProblemTask]:
        """Yield the problems in the order of the task."""
        config, made = self.config, self.config.made()
        own = {} if config.task.score_by else _own_rewards(made)
        for index in itertools.count() if self._size is None else range(self._size):
            problem = made.problem(config.split, index)
            prompt = problem.messages if problem.before else problem.prompt
            data = ProblemData(
                name=f"{config.split}/{index}",
                prompt=prompt,
                answer=problem.answer,
                metadata=dict(problem.metadata),
                own_rewards=own,
            )
            yield ProblemTask(data, config.task)


def problem_of(data: ProblemData) -> Problem:
    """Return the problem of a task."""
    if data.prompt is None or isinstance(data.prompt, str):
        return Problem(data.prompt or "", data.answer, data.metadata)
    *before, last = [{"role": m.role, "content": m.content} for m in data.prompt]
    return Problem(str(last["content"]), data.answer, data.metadata, tuple(before))


def _own_rewards(task: Task) -> dict[str, float]:
    return rewards_of(task) or {"exact": 1.0}


@cache
def _made_task(source: str, args: str, seed: int, split: str) -> Task:
    share = 1.0 if split == "heldout" else None  # of a file; as `delethink eval` reads one
    made: Task = make_task(source, json.loads(args), seed, heldout_share=share)
    return made


@cache
def _scorer(key: str) -> Scorer:
    rewards, accuracy, scoring = json.loads(key)
    made = {name: RewardConfig.model_validate(value) for name, value in rewards.items()}
    scorer = make_scorer(made, accuracy or next(iter(made)), ScoringConfig(**scoring))
    atexit.register(scorer.close)
    return scorer
