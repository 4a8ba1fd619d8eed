"""The figures of a step, as they stand in ``metrics.jsonl``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from delethink.training.sampler import has_signal
from delethink.types import Score, Trace, TraceStop

if TYPE_CHECKING:
    from delethink.training.grpo import Sampled, Work
    from delethink.training.statistics import Means, StepStatistics

# What is called otherwise in a line of metrics than in ``Means``.
_NAMES = {
    "tokens": "trained_tokens",
    "difference": "logprob_difference",
    "difference_max": "logprob_difference_max",
    "outside": "logprob_outside_share",
    "ratio": "importance_ratio",
    "clipped": "clip_fraction",
    "correction": "importance_correction",
}


def trained_metrics(statistics: StepStatistics, work: Work) -> dict[str, Any]:
    """Of the tokens in the loss: means over all of them and, as lists, by place of the chunk."""
    return {
        **_named(statistics.total),
        "by_chunk": {
            name: [_named(means)[name] for means in statistics.by_chunk]
            for name in _named(statistics.total)
        },
        "forward_tokens": work.tokens,
        "forward_batches": work.batches,
        "padding": 1 - work.tokens / work.padded if work.padded else 0.0,
    }


def _named(means: Means) -> dict[str, float]:
    return {_NAMES.get(name, name): value for name, value in means._asdict().items()}


def sampled_metrics(sampled: Sampled, scores: Sequence[Score], group: int) -> dict[str, Any]:
    """Of the traces of a batch: lengths, how they ended, and what they earned.

    Args:
        sampled: the batch.
        scores: of its traces.
        group: traces of each problem, G.
    """
    traces, n = sampled.traces, len(sampled.traces)
    tokens = sum(trace.length for trace in traces)
    rewards = [s.total for s in scores if s.total is not None]
    groups = [[s.total for s in scores[i : i + group]] for i in range(0, n, group)]
    return {
        "reward": fmean(rewards) if rewards else None,
        "reward_std": stdev(rewards) if len(rewards) > 1 else None,
        "groups_without_signal": fmean(not has_signal(each) for each in groups),
        "traces": n,
        "traces_left_out": n - sum(sampled.in_loss),
        "sampled_tokens": tokens,
        "tokens_left_out": sum(
            trace.length
            for trace, counts in zip(traces, sampled.in_loss, strict=True)
            if not counts
        ),
        "thinking_tokens": tokens / n,
        "chunks": fmean(len(trace.thinking) for trace in traces),
        "budget_share": fmean(trace.stop is TraceStop.BUDGET for trace in traces),
        "failed_share": fmean(trace.stop.is_failure for trace in traces),
        "reward_by_chunks": _reward_by_chunks(sampled, scores),
    }


def staleness_metrics(traces: Sequence[Trace], version: int) -> dict[str, float]:
    """How many weight updates ago sampled tokens were sampled.

    Args:
        traces: of the batch.
        version: of the weights that the batch is trained on first.
    """
    ages = [
        (version - chunk.policy_version, len(chunk.output_ids))
        for trace in traces
        for chunk in trace.chunks
        if chunk.policy_version is not None
    ]
    tokens = sum(number for _, number in ages)
    mixed = [len({c.policy_version for c in t.chunks if c.output_ids}) > 1 for t in traces]
    return {
        "staleness": sum(age * number for age, number in ages) / max(1, tokens),
        "staleness_max": max((age for age, _ in ages), default=0),
        "mixed_version_share": fmean(mixed),
    }


def _reward_by_chunks(sampled: Sampled, scores: Sequence[Score]) -> dict[str, float]:
    """Mean reward of the traces that used so many chunks; JSON has no numbers for keys."""
    rewards: dict[int, list[float]] = defaultdict(list)
    for trace, score in zip(sampled.traces, scores, strict=True):
        if score.total is not None:
            rewards[len(trace.thinking)].append(score.total)
    return {str(chunks): fmean(rewards[chunks]) for chunks in sorted(rewards)}


def reward_metrics(scores: Sequence[Score], rewards: Any) -> dict[str, float | int | None]:
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
