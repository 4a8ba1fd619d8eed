"""Scaling curves: the numbers as CSV, a picture, and a page to look around in."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Literal

from delethink.errors import ConfigError, MissingExtraError
from delethink.evaluation.metrics import Estimate
from delethink.evaluation.results import Row

Kind = Literal["avg", "pass", "maj"]

AXES = {
    "thinking_tokens": "thinking tokens of a problem",
    "flops": "FLOPs of a problem, estimated",
    "seconds": "seconds of all problems on the device, estimated",
}
NUMBERS = {"avg": "accuracy, longer thinking", "pass": "pass@k", "maj": "maj@k"}


@dataclass(frozen=True)
class Point:
    """A point of a curve; what it costs is that of all ``k`` samples of a problem."""

    setting: str
    kind: Kind  # avg: sequential scaling, over budgets; pass and maj: parallel, at the largest one
    budget: int
    k: int
    accuracy: float
    low: float
    high: float
    thinking_tokens: float
    flops: float | None
    seconds: float | None


def points(rows: Sequence[Row]) -> list[Point]:
    """Every point of every curve."""
    largest = {row.setting: row for row in rows}  # rows come with rising budgets
    sequential = [_point(row, "avg", 1, row.avg) for row in rows]
    parallel = [
        _point(row, kind, k, one)
        for row in largest.values()
        for kind, at in (("pass", row.pass_at), ("maj", row.maj_at))
        for k, one in at.items()
    ]
    return sequential + parallel


def _point(row: Row, kind: str, k: int, one: Estimate) -> Point:
    return Point(
        setting=row.setting,
        kind=kind,  # type: ignore[arg-type]
        budget=row.budget,
        k=k,
        accuracy=one.value,
        low=one.interval.low,
        high=one.interval.high,
        thinking_tokens=k * row.thinking_tokens.value,
        flops=None if row.flops is None else k * row.flops,
        # of one sample of each problem, so that curves of different sample counts compare
        seconds=None if row.seconds is None else k * row.seconds * row.problems / row.samples,
    )


def as_csv(curve: Sequence[Point]) -> str:
    """One line a point."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(Point)]
    writer.writerow(names)
    for point in curve:
        writer.writerow(["" if (v := getattr(point, n)) is None else v for n in names])
    return text.getvalue()


def plot(curve: Sequence[Point], title: str, path: Path) -> None:
    """Draws all settings in one picture: rows are ways to scale, columns what it costs.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: the picture cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "eval")
    from matplotlib.figure import Figure

    axes_shown = [axis for axis in AXES if any(getattr(p, axis) is not None for p in curve)]
    settings = list(dict.fromkeys(point.setting for point in curve))
    figure = Figure(figsize=(4.6 * len(axes_shown), 10.5), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(NUMBERS), len(axes_shown), squeeze=False, sharey="row")
    for row, (kind, name) in zip(panels, NUMBERS.items(), strict=True):
        for axes, axis in zip(row, axes_shown, strict=True):
            for i, setting in enumerate(settings):
                _draw(axes, list(_line(curve, setting, kind, axis)), setting, f"C{i}")
            axes.set_xscale("log")
            axes.set_xlabel(AXES[axis])
            axes.grid(alpha=0.3)
        row[0].set_ylabel(name)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(settings)))
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as problem:
        raise ConfigError(f"cannot write the picture to {path}: {problem}") from None


def _line(
    curve: Sequence[Point], setting: str, kind: str, axis: str
) -> Iterator[tuple[float, Point]]:
    for point in curve:
        x = getattr(point, axis)
        if point.setting == setting and point.kind == kind and x:
            yield x, point


def _draw(axes: object, line: list[tuple[float, Point]], label: str, colour: str) -> None:
    if not line:
        return
    xs, ys = [x for x, _ in line], [point.accuracy for _, point in line]
    below = [max(0.0, point.accuracy - point.low) for _, point in line]
    above = [max(0.0, point.high - point.accuracy) for _, point in line]
    axes.errorbar(  # type: ignore[attr-defined]
        xs, ys, yerr=(below, above), marker=".", capsize=2, label=label, color=colour
    )


def as_html(curve: Sequence[Point], title: str) -> str:
    """A page on its own, without a network: choose the axis and the curves, point for numbers."""
    page = files("delethink").joinpath("assets/scaling.html").read_text(encoding="utf-8")
    data = {
        "axes": AXES,
        "kinds": NUMBERS,
        "points": [{f.name: getattr(p, f.name) for f in fields(Point)} for p in curve],
    }
    # A name of a model must not end the script that it stands in.
    text = json.dumps(data).replace("<", "\\u003c")
    return page.replace("{{title}}", escape(title)).replace("{{data}}", text)
