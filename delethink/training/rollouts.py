"""The traces that a step is trained on: which problems, sampled and scored.

Groups of which all traces earn the same teach nothing. Where several rounds are allowed, they are
replaced by groups of other problems (as in DAPO, arXiv 2503.14476, section 3.2), a bounded number
of times; what was replaced is counted and kept.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from delethink.chunking import ChunkSpec
from delethink.engines.base import Engine
from delethink.policy import Sampling, SchedulingHint
from delethink.rollout import derive_seed
from delethink.scoring.rollouts import run_scored_rollouts
from delethink.scoring.scorer import Scorer
from delethink.tokenization import query_ids
from delethink.types import Problem, Score, Trace


class PromptCursor:
    """Hands out the training problems of a run, each once, in order.

    More are taken than steps need where a problem is replaced, so where a run stands is not a
    matter of steps.
    """

    def __init__(self) -> None:
        self.next = 0  # the first problem that nobody has taken

    def take(self, number: int) -> list[int]:
        """The next ``number`` problems."""
        taken = list(range(self.next, self.next + number))
        self.next += number
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.next = int(state["next"])


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
        played = await run_scored_rollouts(
            self.engine,
            self.spec,
            problems,
            [query_ids(self.tokenizer, problem) for problem in problems],
            [Sampling(self.temperature, seed, SchedulingHint(batch=step)) for seed in seeds],
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


class _Begun(NamedTuple):
    step: int  # the optimizer steps after this one are trained on it
    state: dict[str, Any]  # of the run, before it was begun
    batch: Future[Batch]


class SamplingAhead:
    """Batches, some of them begun early.

    Args:
        begin: takes what a batch for the steps after a step needs, and returns what makes it.
        state: what is to be gone back to if a batch is lost: where the prompts stood.
        batches_ahead: the most batches that are begun beyond the one at hand; with 0 all is done
            when it is asked for.
        steps_per_batch: optimizer steps on a batch.
        last_step: of the run; nothing is sampled for steps beyond it.
    """

    def __init__(
        self,
        begin: Callable[[int], Coroutine[Any, Any, Batch]],
        state: Callable[[], dict[str, Any]],
        batches_ahead: int,
        steps_per_batch: int,
        last_step: int,
    ) -> None:
        self._begin_one, self._state = begin, state
        self._batches_ahead, self._steps_per_batch = batches_ahead, steps_per_batch
        self._last_step = last_step
        self._begun: deque[_Begun] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def next(self, step: int) -> Batch:
        """The batch for the optimizer steps after ``step``; those after it are begun."""
        if not self._batches_ahead:
            return asyncio.run(self._begin_one(step))
        if not self._begun:
            self._begin(step)
        begun = self._begun[0]
        if begun.step != step:
            raise RuntimeError(f"a batch for step {step} is asked for, but {begun.step} is next")
        batch = begun.batch.result()
        self._begun.popleft()
        following = step + self._steps_per_batch * (1 + len(self._begun))
        while len(self._begun) < self._batches_ahead and following < self._last_step:
            self._begin(following)
            following += self._steps_per_batch
        return batch

    def state(self) -> dict[str, Any]:
        """Where the prompts stand without the batches that nobody was trained on yet."""
        return self._begun[0].state if self._begun else self._state()

    def settle(self) -> None:
        """Waits until no batch is being sampled."""
        for begun in self._begun:
            with suppress(Exception):  # whoever asks for the batch is told
                begun.batch.result()

    def close(self) -> None:
        """Gives up what was begun. Safe to call twice."""
        for begun in self._begun:
            begun.batch.cancel()
        self._begun.clear()
        loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None:
            asyncio.run_coroutine_threadsafe(_finish(), loop)
            thread.join()
            loop.close()

    def _begin(self, step: int) -> None:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
            self._thread.start()
        state = self._state()
        batch = asyncio.run_coroutine_threadsafe(self._begin_one(step), self._loop)
        self._begun.append(_Begun(step, state, batch))


async def _finish() -> None:
    """Lets cancelled tasks end, then stops the loop."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    asyncio.get_running_loop().stop()
