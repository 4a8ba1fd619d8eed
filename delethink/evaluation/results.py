"""Results of an evaluation: accuracies with intervals, paired comparisons, cost and timing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from delethink.cost.estimate import Lengths, Workload, estimate
from delethink.cost.flops import Cut, cut_traces, sampling_flops
from delethink.cost.hardware import Accelerator
from delethink.cost.models import model_shape
from delethink.engines.loading import base_model
from delethink.errors import UserError
from delethink.evaluation.metrics import (
    Bootstrap,
    Difference,
    Estimate,
    avg_at_n,
    bootstrap_avg,
    clustered_mean,
    compare_paired,
    maj_at_k,
    maj_at_n,
    pass_at_k,
)
from delethink.evaluation.records import BudgetOutcome, Record
from delethink.evaluation.settings import Setting

Samples = dict[int, list[BudgetOutcome]]
"""Outcomes at one budget by problem, in the order of samples."""


@dataclass(frozen=True)
class AnalysisSettings:
    """Settings of the analysis; they do not change the records."""

    margin: float = 0.02  # smallest difference in accuracy of interest
    bootstrap_k: int | None = None  # k of avg@k by bootstrap (128 in the paper)
    resamples: int = 5000  # number of bootstrap resamples
    seed: int = 0  # seed of the bootstrap
    device: Accelerator | None = None  # for time estimates
    cost_model: str | None = None  # model with the shape for estimates, instead of each model


@dataclass(frozen=True)
class ResultRow:
    """Results of a setting at one budget. Means are over problems, with 95 % intervals."""

    setting: str
    model: str
    mode: str
    way: str
    budget: int
    problems: int
    samples: int  # scored traces
    errors: int  # failed traces; no other number counts them
    avg: Estimate
    pass_at: Mapping[int, Estimate]
    maj_at: Mapping[int, Estimate]
    bootstrap: Bootstrap | None
    out_of_budget: float  # share of traces ended by the budget
    forced: float  # share of traces with a forced answer
    marked: float  # share of traces in which the model wrote the end of thinking
    thinking_tokens: Estimate
    chunks: float
    processed_tokens: float  # tokens of all prompts and outputs per trace
    flops: float | None  # estimated FLOPs per trace
    seconds: float | None  # estimated seconds of all traces on the device


@dataclass(frozen=True)
class PairedComparison:
    """Two settings at a shared budget, or each at its largest budget."""

    first: str
    second: str
    first_budget: int
    second_budget: int
    difference: Difference


@dataclass(frozen=True)
class Results:
    """Results of an evaluation."""

    rows: list[ResultRow]
    comparisons: list[PairedComparison]
    errors: Mapping[str, Mapping[str, int]]  # number of failed traces by setting and reason
    timing: Mapping[str, Mapping[str, float]]  # measured times, different in each run

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without the timing."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "errors": self.errors,
        }


class _SettingRecords:
    """Records of one setting; the last record of a trace counts."""

    def __init__(self, setting: Setting, records: Sequence[Record]) -> None:
        last = {record.key: record for record in records}
        self.setting = setting
        self.scored = [record for _, record in sorted(last.items()) if record.error is None]
        self.errors = [record.error for record in last.values() if record.error is not None]
        self.spans = sorted((record.started, record.ended) for record in records)

    def at(self, index: int) -> Samples:
        """Return the outcomes at ``setting.budgets[index]``."""
        samples: Samples = {}
        for record in self.scored:
            samples.setdefault(record.key.problem, []).append(record.outcomes[index])
        return samples

    def timing(self) -> dict[str, float]:
        """Return the seconds of sampling, without pauses between runs, and rates."""
        seconds, until = 0.0, float("-inf")
        for start, end in self.spans:
            seconds += max(0.0, end - max(start, until))
            until = max(until, end)
        last = [record.outcomes[-1] for record in self.scored]
        tokens = sum(outcome.length for outcome in last)
        return {
            "seconds": seconds,
            "thinking_tokens": tokens,
            "processed_tokens": sum(outcome.processed for outcome in last),
            "tokens_per_second": tokens / seconds if seconds else 0.0,
        }


def summarise(
    settings: Sequence[Setting], records: Iterable[Record], analysis: AnalysisSettings
) -> Results:
    """Compute all results from the records of ``settings``."""
    by_key: dict[str, list[Record]] = {setting.key: [] for setting in settings}
    for record in records:
        by_key[record.key.setting].append(record)
    collected = [_SettingRecords(setting, by_key[setting.key]) for setting in settings]
    rows = []
    for own in collected:
        if own.scored:
            for i, budget in enumerate(own.setting.budgets):
                rows.append(_row(own, budget, own.at(i), analysis))
    return Results(
        rows=rows,
        comparisons=_comparisons(collected, analysis.margin),
        errors={
            # The most frequent reason first; the order of equally frequent ones is stable.
            r.setting.key: dict(Counter(sorted(r.errors)).most_common())
            for r in collected
            if r.errors
        },
        timing={r.setting.key: r.timing() for r in collected if r.spans},
    )


def _row(
    records: _SettingRecords, budget: int, samples: Samples, analysis: AnalysisSettings
) -> ResultRow:
    scores = _scores(samples)
    votes = [[o.vote for o in outcomes] for outcomes in samples.values()]
    every = [outcome for outcomes in samples.values() for outcome in outcomes]
    most = min(map(len, scores))
    ks = sorted({most, *(1 << i for i in range(most.bit_length()))})  # 1, 2, 4, … and the most
    flops, seconds = _cost(records, every, analysis)
    bootstrap = None
    if analysis.bootstrap_k:
        bootstrap = bootstrap_avg(scores, analysis.bootstrap_k, analysis.resamples, analysis.seed)
    return ResultRow(
        setting=records.setting.key,
        model=records.setting.name,
        mode=records.setting.mode,
        way=records.setting.way,
        budget=budget,
        problems=len(samples),
        samples=len(every),
        errors=len(records.errors),
        avg=avg_at_n(scores),
        pass_at={k: pass_at_k(scores, k) for k in ks},
        maj_at={
            k: maj_at_n(votes, scores)
            if all(len(v) == k for v in votes)
            else maj_at_k(votes, scores, k)
            for k in ks
        },
        bootstrap=bootstrap,
        out_of_budget=fmean(o.out_of_budget for o in every),
        forced=fmean(o.forced for o in every),
        marked=fmean(o.is_marked for o in every),
        thinking_tokens=clustered_mean([[o.length for o in s] for s in samples.values()]),
        chunks=fmean(o.chunks for o in every),
        processed_tokens=fmean(o.processed for o in every),
        flops=flops,
        seconds=seconds,
    )


def _cost(
    records: _SettingRecords, outcomes: Sequence[BudgetOutcome], analysis: AnalysisSettings
) -> tuple[float | None, float | None]:
    """Estimate FLOPs per trace and seconds of all traces; ``None`` where no estimate exists."""
    model, device = analysis.cost_model or records.setting.model, analysis.device
    try:
        shape, cut = model_shape(base_model(model)), Cut.of(records.setting.spec)
    except UserError:  # an unknown model or carryover
        return None, None
    queries = {record.key.problem: record.query_tokens for record in records.scored}
    group, query = round(len(records.scored) / len(queries)), round(fmean(queries.values()))
    lengths = np.array([o.length for o in outcomes], float)
    flops = float(sampling_flops(shape, cut_traces(lengths, query, cut, group)).mean())
    if device is None:
        return flops, None
    workload = Workload(query, group, len(queries), gpus=1)
    batch = Lengths.empirical(lengths, workload.traces)
    try:
        seconds = float(estimate(shape, batch, cut, device, None, workload).sampling_seconds)
    except UserError:  # the model does not fit on one device
        return flops, None
    return flops, seconds if np.isfinite(seconds) else None


def _comparisons(collected: Sequence[_SettingRecords], margin: float) -> list[PairedComparison]:
    """Compare settings with one model or one mode in common, at their shared budgets."""
    found = []
    for i, first in enumerate(collected):
        for second in collected[i + 1 :]:
            a, b = first.setting, second.setting
            if (a.name == b.name) == (a.way == b.way):
                continue
            shared = sorted(set(a.budgets) & set(b.budgets))
            for pair in [(n, n) for n in shared] or [(a.budgets[-1], b.budgets[-1])]:
                left = first.at(a.budgets.index(pair[0]))
                right = second.at(b.budgets.index(pair[1]))
                common = sorted(left.keys() & right.keys())
                if len(common) < 2:
                    continue
                difference = compare_paired(
                    _scores({p: left[p] for p in common}),
                    _scores({p: right[p] for p in common}),
                    margin,
                )
                found.append(PairedComparison(a.key, b.key, *pair, difference))
    return found


def _scores(samples: Samples) -> list[list[float]]:
    return [[o.score for o in outcomes] for outcomes in samples.values()]
