"""The results of a probe: numbers, a page in Markdown, a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from delethink.errors import ConfigError, MissingExtraError
from delethink.evaluation.probe import (
    CONDITIONS,
    Border,
    Condition,
    Point,
    by_distance,
    distance_edges,
    over_traces,
)

_NAMES: dict[Condition, str] = {
    "carried": "query and carryover",
    "none": "query alone",
    "other": "query and another trace's carryover",
}


@dataclass(frozen=True)
class Line:
    """What a reset costs at one distance from the border, under one condition."""

    carryover_size: int
    condition: Condition
    begin: int  # tokens from the border, the first one
    end: int  # and the last one but one
    gap: Point
    divergence: Point


@dataclass(frozen=True)
class Findings:
    """Everything that a probe found.

    Args:
        model: its name.
        context_size: C.
        traces: how many were scored.
        passed_over: how many are longer than the model's window.
        without_border: how many fit in one context.
        lines: the cost of a reset, by carryover, condition and distance.
        repeats: of each trace, the longest run of tokens that comes again a context later.
        answers: traces whose reward found an answer in the whole trace.
        answers_lost: of them, those in which it finds another one, or none, in the last context.
    """

    model: str
    context_size: int
    traces: int
    passed_over: int
    without_border: int
    lines: Sequence[Line]
    repeats: Sequence[int]
    answers: int
    answers_lost: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = asdict(self)
        plain["lines"] = [
            {**asdict(line), "gap": line.gap._asdict(), "divergence": line.divergence._asdict()}
            for line in self.lines
        ]
        return plain


def lines_of(borders: Sequence[Border]) -> list[Line]:
    """The cost of a reset by carryover, condition and distance, and over all distances."""
    if not borders:
        return []
    edges = distance_edges(max(len(border.gap) for border in borders))
    found = []
    for size in sorted({border.carryover_size for border in borders}):
        for condition in CONDITIONS:
            own = [b for b in borders if (b.carryover_size, b.condition) == (size, condition)]
            if not own:
                continue
            gaps = by_distance(own, size, condition, "gap", edges)
            divergences = by_distance(own, size, condition, "divergence", edges)
            for i, (gap, divergence) in enumerate(zip(gaps, divergences, strict=True)):
                if gap is not None and divergence is not None:
                    found.append(Line(size, condition, edges[i], edges[i + 1], gap, divergence))
            found.append(Line(size, condition, 0, edges[-1], *_overall(own)))
    return found


def _overall(borders: Sequence[Border]) -> tuple[Point, Point]:
    gaps: dict[int, list[float]] = {}
    divergences: dict[int, list[float]] = {}
    for border in borders:
        gaps.setdefault(border.trace, []).extend(border.gap.tolist())
        divergences.setdefault(border.trace, []).extend(border.divergence.tolist())
    return over_traces(gaps), over_traces(divergences)


def overall(findings: Findings) -> list[Line]:
    """The lines over all distances."""
    longest = max((line.end for line in findings.lines), default=0)
    return [
        line for line in findings.lines if line.begin == 0 and line.end == longest and longest > 1
    ]


def as_page(findings: Findings) -> str:
    """One page in Markdown."""
    repeats = sorted(findings.repeats)
    long = sum(r >= findings.context_size // 4 for r in repeats)
    rows = [
        f"| {line.carryover_size:,} | {_NAMES[line.condition]} | {_cell(line.gap)} | "
        f"{_cell(line.divergence)} | {line.gap.traces} |"
        for line in overall(findings)
    ]
    near = [
        f"| {line.carryover_size:,} | {line.begin}-{line.end - 1} | {_cell(line.gap)} | "
        f"{_cell(line.divergence)} |"
        for line in findings.lines
        if line.condition == "carried" and line not in overall(findings)
    ]
    scored = findings.traces - findings.without_border
    return "\n".join(
        [
            f"# How Markovian is {findings.model}?",
            "",
            f"C = {findings.context_size:,}. {findings.traces:,} traces were read; "
            f"{findings.passed_over:,} more are longer than the model's window and were passed "
            f"over, {findings.without_border:,} fit in one context and have no border: {scored:,} "
            "are scored. Means over traces with 95 % intervals, in nats a token.",
            "",
            "| m | after the border it sees | loss of log-likelihood | KL | traces |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            "The loss is log p(token | whole history) - log p(token | what it sees); below 0 the "
            "token is more likely without the history.",
            "",
            "By distance from the border, in tokens, with the carryover:",
            "",
            "| m | distance | loss of log-likelihood | KL |",
            "| --- | --- | --- | --- |",
            *near,
            "",
            f"**Loops.** In {long:,} of {len(repeats):,} traces a run of at least C / 4 = "
            f"{findings.context_size // 4:,} tokens comes again a context later or more; the "
            f"longest such run of a trace has {_middle(repeats):,} tokens in the median and "
            f"{max(repeats, default=0):,} at most.",
            "",
            f"**Answers.** In {findings.answers:,} traces an answer is found; in "
            f"{findings.answers_lost:,} of them it is another one, or none, for whoever reads no "
            "more than the last context.",
            "",
        ]
    )


def _middle(values: Sequence[int]) -> int:
    return values[len(values) // 2] if values else 0


def _cell(point: Point) -> str:
    if point.traces < 2:
        return f"{point.mean:.4f}"
    return f"{point.mean:.4f} ({point.low:.4f} to {point.high:.4f})"


def plot(findings: Findings, path: Path) -> None:
    """Draws loss and divergence against the distance from the border.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: the picture cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "eval")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    figure.suptitle(f"What a reset costs {findings.model}, C = {findings.context_size:,}")
    whole = overall(findings)
    curves = {(line.carryover_size, line.condition) for line in findings.lines}
    panels = (("gap", "loss of log-likelihood, nats"), ("divergence", "KL, nats"))
    for axes, (what, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for size, condition in sorted(curves, key=str):
            own = [
                line
                for line in findings.lines
                if (line.carryover_size, line.condition) == (size, condition) and line not in whole
            ]
            points = [getattr(line, what) for line in own]
            name = f"m = {size:,}" if condition == "carried" else f"m = {size:,}, {condition}"
            style = "-" if condition == "carried" else ":"
            xs = [line.begin + 1 for line in own]
            axes.plot(xs, [p.mean for p in points], style, marker=".", label=name)
        axes.set_xscale("log")
        axes.set_xlabel("tokens after the border")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as problem:
        raise ConfigError(f"cannot write the picture to {path}: {problem}") from None
