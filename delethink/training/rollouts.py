"""Batches of scored rollouts for the trainer, sampled on demand or prefetched during training.

A group whose traces all have the same reward has no learning signal. With several sampling rounds,
such groups are replaced by groups of other problems (dynamic sampling in DAPO, arXiv 2503.14476,
section 3.2).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from delethink.chunking import ChunkSpec
from delethink.engines.base import Engine
from delethink.policy import Sampling, SchedulingHint
from delethink.rollout import derive_seed
from delethink.scoring.rollouts import run_scored_rollouts
from delethink.scoring.scorer import Scorer
from delethink.tokenization import query_ids
from delethink.training.metrics import has_signal
from delethink.types import Problem, Score, Trace


@dataclass
class PromptCursor:
    """Hand out the indices of the training problems, each once and in order.

    Replaced groups take further problems, so the position does not follow from the step.
    """

    next: int = 0

    def take(self, number: int) -> list[int]:
        """Return the next ``number`` indices."""
        taken = list(range(self.next, self.next + number))
        self.next += number
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position."""
        self.next = int(state["next"])


@dataclass(frozen=True)
class Group:
    """The traces of one problem, with their scores."""

    problem: int  # index among the training problems
    traces: list[Trace]
    scores: list[Score]

    @property
    def has_signal(self) -> bool:
        """True if the traces have different rewards."""
        return has_signal([score.total for score in self.scores])


@dataclass
class Batch:
    """The groups of one or more optimizer steps."""

    groups: list[Group]
    replaced: list[Group] = field(default_factory=list)  # sampled, but not trained on
    rounds: int = 1
    seconds_sampling: float = 0.0
    seconds_scoring: float = 0.0  # after the last trace ended

    @property
    def problems(self) -> list[int]:
        """Index of the problem of each trace."""
        return [group.problem for group in self.groups for _ in group.traces]

    @property
    def traces(self) -> list[Trace]:
        """All traces, group after group."""
        return [trace for group in self.groups for trace in group.traces]

    @property
    def scores(self) -> list[Score]:
        """Score of each trace."""
        return [score for group in self.groups for score in group.scores]


@dataclass
class BatchSampler:
    """Sample and score batches of groups."""

    engine: Engine
    spec: ChunkSpec  # bound to the tokenizer
    problems: Sequence[Problem]
    prompts: PromptCursor
    scorer: Scorer
    tokenizer: Any
    temperature: float
    group_size: int  # traces per problem, G
    seed: int
    max_rounds: int = 1  # sampling rounds per batch
    timeout: float | None = None  # seconds of a round; then unfinished traces are aborted

    def start(self, step: int, num_groups: int) -> Coroutine[Any, Any, Batch]:
        """Take the problems of the batch after ``step`` now, and return a coroutine to sample them.

        Raises:
            UserError: raised by the engine or a reward, when the coroutine is awaited.
        """
        return self._sample(step, self.prompts.take(num_groups))

    async def _sample(self, step: int, problems: list[int]) -> Batch:
        seed = derive_seed("training", self.seed, step)
        batch = await self._sample_round(problems, seed, step)
        for number in range(1, self.max_rounds):
            empty = [i for i, group in enumerate(batch.groups) if not group.has_signal]
            if not empty:
                break
            problems = self.prompts.take(len(empty))
            others = await self._sample_round(problems, derive_seed(seed, "round", number), step)
            batch.replaced += [batch.groups[i] for i in empty]
            for i, group in zip(empty, others.groups, strict=True):
                batch.groups[i] = group
            batch.rounds += 1
            batch.seconds_sampling += others.seconds_sampling
            batch.seconds_scoring += others.seconds_scoring
        return batch

    async def _sample_round(self, problems: list[int], seed: int, step: int) -> Batch:
        started = time.perf_counter()
        size = self.group_size
        problems = [index % len(self.problems) for index in problems]
        repeated = [self.problems[index] for index in problems for _ in range(size)]
        seeds = [derive_seed(seed, i) for i in range(len(repeated))]
        traces, scores, scoring = await run_scored_rollouts(
            self.engine,
            self.spec,
            repeated,
            [query_ids(self.tokenizer, problem) for problem in repeated],
            [Sampling(self.temperature, seed, SchedulingHint(batch=step)) for seed in seeds],
            self.tokenizer,
            self.scorer,
            self.engine.max_model_tokens,
            self.timeout,
        )
        groups = [
            Group(index, traces[i * size : (i + 1) * size], scores[i * size : (i + 1) * size])
            for i, index in enumerate(problems)
        ]
        sampling = time.perf_counter() - started - scoring
        return Batch(groups, seconds_sampling=sampling, seconds_scoring=scoring)


class _Pending(NamedTuple):
    """A batch in progress."""

    step: int  # optimizer steps before the batch
    state: dict[str, Any]  # position of the prompts before the batch
    batch: Future[Batch]


class Prefetch:
    """Return batches in order, and sample later ones in a background thread meanwhile."""

    def __init__(
        self,
        start: Callable[[int], Coroutine[Any, Any, Batch]],  # for the batch after a step
        prompt_state: Callable[[], dict[str, Any]],  # to restore if a batch is lost
        depth: int,  # batches to sample in advance; 0: each on demand, without a thread
        steps_per_batch: int,
        last_step: int,  # of the run; no batch is sampled for later ones
    ) -> None:
        self._start, self._prompt_state = start, prompt_state
        self._depth, self._steps_per_batch, self._last_step = depth, steps_per_batch, last_step
        self._pending: deque[_Pending] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread

    def next(self, step: int) -> Batch:
        """Return the batch after ``step`` and start the following ones.

        Raises:
            UserError: raised by the engine or a reward while the batch was sampled.
        """
        if not self._depth:
            return asyncio.run(self._start(step))
        if not self._pending:
            self._submit(step)
        pending = self._pending[0]
        if pending.step != step:
            raise RuntimeError(f"the next batch is for step {pending.step}, not for step {step}")
        batch = pending.batch.result()
        self._pending.popleft()
        following = step + self._steps_per_batch * (1 + len(self._pending))
        while len(self._pending) < self._depth and following < self._last_step:
            self._submit(following)
            following += self._steps_per_batch
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the prompts before the pending batches."""
        return self._pending[0].state if self._pending else self._prompt_state()

    def wait(self) -> None:
        """Wait until no batch is being sampled."""
        for pending in self._pending:
            with suppress(Exception):  # ``next`` raises the error
                pending.batch.result()

    def close(self) -> None:
        """Cancel all pending batches. Safe to call twice."""
        self._pending.clear()
        if self._loop is None:
            return
        asyncio.run_coroutine_threadsafe(_cancel_tasks_and_stop(), self._loop)
        self._thread.join()
        self._loop.close()
        self._loop = None

    def _submit(self, step: int) -> None:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
            self._thread.start()
        state = self._prompt_state()
        batch = asyncio.run_coroutine_threadsafe(self._start(step), self._loop)
        self._pending.append(_Pending(step, state, batch))


async def _cancel_tasks_and_stop() -> None:
    """Cancel the other tasks of the event loop, wait for their end, and stop the loop."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    asyncio.get_running_loop().stop()
