"""The figures of a step, as they stand in ``metrics.jsonl``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from delethink.training.rollouts import has_signal
from delethink.types import Score, Trace, TraceStop

if TYPE_CHECKING:
    from delethink.training.grpo import Sampled, Work


_SUMS = ("entropy", "difference", "outside", "ratio", "clipped", "correction", "kl")


class Means(NamedTuple):
    """Of one place of chunks in their traces, or of all. Without tokens all are 0."""

    tokens: int
    entropy: float  # nats a token
    difference: float  # |log-prob of the trainer - of the engine|
    difference_max: float
    outside: float  # share of tokens whose probabilities in the two differ by more than a tenth
    ratio: float  # probability now over that before the first step on the batch
    clipped: float  # share of tokens that the clip holds back
    correction: float  # weight that corrects for the engine's probabilities
    kl: float  # from the reference weights, where it is asked for


class StepStatistics(NamedTuple):
    """Of the tokens trained on since it was last asked for."""

    total: Means
    by_chunk: list[Means]  # first chunks, second chunks, ...


class ChunkStatistics:
    """Gathers sums of per-token values by the place of their chunk."""

    def __init__(self) -> None:
        self._sums = torch.zeros(0, 1 + len(_SUMS), dtype=torch.float64)
        self._largest = torch.zeros(0, dtype=torch.float64)

    def add(
        self, places: Sequence[int], is_output: torch.Tensor, values: Mapping[str, torch.Tensor]
    ) -> None:
        """Adds a forward batch.

        Args:
            places: of each of its K chunks, from 0.
            is_output: [K, T], the tokens that count.
            values: by the names of ``Means``, [K, T] each; those left out count as 0.
        """
        self._grow(max(places) + 1)
        zeros = torch.zeros_like(is_output, dtype=torch.float64)
        columns = [is_output.double()] + [values.get(name, zeros).double() for name in _SUMS]
        sums = torch.stack([column.where(is_output, zeros).sum(-1) for column in columns], -1)
        index = torch.tensor(places)
        self._sums.index_add_(0, index, sums.cpu())
        largest = values["difference"].double().where(is_output, zeros).amax(-1)
        self._largest.scatter_reduce_(0, index, largest.cpu(), "amax")

    def take(self, accelerator: Any) -> StepStatistics:
        """The means over all processes, which must all ask; gathering starts anew."""
        sums, largest = self._sums, self._largest
        self._sums, self._largest = sums[:0], largest[:0]
        both = torch.cat([sums, largest[:, None]], 1).to(accelerator.device)
        padded = accelerator.pad_across_processes(both, dim=0)
        gathered = accelerator.gather(padded[None]).cpu()
        sums, largest = gathered[:, :, :-1].sum(0), gathered[:, :, -1].amax(0)
        by_chunk = [_means(row, most) for row, most in zip(sums, largest.tolist(), strict=True)]
        most = max(largest.tolist(), default=0.0)
        return StepStatistics(_means(sums.sum(0), most), by_chunk)

    def _grow(self, size: int) -> None:
        missing = max(0, size - len(self._sums))
        self._sums = torch.cat([self._sums, self._sums.new_zeros(missing, self._sums.size(1))])
        self._largest = torch.cat([self._largest, self._largest.new_zeros(missing)])


def _means(sums: torch.Tensor, largest: float) -> Means:
    tokens, *rest = sums.tolist()
    means = {name: value / max(1, tokens) for name, value in zip(_SUMS, rest, strict=True)}
    return Means(tokens=round(tokens), difference_max=largest, **means)


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


def flat_numbers(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers in a line of metrics by ``name``, ``name/key`` or ``name/place``, from 1."""
    for name, value in metrics.items():
        inner = value
        if isinstance(value, Sequence) and not isinstance(value, str):
            inner = {str(place): one for place, one in enumerate(value, 1)}
        if isinstance(inner, Mapping):
            yield from ((f"{name}/{key}", number) for key, number in flat_numbers(inner))
        elif isinstance(value, int | float):
            yield name, value


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
