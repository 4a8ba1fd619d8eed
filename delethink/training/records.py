"""What is kept of the traces of a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from delethink.traces import TraceRecord, json_like
from delethink.training.grpo import Sampled
from delethink.types import Problem, Score, Trace


def trace_records(
    sampled: Sampled, problems: list[Problem], scores: list[Score], tokenizer: Any
) -> list[dict[str, Any]]:
    """One JSON object a trace: what was sampled, exactly as trained, and how it was scored."""
    rows = zip(sampled.examples, sampled.traces, scores, sampled.advantages, strict=True)
    return [
        trace_record(problems[example["problem"]], trace, score, tokenizer, advantage)
        for example, trace, score, advantage in rows
    ]


def trace_record(
    problem: Problem, trace: Trace, score: Score, tokenizer: Any, advantage: float | None = None
) -> dict[str, Any]:
    """One trace; without an advantage it is not trained on."""
    return TraceRecord(
        problem=_storable(problem),
        trace=trace,
        reward=score.total,
        rewards=score.parts,
        reward_errors=score.errors,
        advantage=advantage,
        text=tokenizer.decode(list(trace.output_ids)),
    ).to_json()


def _storable(problem: Problem) -> Problem:
    """A run does not end because a task's metadata holds what JSON does not know."""
    return replace(problem, metadata=json_like(problem.metadata))
