"""From records to tables: accuracies with intervals, comparisons, scaling, and what it cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from delethink.cost.estimate import Job, Lengths, estimate
from delethink.cost.flops import Cut, cut_traces, sampling_flops
from delethink.cost.hardware import Accelerator
from delethink.cost.models import model_shape
from delethink.cost.shape import ModelShape
from delethink.errors import UserError
from delethink.evaluation.metrics import (
    Bootstrap,
    Difference,
    Estimate,
    Interval,
    avg_at_n,
    bootstrap_avg,
    compare_paired,
    maj_at_k,
    maj_at_n,
    pass_at_k,
    t_quantile,
)
from delethink.evaluation.records import Outcome, Record
from delethink.evaluation.settings import Setting

Samples = dict[int, list[Outcome]]  # by problem, in the order of samples


@dataclass
class Collected:
    """What is kept of a setting's records: some numbers a trace, never its tokens."""

    setting: Setting
    outcomes: dict[tuple[int, int], tuple[Outcome, ...]] = field(default_factory=dict)
    errors: dict[tuple[int, int], str] = field(default_factory=dict)
    spans: list[tuple[float, float]] = field(default_factory=list)
    query_tokens: dict[int, int] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """Takes a record in; a later one of the same trace replaces an earlier one."""
        key = (record.place.problem, record.place.sample)
        self.query_tokens[record.place.problem] = record.query_tokens
        self.spans.append((record.started, record.ended))
        self.errors.pop(key, None)
        self.outcomes.pop(key, None)
        if record.error is None:
            self.outcomes[key] = record.outcomes
        else:
            self.errors[key] = record.error

    def at(self, place: int) -> Samples:
        """The outcomes at one of the budgets, of problems that have any."""
        samples: Samples = {}
        for problem, sample in sorted(self.outcomes):
            samples.setdefault(problem, []).append(self.outcomes[problem, sample][place])
        return samples

    @property
    def seconds(self) -> float:
        """Wall time in which any of its traces was played, pauses between runs left out."""
        total, until = 0.0, -np.inf
        for start, end in sorted(self.spans):
            total += max(0.0, end - max(start, until))
            until = max(until, end)
        return float(total)


@dataclass(frozen=True)
class Row:
    """A setting at a budget."""

    setting: str
    model: str
    mode: str
    way: str
    budget: int
    problems: int
    samples: int  # scored traces
    errors: int  # traces that failed; they count nowhere else
    avg: Estimate
    pass_at: Mapping[int, Estimate]
    maj_at: Mapping[int, Estimate]
    bootstrap: Bootstrap | None
    out_of_budget: float  # share of traces
    forced: float  # share of traces whose answer was asked for
    thinking_tokens: Estimate
    chunks: float
    processed_tokens: float  # of a trace: prompts of all its chunks, and outputs
    flops: float | None  # of a trace, estimated
    seconds: float | None  # of all traces on the named device, estimated

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        values = asdict(self)
        for name in ("avg", "thinking_tokens"):
            values[name] = _plain(getattr(self, name))
        for name in ("pass_at", "maj_at"):
            values[name] = {str(k): _plain(one) for k, one in getattr(self, name).items()}
        values["bootstrap"] = None if self.bootstrap is None else self.bootstrap._asdict()
        return values


@dataclass(frozen=True)
class Comparison:
    """Two settings at the same budget, or at the largest of each."""

    first: str
    second: str
    first_budget: int
    second_budget: int
    difference: Difference

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "difference": self.difference._asdict()}


