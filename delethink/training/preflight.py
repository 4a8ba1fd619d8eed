"""What can be known to be wrong with a recipe before anything heavy is imported."""

from __future__ import annotations

import importlib.util
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from delethink.config import Recipe, dump_recipe, with_rewards
from delethink.errors import ConfigError, MissingExtraError
from delethink.output import output_path
from delethink.registry import make_task, resolve
from delethink.scoring import make_scorer
from delethink.serving.checkpoint import digest, locate
from delethink.serving.factory import choose_engine
from delethink.serving.pool_settings import check_resources
from delethink.tasks import Task, rewards_of
from delethink.training.resume import changes
from delethink.training.run_directory import RunDirectory


class Prepared(NamedTuple):
    """A recipe whose names are known."""

    recipe: Recipe  # resolved: its rewards are there, if only the task named them
    task: Task
    evaluation_task: Task  # where held-out problems come from
    scorer: Any  # of training traces; not started
    evaluation_scorer: Any  # of held-out ones: right or wrong; it shares the workers

    def close(self) -> None:
        """Ends what the scorers have started."""
        self.evaluation_scorer.close()
        self.scorer.close()


class Place(NamedTuple):
    """Where a run writes, and whether it was begun there before."""

    run: RunDirectory
    begun: bool
    changed: dict[str, list[Any]]  # [old, new] by dotted key, if so

    def is_finished(self, recipe: Recipe) -> bool:
        """Whether nothing is left to do."""
        return self.begun and self.run.finished_step == recipe.training.max_steps


def prepare(recipe: Recipe) -> Prepared:
    """Resolves every name of a recipe.

    Raises:
        UserError: a name, an argument, a package, a data set, a model folder or an engine is wrong.
    """
    for name, reward in recipe.rewards.items():
        resolve("delethink.rewards", reward.reward or name)
    task = evaluation_task = make_task(recipe.task.name, recipe.task.args, recipe.seed)
    recipe = recipe if recipe.rewards else _with_rewards_of(task, recipe)
    scorer = make_scorer(recipe.rewards, recipe.accuracy_reward, recipe.scoring)
    evaluated = recipe
    if (other := recipe.evaluation.task) is not None:
        evaluation_task = make_task(other.name, other.args, recipe.seed)
        own = recipe.evaluation.model_copy(update={"reward": None})  # it names a training reward
        evaluated = _with_rewards_of(evaluation_task, recipe.model_copy(update={"evaluation": own}))
    accuracy = evaluated.accuracy_reward
    only = {accuracy: evaluated.rewards[accuracy]}  # nothing else is asked of a held-out trace
    evaluation_scorer = make_scorer(only, accuracy, recipe.scoring, scorer.pool)
    locate(recipe.model)
    _check_engine(recipe)
    _check_packages(recipe)
    return Prepared(recipe, task, evaluation_task, scorer, evaluation_scorer)


def place(recipe: Recipe) -> Place:
    """Makes the directory of a resolved recipe's run, or takes the one that the run was begun in.

    Raises:
        RunDirectoryError: it cannot be written, or holds something else or another recipe's run.
    """
    path = run_path(recipe)
    if not RunDirectory.holds_run(path):
        run = RunDirectory.create(path, dump_recipe(recipe), digest(recipe.model))
        return Place(run, False, {})
    changed = changes(path, recipe)
    return Place(RunDirectory.reopen(path), True, changed)


def _with_rewards_of(task: Task, recipe: Recipe) -> Recipe:
    named = rewards_of(task)
    if not named:
        raise ConfigError("the task names no rewards of its own: write rewards: {NAME: WEIGHT}")
    return with_rewards(recipe, named)


def _check_engine(recipe: Recipe) -> None:
    """Settings of workers that an engine in this process would ignore are refused."""
    rollout = recipe.rollout
    if choose_engine(recipe.engine) == "vllm":
        check_resources(
            recipe.gpus_per_worker,
            rollout.tensor_parallel_size,
            rollout.sleep,
            rollout.placement,
            rollout.weight_transfer,
            recipe.trainer.num_workers,
        )
        return
    if recipe.training.max_staleness:
        raise ConfigError(
            f"training.max_staleness={recipe.training.max_staleness} samples while the trainer "
            "trains, which takes engines of their own; the engine here is transformers, with the "
            "trainer's own weights: leave it out or set engine=vllm"
        )
    for key, default in (("num_workers", 1), ("gpus_per_worker", 0.0), ("dtype", "float32")):
        if (value := getattr(recipe, key)) != default:
            raise ConfigError(
                f"{key}={value} is for vLLM's workers; the engine here is transformers, in this "
                f"process, with the trainer's own float32 weights: leave it out or set engine=vllm"
            )


def _check_packages(recipe: Recipe) -> None:
    """What only some settings need is looked for before anything is loaded."""
    if recipe.trainer.num_workers > 1 and importlib.util.find_spec("ray") is None:
        raise MissingExtraError("ray", "ray")
    if recipe.training.lora is not None and importlib.util.find_spec("peft") is None:
        raise MissingExtraError("peft", "lora")
    for name in recipe.training.report_to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"training.report_to names {name}, which is not installed: pip install {name}"
            )


def run_path(recipe: Recipe) -> Path:
    """Where the run of a recipe goes."""
    name = f"{recipe.name}-seed{recipe.seed}-{datetime.now():%Y%m%d-%H%M%S}"
    return output_path(recipe.output or Path("runs") / name)
