"""Samples what an evaluation asks for, a bounded number of traces at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from delethink.errors import ConfigError, UserError, WorkersLostError
from delethink.evaluation.answers import vote
from delethink.evaluation.budgets import cut
from delethink.evaluation.plan import Asked, Setting
from delethink.evaluation.problems import Grade
from delethink.evaluation.records import Outcome, Place, Record
from delethink.policy import Completion, Policy, Sampling
from delethink.query import Tokenizer, query_ids, reward_text
from delethink.rollout import derive_seed, play_trace
from delethink.rule import ChunkSpec
from delethink.tokens import token_array
from delethink.types import (
    END_OF_THINKING,
    Attempt,
    Problem,
    StopReason,
    TokenIds,
    Trace,
    TraceStop,
)


def end_mark(tokenizer: Tokenizer) -> TokenIds:
    """The tokens of the end of thinking, and no others."""
    encode: Any = tokenizer
    return tuple(encode(END_OF_THINKING, add_special_tokens=False)["input_ids"])


class _Lean:
    """Passes on what a policy samples in less memory: long traces are many in flight.

    Log-probs, which nothing here reads, become zeros, and tokens one block of memory.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        done = await self._policy.generate(prompt_ids, max_new_tokens, sampling)
        ids = token_array(done.token_ids)
        return replace(done, token_ids=ids, logprobs=(0.0,) * len(ids))


@dataclass(frozen=True)
class Sampler:
    """Plays and scores traces of one model.

    Args:
        policy: the model.
        tokenizer: renders queries and decodes traces.
        problems: asked ``asked.samples`` times each.
        grade: says right (1) or wrong (0) of an attempt; ``None`` where it cannot.
        asked: how often and how.
        in_flight: the most traces that are played at the same time, and so held in memory.
        max_model_tokens: the longest sequence that the model takes, if it is known.
        keep_tokens: whether records hold what was sampled.
    """

    policy: Policy
    tokenizer: Tokenizer
    problems: Sequence[Problem]
    grade: Grade
    asked: Asked
    in_flight: int = 64
    max_model_tokens: int | None = None
    keep_tokens: bool = True

    @cached_property
    def _lean(self) -> _Lean:
        return _Lean(self.policy)

    async def run(
        self, setting: Setting, done: Collection[Place], keep: Callable[[Record], None]
    ) -> None:
        """Plays every trace of a setting that is not done, and hands each to ``keep`` when it ends.

        Sample 0 of every problem comes first, so that a running accuracy is over all problems.

        Raises:
            UserError: whatever concerns every trace; those in flight are given up.
        """
        places = self._places(setting, done)
        workers = [
            asyncio.ensure_future(self._work(setting, places, keep)) for _ in range(self.in_flight)
        ]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    def _places(self, setting: Setting, done: Collection[Place]) -> Iterator[Place]:
        for sample in range(self.asked.samples):
            for problem in range(len(self.problems)):
                if (place := Place(setting.key, problem, sample)) not in done:
                    yield place

    async def _work(
        self, setting: Setting, places: Iterator[Place], keep: Callable[[Record], None]
    ) -> None:
        for place in places:  # shared by all workers
            keep(await self._record(setting, place))

    async def _record(self, setting: Setting, place: Place) -> Record:
        problem, started = self.problems[place.problem], time.time()
        query = query_ids(self.tokenizer, problem)
        sampling = Sampling(
            self.asked.temperature,
            # Of the problem and the sample alone: models and settings then draw alike, which makes
            # comparisons of the same problems sharper.
            derive_seed("evaluation", self.asked.seed, place.problem, place.sample),
        )
        trace = await play_trace(self._lean, setting.spec, query, sampling, self.max_model_tokens)
        outcomes: tuple[Outcome, ...] = ()
        error = (trace.error or trace.stop.value) if trace.stop.is_failure else None
        if error is None:
            try:
                outcomes = await self._outcomes(setting, trace, problem, sampling)
            except (UserError, WorkersLostError):
                raise
            except Exception as failure:  # the boundary to any grader, and to the engine
                error = f"{type(failure).__name__}: {failure}"
        return Record(
            place=place,
            outcomes=outcomes,
            query_tokens=len(query),
            started=started,
            ended=time.time(),
            error=error,
            output_ids=tuple(c.output_ids for c in trace.chunks) if self.keep_tokens else (),
        )

    async def _outcomes(
        self, setting: Setting, trace: Trace, problem: Problem, sampling: Sampling
    ) -> tuple[Outcome, ...]:
        """At each budget; what fits in a smaller one is the same in a larger one."""
        outcomes: list[Outcome] = []
        for budget, spec in zip(setting.budgets, setting.specs, strict=True):
            if outcomes and not outcomes[-1].out_of_budget:
                outcomes.append(replace(outcomes[-1], budget=budget))
                continue
            outcomes.append(await self._outcome(spec, cut(trace, spec), problem, sampling))
        return tuple(outcomes)

    async def _outcome(
        self, spec: ChunkSpec, trace: Trace, problem: Problem, sampling: Sampling
    ) -> Outcome:
        budget = spec.budget
        text = reward_text(self.tokenizer, trace.output_ids)
        spent = trace.stop is TraceStop.BUDGET
        forced = self.asked.forced_answer_tokens > 0 and spent and END_OF_THINKING not in text
        if forced:
            mark = end_mark(self.tokenizer)
            text += END_OF_THINKING + await self._answer(trace, mark, sampling, budget)
        score = await self.grade(
            Attempt(
                problem=problem,
                text=text,
                stop=trace.stop,
                length=trace.length,
                num_chunks=len(trace.thinking),
                budget=budget,
                max_chunks=spec.max_chunks,
                output_ids=trace.output_ids,
            )
        )
        if score not in (0, 1, None):
            raise ConfigError(
                f"an accuracy is counted by a reward of 0 or 1, got {score}; name another with "
                "--reward"
            )
        if score is None:
            raise RuntimeError("the reward could not tell whether the answer is right")
        return Outcome(
            budget=budget,
            score=float(score),
            length=trace.length,
            chunks=len(trace.chunks),
            processed=sum(len(c.prompt_ids) + len(c.output_ids) for c in trace.chunks),
            out_of_budget=spent,
            vote=vote(text),
            forced=forced,
        )

    async def _answer(self, trace: Trace, mark: TokenIds, sampling: Sampling, budget: int) -> str:
        """What the model answers in the context in which its budget was spent."""
        last = trace.chunks[-1]
        seed = derive_seed("answer", sampling.seed or 0, budget)
        done = await self.policy.generate(
            last.prompt_ids + last.output_ids + mark,
            self.asked.forced_answer_tokens,
            replace(sampling, seed=seed),
        )
        if done.stop in (StopReason.ABORT, StopReason.ERROR):
            raise RuntimeError("the engine gave up the answer that was asked for")
        return reward_text(self.tokenizer, done.token_ids)
