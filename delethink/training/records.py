"""What is kept of a step: its traces, and the breakdown of their rewards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from delethink.traces import TraceRecord, json_like
from delethink.training.grpo import Sampled
from delethink.types import Problem, Score


def reward_metrics(scores: list[Score], rewards: Any) -> dict[str, float | int | None]:
    """The breakdown of a step: of each reward, over the traces that it applies to, and errors.

    Errors are counted by trace and kind: ``timeout``, ``memory`` or ``error``.
    """
    metrics: dict[str, float | int | None] = {}
    for reward in rewards:
        values = [v for score in scores if (v := score.parts.get(reward.name)) is not None]
        mean = sum(values) / len(values) if values else None
        metrics[f"rewards/{reward.name}/mean"] = mean
        metrics[f"rewards/{reward.name}/applied_share"] = len(values) / len(scores)
    kinds = [
        next(iter(score.errors.values())).partition(":")[0] for score in scores if score.errors
    ]
    for kind in ("timeout", "memory", "error"):
        metrics[f"verifier/{kind}"] = kinds.count(kind)
    return metrics


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
