"""Plays traces and scores each as soon as it has ended, while the others are still being sampled.

The rewards themselves are reached by name, through the registry; this is what is asked of whatever
puts them together.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from delethink.chunking import ChunkSpec
from delethink.policy import Policy, Sampling
from delethink.rollout import run_rollouts
from delethink.scoring.scorer import Scorer
from delethink.tokenization import Tokenizer, reward_text
from delethink.types import Attempt, Problem, Score, TokenIds, Trace, TraceStop


class Played(NamedTuple):
    """Traces, their scores, and the seconds for which only scores were waited for."""

    traces: list[Trace]
    scores: list[Score]
    seconds_scoring: float


def attempt_at(problem: Problem, trace: Trace, tokenizer: Tokenizer, spec: ChunkSpec) -> Attempt:
    """A finished trace as rewards see it."""
    return Attempt(
        problem=problem,
        text=reward_text(tokenizer, trace.output_ids),
        stop=trace.stop,
        length=trace.length,
        num_chunks=len(trace.thinking),
        budget=spec.budget,
        max_chunks=spec.max_chunks,
        output_ids=trace.output_ids,
    )


def answer_of(
    problem: Problem, text: str, length: int | None = None, budget: int = 0, max_chunks: int = 1
) -> Attempt:
    """A text as if it had been sampled, to see what rewards make of it."""
    length = len(text) if length is None else length
    return Attempt(
        problem, text, TraceStop.COMPLETED, length, 1, max(1, length, budget), max_chunks
    )


async def run_scored_rollouts(
    policy: Policy,
    spec: ChunkSpec,
    problems: Sequence[Problem],
    queries: Sequence[TokenIds],
    samplings: Sequence[Sampling],
    tokenizer: Tokenizer,
    scorer: Scorer,
    max_model_tokens: int | None = None,
    timeout: float | None = None,
) -> Played:
    """Plays one trace for each problem, and scores it, in the order given.

    After ``timeout`` seconds, traces that have not ended are aborted.

    Raises:
        QueryTooLongError: a query leaves no room for thinking; nothing is played then.
        UserError: the policy or a reward raised one; the other traces are given up.
    """
    attempts: dict[int, Attempt] = {}
    parts: dict[int, asyncio.Task[Any]] = {}

    def begin(index: int, trace: Trace) -> None:
        attempts[index] = attempt_at(problems[index], trace, tokenizer, spec)
        parts[index] = asyncio.ensure_future(scorer.parts(attempts[index]))

    try:
        traces = await run_rollouts(
            policy, spec, queries, samplings, max_model_tokens, begin, timeout
        )
        played = time.perf_counter()
        order = range(len(traces))
        scores = await scorer.finish([attempts[i] for i in order], [parts[i] for i in order])
        return Played(traces, scores, time.perf_counter() - played)
    finally:
        for task in parts.values():
            task.cancel()
        await asyncio.gather(*parts.values(), return_exceptions=True)
