"""Thinking in chunks for tinker-cookbook: environments, groups and a data set over our tasks.

    builder = ThinkingDatasetBuilder(
        recipe="recipe.yaml", batch_size=8, group_size=4, max_tokens=45
    )
    train.Config(dataset_builder=builder, max_tokens=45, ...)

A boundary is an observation that does not extend the previous one, so each chunk is a datum of its
own. The cookbook samples at most ``max_tokens`` tokens a call, for every call the same number. A
chunk may take several calls: until it is full, the observation is its prompt and its tokens so far,
which extends the datum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from delethink.errors import MissingExtraError, RewardError
from delethink.integrations.calls import check_call_size
from delethink.integrations.episodes import Episode, EpisodeSource
from delethink.integrations.releases import check_release
from delethink.tasks import select_problems
from delethink.tokenization import query_ids
from delethink.types import Problem, TraceStop

try:
    import chz
    import tinker
    from tinker_cookbook.rl.types import (
        Env,
        EnvGroupBuilder,
        RLDataset,
        RLDatasetBuilder,
        StepResult,
        StopReason,
    )
except ImportError as error:
    raise MissingExtraError(error.name or "tinker_cookbook", "tinker") from None

TRIED_RELEASES = ("0.5.8", "0.6")  # the first, and the first that was not tried
_STOPS = {
    TraceStop.COMPLETED: StopReason.COMPLETED,
    TraceStop.BUDGET: StopReason.MAX_SAMPLED_TOKENS,
}


class ChunkEnv(Env):  # type: ignore[misc]  # the base is untyped here
    """One trace. Steps take the tokens of a call, and a chunk has one call or more."""

    def __init__(self, episode: Episode) -> None:
        self.episode = episode

    async def initial_observation(self) -> tuple[tinker.ModelInput, list[int]]:
        """Return the query and the tokens that end an answer."""
        return self._observation(), self._ends()

    async def step(self, action: list[int], *, extra: Any = None) -> StepResult:
        """Add the tokens of a call to the open chunk, and score the trace at its end.

        Raises:
            ActionError: there are no tokens, or more than the chunk has room for.
            RewardError: a reward has no value for the finished trace.
        """
        episode = self.episode
        # A sampler may leave out the token that ended the answer.
        episode.extend(action, ended=(extra or {}).get("stop_reason") == "stop")
        if episode.stop is None:
            return self._result(0.0)
        score = await episode.score()
        if score.total is None:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in score.errors.items())
            raise RewardError(
                f"the trace has no reward ({reasons or 'no reward applies to it'}); with a "
                "RolloutStrategy that tolerates errors its group goes on without it"
            )
        parts = {f"reward/{name}": v for name, v in score.parts.items() if v is not None}
        return self._result(score.total, parts)

    def _result(self, reward: float, parts: dict[str, float] | None = None) -> StepResult:
        stop = self.episode.stop
        metrics: dict[str, float] = {}
        if stop is not None:
            state = self.episode.state
            metrics = {**(parts or {}), f"stop/{_STOPS[stop]}": 1.0}
            metrics |= {"chunks": state.num_chunks, "thinking_tokens": state.num_sampled}
        return StepResult(
            reward=reward,
            episode_done=stop is not None,
            next_observation=self._observation(),
            next_stop_condition=self._ends(),
            metrics=metrics,
        )

    def _observation(self) -> tinker.ModelInput:
        return tinker.ModelInput.from_ints(self.episode.prompt_ids + self.episode.open_ids)

    def _ends(self) -> list[int]:
        return sorted(self.episode.source.eos_ids)


@dataclass(frozen=True)
class RecipeSource:
    """Arguments of ``EpisodeSource.from_recipe``, so that builders can be pickled."""

    recipe: str
    overrides: tuple[str, ...] = ()
    plain_prompts: bool = False

    def load(self) -> EpisodeSource:
        """Return the source, loaded once in a process.

        Raises:
            UserError: the recipe is wrong, or the release of tinker-cookbook was not tried.
        """
        return _load(self)


@lru_cache(maxsize=4)
def _load(source: RecipeSource) -> EpisodeSource:
    check_release("tinker-cookbook", *TRIED_RELEASES)
    return EpisodeSource.from_recipe(source.recipe, source.overrides, source.plain_prompts)


@dataclass(frozen=True)
class ChunkGroupBuilder(EnvGroupBuilder):  # type: ignore[misc]  # the base is untyped here
    """A group of traces of one problem."""

    source: RecipeSource
    problem: Problem
    group_size: int

    async def make_envs(self) -> Sequence[ChunkEnv]:
        """Return the environments of the group."""
        source = self.source.load()
        return [ChunkEnv(source.begin(self.problem)) for _ in range(self.group_size)]

    def logging_tags(self) -> list[str]:
        """Return the tag of all groups."""
        return ["delethink"]


class ThinkingDataset(RLDataset):  # type: ignore[misc]  # the base is untyped here
    """Batches of groups, in the order of the problems."""

    def __init__(self, groups: Sequence[ChunkGroupBuilder], batch_size: int) -> None:
        self._groups, self._batch_size = list(groups), batch_size

    def get_batch(self, index: int) -> Sequence[ChunkGroupBuilder]:
        """Return the groups of a batch.

        Raises:
            IndexError: there is no such batch.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"the data set has {len(self)} batches, got index {index}")
        start = index * self._batch_size
        return self._groups[start : start + self._batch_size]

    def __len__(self) -> int:
        return -(-len(self._groups) // self._batch_size)


@chz.chz
class ThinkingDatasetBuilder(RLDatasetBuilder):  # type: ignore[misc]  # the base is untyped here
    """Data sets of a recipe: its task, rewards, chunk sizes and tokenizer.

    The model of the recipe must have the tokenizer of the model that is trained.
    """

    recipe: str
    batch_size: int
    group_size: int
    max_tokens: int  # of the training configuration
    num_batches: int = 100
    num_heldout: int = 0  # problems of the test set, with one trace each
    overrides: list[str] = chz.field(default_factory=list)
    plain_prompts: bool = False

    async def __call__(self) -> tuple[ThinkingDataset, ThinkingDataset | None]:
        """Return the training set and the test set.

        Raises:
            UserError: the recipe is wrong, or ``max_tokens`` does not fit its chunks.
        """
        given = RecipeSource(self.recipe, tuple(self.overrides), self.plain_prompts)
        source = given.load()
        check_call_size(source.spec, self.max_tokens)

        def made(split: str, number: int, group_size: int) -> ThinkingDataset:
            selected = select_problems(
                source.task,
                split,
                number,
                lambda problem: len(query_ids(source.tokenizer, problem)),
                source.max_query_tokens,
            )
            groups = [
                ChunkGroupBuilder(given, problem, group_size) for problem in selected.problems
            ]
            return ThinkingDataset(groups, self.batch_size)

        train = made("train", self.num_batches * self.batch_size, self.group_size)
        return train, made("heldout", self.num_heldout, 1) if self.num_heldout else None
