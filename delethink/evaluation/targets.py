"""Published results as named targets: a checkpoint, a task, its settings and what to expect.

The numbers are those of the paper (arXiv 2510.06557, section 6, figures 4 and 8, table G.2). Points
of figures are read off with the uncertainty given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

_HUB = "McGill-NLP"
_NORMAL_95 = 1.96  # half width of a 95 % interval, in standard deviations


@dataclass(frozen=True)
class ExpectedAccuracy:
    """A published accuracy."""

    mode: str
    budget: int  # thinking tokens
    accuracy: float
    uncertainty: float  # of reading or rounding the published number
    source: str


@dataclass(frozen=True)
class PaperTarget:
    """An evaluation of the paper: arguments of ``delethink eval`` by name, and what it gave."""

    name: str
    summary: str
    arguments: Mapping[str, str | int]
    expected: tuple[ExpectedAccuracy, ...]
    problems: int  # number of problems of the task


class _Row(Protocol):
    """The fields of a result row that are compared."""

    @property
    def mode(self) -> str: ...
    @property
    def budget(self) -> int: ...
    @property
    def problems(self) -> int: ...
    @property
    def samples(self) -> int: ...
    @property
    def avg(self) -> Any: ...


@dataclass(frozen=True)
class Comparison:
    """A measured accuracy beside the published one and its 95 % interval."""

    mode: str
    budget: int
    published: float
    low: float
    high: float
    source: str
    measured: float | None  # ``None`` if the evaluation has no such row

    @property
    def verdict(self) -> Literal["inside", "below", "above", "not measured"]:
        """Say where the measured accuracy lies."""
        if self.measured is None:
            return "not measured"
        if self.measured < self.low:
            return "below"
        return "above" if self.measured > self.high else "inside"

    def text(self) -> str:
        """Return one line."""
        said = "" if self.measured is None else f"{self.measured:.3f}, "
        return (
            f"{self.mode} at {self.budget:,} tokens: {said}{self.verdict}; published "
            f"{self.published:.3f}, expected {self.low:.3f} to {self.high:.3f} ({self.source})"
        )


def compare(target: PaperTarget, rows: Iterable[_Row], samples: int) -> list[Comparison]:
    """Compare measured accuracies with the published ones.

    The interval has the noise of both samples. It takes all variance to be within problems, which
    bounds it from above; the problems are the same in both.

    Args:
        target: the published results.
        rows: results of an evaluation with the target's settings.
        samples: samples per problem where a row has none.
    """
    found = {(row.mode, row.budget): row for row in rows}
    compared = []
    for one in target.expected:
        row = found.get((one.mode, one.budget))
        traces = row.samples if row is not None and row.samples else target.problems * samples
        published = target.problems * int(target.arguments["samples"])
        variance = one.accuracy * (1 - one.accuracy) * (1 / traces + 1 / published)
        half = _NORMAL_95 * math.sqrt(variance) + one.uncertainty
        compared.append(
            Comparison(
                one.mode,
                one.budget,
                one.accuracy,
                max(0.0, one.accuracy - half),
                min(1.0, one.accuracy + half),
                one.source,
                row.avg.value if row is not None and row.samples else None,
            )
        )
    return compared


def _target(
    name: str,
    summary: str,
    expected: Sequence[tuple[str, int, float, float, str]],
    model: str,
    **arguments: str | int,
) -> PaperTarget:
    shared: dict[str, str | int] = {
        "model": model,
        "mode": "delethink",
        "context_size": "8k",
        "carryover_size": "4k",
        "samples": 256,
        "bootstrap": 128,
    }
    results = tuple(ExpectedAccuracy(*one) for one in expected)
    return PaperTarget(name, summary, shared | arguments, results, problems=30)


TARGETS = {
    target.name: target
    for target in (
        _target(
            "delethink-24k",
            "Delethink 24K on AIME 2025, up to 128K tokens",
            [
                ("delethink", 24_576, 0.315, 0.006, "figure 4, between 22K and 26K"),
                ("delethink", 131_072, 0.347, 0.002, "figure 4"),
            ],
            f"{_HUB}/delethink-24k-1.5b",
            task="aime_2025",
            max_chunks="5,31",
        ),
        _target(
            "delethink-96k",
            "Delethink 96K on AIME 2024, up to 256K tokens",
            [
                ("delethink", 98_304, 0.493, 0.002, "figure 8"),
                ("delethink", 262_144, 0.527, 0.002, "figure 8"),
            ],
            f"{_HUB}/delethink-96k-1.5b",
            task="aime_2024",
            max_chunks="23,63",
        ),
        _target(
            "longcot-24k",
            "LongCoT-RL 24K on AIME 2025",
            [("longcot", 24_576, 0.304, 0.002, "figure 4")],
            f"{_HUB}/longcot-24k-1.5b",
            mode="longcot",
            task="aime_2025",
            max_chunks="5",
        ),
        _target(
            "longcot-8k",
            "LongCoT-RL 8K on AIME 2025, past its training budget",
            [("longcot", 16_384, 0.280, 0.002, "figure 4")],
            f"{_HUB}/longcot-8k-1.5b",
            mode="longcot",
            task="aime_2025",
            max_chunks="3",
        ),
        _target(
            "r1-distill-1.5b",
            "The model before training on AIME 2025: LongCoT at 32K, Delethink at 128K tokens",
            [
                ("longcot", 32_768, 0.236, 0.0005, "table G.2"),
                ("delethink", 131_072, 0.295, 0.0005, "table G.2, which states no budget"),
            ],
            "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
            mode="delethink,longcot",
            task="aime_2025",
            max_chunks="7,31",
            samples=64,
            bootstrap=64,
            cap_longcot=True,
        ),
    )
}
"""Targets by name."""
