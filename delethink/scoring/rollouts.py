"""Rollouts with scores: each trace is scored at its end, while others are sampled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from delethink.chunking import ChunkSpec
from delethink.policy import Policy, Sampling
from delethink.rollout import run_rollouts
from delethink.scoring.scorer import Scorer
from delethink.thinking_marks import USUAL, ThinkingMarks, marks_of
from delethink.tokenization import Tokenizer, reward_text
from delethink.types import Attempt, Problem, Score, TokenIds, Trace, TraceStop


class RolloutResult(NamedTuple):
    """Traces with their scores."""

    traces: list[Trace]
    scores: list[Score]
    seconds_scoring: float  # time between the last sampled token and the last score


def make_attempt(problem: Problem, trace: Trace, tokenizer: Tokenizer, spec: ChunkSpec) -> Attempt:
    """Return a finished trace as input of rewards."""
    marks = marks_of(tokenizer)
    return Attempt(
        problem=problem,
        text=reward_text(tokenizer, trace.output_ids),
        stop=trace.stop,
        length=trace.length,
        num_chunks=len(trace.thinking),
        budget=spec.budget,
        max_chunks=spec.max_chunks,
        output_ids=trace.output_ids,
        start_of_thinking=marks.start,
        end_of_thinking=marks.end,
    )


def attempt_from_text(
    problem: Problem,
    text: str,
    length: int | None = None,
    budget: int = 0,
    max_chunks: int = 1,
    marks: ThinkingMarks = USUAL,
) -> Attempt:
    """Return a text as an attempt of one chunk, to test rewards.

    ``marks`` are those that the text has around its thinking.
    """
    length = len(text) if length is None else length
    return Attempt(
        problem,
        text,
        TraceStop.COMPLETED,
        length,
        1,
        max(1, length, budget),
        max_chunks,
        start_of_thinking=marks.start,
        end_of_thinking=marks.end,
    )


def mark_setting(scorer: Scorer | None, setting: str | None) -> str | None:
    """Return the setting of the end of thinking, or, where it is auto, the accuracy reward's."""
    rewards = () if scorer is None else scorer.rewards
    accuracy = [reward for reward in rewards if scorer and reward.name == scorer.accuracy]
    return accuracy[0].mark_setting(setting) if accuracy else setting


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
    on_end: Callable[[], None] = lambda: None,
) -> RolloutResult:
    """Sample and score one trace for each problem, in the order of ``problems``.

    Unfinished traces are aborted after ``timeout`` seconds. ``on_end`` is called at the end of each
    trace.

    Raises:
        QueryTooLongError: a query leaves no room for a full context; nothing is sampled.
        UserError: raised by the policy or a reward; the other traces are cancelled.
    """
    attempts: dict[int, Attempt] = {}
    parts: dict[int, asyncio.Task[Any]] = {}

    def score(index: int, trace: Trace) -> None:
        attempts[index] = make_attempt(problems[index], trace, tokenizer, spec)
        parts[index] = asyncio.ensure_future(scorer.parts(attempts[index]))
        on_end()

    try:
        traces = await run_rollouts(
            policy, spec, queries, samplings, max_model_tokens, score, timeout
        )
        sampled = time.perf_counter()
        order = range(len(traces))
        scores = await scorer.finish([attempts[i] for i in order], [parts[i] for i in order])
        return RolloutResult(traces, scores, time.perf_counter() - sampled)
    finally:
        for task in parts.values():
            task.cancel()
        await asyncio.gather(*parts.values(), return_exceptions=True)
