"""What is kept of the traces of a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from delethink.traces import TraceRecord, json_like
from delethink.training.grpo import Sampled
from delethink.types import Problem, Score


def trace_records(
    sampled: Sampled, problems: list[Problem], scores: list[Score], tokenizer: Any
) -> list[dict[str, Any]]:
    """One JSON object a trace: what was sampled, exactly as trained, and how it was scored."""
    rows = zip(sampled.examples, sampled.traces, scores, sampled.advantages, strict=True)
    return [
        TraceRecord(
            problem=_storable(problems[example["problem"]]),
            trace=trace,
            reward=score.total,
            rewards=score.parts,
            reward_errors=score.errors,
            advantage=advantage,
            text=tokenizer.decode(list(trace.output_ids)),
        ).to_json()
        for example, trace, score, advantage in rows
    ]


def _storable(problem: Problem) -> Problem:
    """A run does not end because a task's metadata holds what JSON does not know."""
    return replace(problem, metadata=json_like(problem.metadata))