@dataclass(frozen=True)
class Results:
    """All that an evaluation found; ``timing`` is the one part that differs from run to run."""

    rows: list[Row]
    comparisons: list[Comparison]
    errors: Mapping[str, Mapping[str, int]]  # by setting: reasons and how often
    timing: Mapping[str, Mapping[str, float]]  # by setting

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without the timing."""
        return {
            "rows": [row.as_dict() for row in self.rows],
            "comparisons": [one.as_dict() for one in self.comparisons],
            "errors": self.errors,
        }


@dataclass(frozen=True)
class Reading:
    """How results are read.

    Args:
        margin: the difference in accuracy that would matter.
        bootstrap_k: avg@k of the paper's protocol; ``None`` leaves it out.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        device: what FLOPs and seconds are estimated for; ``None`` leaves seconds out.
    """

    margin: float = 0.02
    bootstrap_k: int | None = None
    resamples: int = 5000
    seed: int = 0
    device: Accelerator | None = None


def collect(settings: Sequence[Setting], records: Iterable[Record]) -> list[Collected]:
    """Sorts records by setting, one at a time; those of other settings are passed over."""
    by_key = {setting.key: Collected(setting) for setting in settings}
    for record in records:
        if record.place.setting in by_key:
            by_key[record.place.setting].add(record)
    return list(by_key.values())


def summarise(
    collected: Sequence[Collected], reading: Reading, cost_models: Mapping[str, str] | None = None
) -> Results:
    """Everything that is said of the records.

    Args:
        collected: by setting.
        reading: how.
        cost_models: for a model, the name under which the cost estimator knows its shape.
    """
    names = cost_models or {}
    rows = [
        row
        for one in collected
        for row in _rows(one, reading, names.get(one.setting.model, one.setting.model))
    ]
    return Results(
        rows=rows,
        comparisons=_comparisons(collected, reading.margin),
        errors={one.setting.key: _count(one.errors.values()) for one in collected if one.errors},
        timing={one.setting.key: _timing(one) for one in collected if one.spans},
    )


def _rows(one: Collected, reading: Reading, cost_model: str) -> list[Row]:
    if not one.outcomes:
        return []
    cost = _Cost.of(one, cost_model, reading.device)
    rows = []
    for place, budget in enumerate(one.setting.budgets):
        samples = one.at(place)
        scores = _scores(samples)
        votes = [[o.vote for o in outcomes] for outcomes in samples.values()]
        every = [outcome for outcomes in samples.values() for outcome in outcomes]
        fewest = min(map(len, scores))
        ks = _powers_of_two(fewest)
        flops, seconds = cost.at(every) if cost else (None, None)
        rows.append(
            Row(
                setting=one.setting.key,
                model=one.setting.model,
                mode=one.setting.mode,
                way=one.setting.way,
                budget=budget,
                problems=len(samples),
                samples=len(every),
                errors=len(one.errors),
                avg=avg_at_n(scores),
                pass_at={k: pass_at_k(scores, k) for k in ks},
                maj_at={
                    k: maj_at_n(votes, scores)
                    if all(len(v) == k for v in votes)
                    else maj_at_k(votes, scores, k)
                    for k in ks
                },
                bootstrap=bootstrap_avg(
                    scores, reading.bootstrap_k, reading.resamples, reading.seed
                )
                if reading.bootstrap_k
                else None,
                out_of_budget=_mean(o.out_of_budget for o in every),
                forced=_mean(o.forced for o in every),
                thinking_tokens=_clustered_mean([[o.length for o in s] for s in samples.values()]),
                chunks=_mean(o.chunks for o in every),
                processed_tokens=_mean(o.processed for o in every),
                flops=flops,
                seconds=seconds,
            )
        )
    return rows


@dataclass(frozen=True)
class _Cost:
    """What the traces of a setting cost by the estimator."""

    shape: ModelShape
    cut: Cut
    query: int
    problems: int
    group: int
    device: Accelerator | None

    @classmethod
    def of(cls, one: Collected, model: str, device: Accelerator | None) -> _Cost | None:
        """``None`` where the estimator does not know the model or the cut."""
        try:
            shape, cut = model_shape(model), Cut.of(one.setting.spec)
        except UserError:
            return None
        problems = {problem for problem, _ in one.outcomes}
        group = max(1, round(len(one.outcomes) / len(problems)))
        query = round(sum(one.query_tokens.values()) / len(one.query_tokens))
        return cls(shape, cut, query, len(problems), group, device)

    def at(self, outcomes: Sequence[Outcome]) -> tuple[float, float | None]:
        """FLOPs of a trace, and seconds of all on one device."""
        lengths = np.array([o.length for o in outcomes], float)
        flops = sampling_flops(self.shape, cut_traces(lengths, self.query, self.cut, self.group))
        if self.device is None:
            return float(flops.mean()), None
        job = Job(self.query, self.group, self.problems, gpus=1)
        batch = Lengths.empirical(lengths, job.traces)
        try:
            cost = estimate(self.shape, batch, self.cut, self.device, None, job)
        except UserError:  # it does not fit on one device
            return float(flops.mean()), None
        seconds = float(cost.sampling_seconds)
        return float(flops.mean()), seconds if np.isfinite(seconds) else None


def _comparisons(collected: Sequence[Collected], margin: float) -> list[Comparison]:
    """Every two settings that differ in model or in way alone, at the budgets that they share."""
    found = []
    for i, first in enumerate(collected):
        for second in collected[i + 1 :]:
            a, b = first.setting, second.setting
            if (a.model == b.model) == (a.way == b.way):
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
                found.append(Comparison(a.key, b.key, *pair, difference))
    return found


def _timing(one: Collected) -> dict[str, float]:
    tokens = sum(outcomes[-1].length for outcomes in one.outcomes.values())
    processed = sum(outcomes[-1].processed for outcomes in one.outcomes.values())
    seconds = one.seconds
    return {
        "seconds": seconds,
        "thinking_tokens": tokens,
        "processed_tokens": processed,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
    }


def _scores(samples: Samples) -> list[list[float]]:
    return [[o.score for o in outcomes] for outcomes in samples.values()]


def _clustered_mean(values_P: Sequence[Sequence[float]]) -> Estimate:
    """A mean over problems, with the interval over problems (Student's t)."""
    means = np.array([sum(values) / len(values) for values in values_P])
    mean, n = float(means.mean()), len(means)
    if n < 2:
        return Estimate(mean, Interval(mean, mean))
    half = t_quantile(0.975, n - 1) * float(means.std(ddof=1)) / n**0.5
    return Estimate(mean, Interval(mean - half, mean + half))


def _powers_of_two(most: int) -> list[int]:
    """1, 2, 4, … and ``most`` itself."""
    ks = [1 << i for i in range(most.bit_length()) if 1 << i <= most]
    return ks if ks[-1] == most else [*ks, most]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _count(reasons: Iterable[str]) -> dict[str, int]:
    counted: dict[str, int] = {}
    for reason in reasons:
        counted[reason] = counted.get(reason, 0) + 1
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def _plain(one: Estimate) -> dict[str, Any]:
    return {"value": one.value, "low": one.interval.low, "high": one.interval.high}
