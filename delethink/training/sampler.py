"""The traces that a step is trained on: which problems, sampled and scored.

Groups of which all traces earn the same teach nothing. Where several rounds are allowed, they are
replaced by groups of other problems (as in DAPO, arXiv 2503.14476, section 3.2), a bounded number
of times; what was replaced is counted and kept.
"""

from __future__ import annotations

import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from delethink.policy import Progress, Sampling
from delethink.query import query_ids
from delethink.rollout import derive_seed
from delethink.rule import ChunkSpec
from delethink.scoring import Scorer, play_and_score
from delethink.serving.engine import Engine
from delethink.training.prompts import PromptCursor
from delethink.types import Problem, Score, Trace


def has_signal(rewards: Sequence[float | None]) -> bool:
    """Whether the rewards of a group differ, so that its advantages are not all 0."""
    return len({reward for reward in rewards if reward is not None}) > 1


@dataclass(frozen=True)
class Group:
    """The traces of a problem."""

    problem: int  # its place among the training problems
    traces: list[Trace]
    scores: list[Score]

    @property
    def has_signal(self) -> bool:
        """Whether its traces earn different rewards."""
        return has_signal([score.total for score in self.scores])


@dataclass(frozen=True)
class Batch:
    """What a batch of steps is trained on."""

    groups: list[Group]
    replaced: list[Group] = field(default_factory=list)  # sampled, but without signal
    rounds: int = 1
    seconds_sampling: float = 0.0
    seconds_scoring: float = 0.0  # during which scores alone were waited for

    @property
    def problems(self) -> list[int]:
        """The place of the problem of each trace."""
        return [group.problem for group in self.groups for _ in group.traces]

    @property
    def traces(self) -> list[Trace]:
        """All traces, group after group."""
        return [trace for group in self.groups for trace in group.traces]

    @property
    def scores(self) -> list[Score]:
        """Of these traces."""
        return [score for group in self.groups for score in group.scores]


@dataclass
class Sampler:
    """Samples batches of groups.

    Args:
        engine: samples.
        spec: how thinking is cut, bound to the tokenizer.
        problems: of training.
        prompts: which of them comes next.
        scorer: of traces.
        tokenizer: of the model.
        temperature: of sampling.
        group: traces of each problem (G).
        seed: of the run.
        max_rounds: how often a batch may be sampled until all its groups have signal.
        timeout: seconds for each time, after which traces that have not ended are aborted.
    """

    engine: Engine
    spec: ChunkSpec
    problems: Sequence[Problem]
    prompts: PromptCursor
    scorer: Scorer
    tokenizer: Any
    temperature: float
    group: int
    seed: int
    max_rounds: int = 1
    timeout: float | None = None

    def begin(self, step: int, num_groups: int) -> Coroutine[Any, Any, Batch]:
        """Takes the problems of a batch, and returns what samples it.

        Args:
            step: the optimizer steps after this one are trained on it; its seeds depend on that.
            num_groups: problems of the batch.

        Raises:
            UserError: when it is awaited: the engine or a reward raised one.
        """
        return self._sample(step, self.prompts.take(num_groups))

    async def _sample(self, step: int, places: list[int]) -> Batch:
        seed = derive_seed("training", self.seed, step)
        batch = await self._play(places, seed, step)
        for number in range(1, self.max_rounds):
            empty = [i for i, group in enumerate(batch.groups) if not group.has_signal]
            if not empty:
                break
            places = self.prompts.take(len(empty))
            others = await self._play(places, derive_seed(seed, "round", number), step)
            batch = _replaced(batch, dict(zip(empty, others.groups, strict=True)), others)
        return batch

    async def _play(self, places: list[int], seed: int, step: int) -> Batch:
        """A group for each of the problems at these places."""
        started = time.perf_counter()
        places = [place % len(self.problems) for place in places]
        problems = [self.problems[place] for place in places for _ in range(self.group)]
        seeds = [derive_seed(seed, i) for i in range(len(problems))]
        played = await play_and_score(
            self.engine,
            self.spec,
            problems,
            [query_ids(self.tokenizer, problem) for problem in problems],
            [Sampling(self.temperature, seed, Progress(batch=step)) for seed in seeds],
            self.tokenizer,
            self.scorer,
            self.engine.max_model_tokens,
            self.timeout,
        )
        cuts = [slice(i, i + self.group) for i in range(0, len(problems), self.group)]
        groups = [
            Group(place, played.traces[cut], played.scores[cut])
            for place, cut in zip(places, cuts, strict=True)
        ]
        waited = played.seconds_scoring
        return Batch(
            groups,
            seconds_sampling=time.perf_counter() - started - waited,
            seconds_scoring=waited,
        )


def _replaced(batch: Batch, others: dict[int, Group], played: Batch) -> Batch:
    """The batch with other groups in some places."""
    return replace(
        batch,
        groups=[others.get(i, group) for i, group in enumerate(batch.groups)],
        replaced=batch.replaced + [batch.groups[i] for i in others],
        rounds=batch.rounds + 1,
        seconds_sampling=batch.seconds_sampling + played.seconds_sampling,
        seconds_scoring=batch.seconds_scoring + played.seconds_scoring,
    )
