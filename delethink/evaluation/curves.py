"""Points of the scaling curves of an evaluation: accuracy against tokens, FLOPs and seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from delethink.evaluation.metrics import Estimate
from delethink.evaluation.results import ResultRow
from delethink.output import safe_text

ScalingKind = Literal["avg", "pass", "maj"]

AXES = {
    "thinking_tokens": "thinking tokens per problem",
    "flops": "estimated FLOPs per problem",
    "seconds": "estimated seconds of all problems on the device",
}
KINDS: dict[ScalingKind, str] = {
    "avg": "accuracy (longer thinking)",
    "pass": "pass@k",
    "maj": "maj@k",
}


@dataclass(frozen=True)
class CurvePoint:
    """A point of a scaling curve. Costs are those of all ``k`` samples of a problem."""

    setting: str
    kind: ScalingKind  # ``avg``: longer thinking, over budgets; ``pass`` and ``maj``: more samples
    budget: int
    k: int
    accuracy: float
    low: float
    high: float
    thinking_tokens: float
    flops: float | None
    seconds: float | None


def curve_points(rows: Sequence[ResultRow]) -> list[CurvePoint]:
    """Return the points of all curves; pass@k and maj@k are taken at the largest budget."""
    largest = {row.setting: row for row in rows}  # rows have rising budgets
    sequential = [_point(row, "avg", 1, row.avg) for row in rows]
    parallel = []
    for row in largest.values():
        parallel += [_point(row, "pass", k, value) for k, value in row.pass_at.items()]
        parallel += [_point(row, "maj", k, value) for k, value in row.maj_at.items()]
    return sequential + parallel


def _point(row: ResultRow, kind: ScalingKind, k: int, value: Estimate) -> CurvePoint:
    return CurvePoint(
        setting=safe_text(row.setting, lines=False),
        kind=kind,
        budget=row.budget,
        k=k,
        accuracy=value.value,
        low=value.low,
        high=value.high,
        thinking_tokens=k * row.thinking_tokens.value,
        flops=None if row.flops is None else k * row.flops,
        # Per sample of each problem, to compare curves with different numbers of samples.
        seconds=None if row.seconds is None else k * row.seconds * row.problems / row.samples,
    )
