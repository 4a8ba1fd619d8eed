"""Scaling curves: the numbers as CSV, a picture, and a page to look around in."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from delethink.errors import ConfigError, MissingExtraError
from delethink.evaluation.metrics import Estimate, proportion_interval
from delethink.evaluation.records import Record
from delethink.evaluation.results import Results, Row
from delethink.evaluation.settings import Setting

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
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the picture to {path}: {error}") from None


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


_PLAIN_LINES = 10  # of a setting, where there is no terminal
_REFRESH_S = 0.25  # of the live line
_PLAIN_WIDTH = 120  # columns, there


class Reporter:
    """Prints the course of an evaluation to ``console``."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = _PLAIN_WIDTH
        self._live: Progress | None = None
        self._bar: Any = None

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, soft_wrap=True, markup=False)

    def begin(self, setting: Setting, total: int, known: Sequence[Record]) -> None:
        """A setting begins."""
        self._total, self._done, self._failed = total, 0, 0
        self._right: dict[int, tuple[float, int]] = {}  # by problem: right ones, and how many
        self._shown = 0.0
        self._started, self._tokens, self._new = time.monotonic(), 0, 0
        for record in known:
            self._count(record)
        have = f", {self._done} of them done before" if self._done else ""
        self.say(f"{setting.key}: {total} traces of up to {setting.spec.budget} tokens{have}")
        if self.console.is_terminal:
            self._live = Progress(
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar = self._live.add_task("", total=total, completed=self._done, text="")
            self._live.start()

    def add(self, record: Record) -> None:
        """A trace has ended."""
        self._count(record)
        self._new += 1
        self._tokens += record.outcomes[-1].length if record.outcomes else 0
        if self._live is not None:
            if time.monotonic() - self._shown > _REFRESH_S or self._done == self._total:
                self._shown = time.monotonic()
                self._live.update(self._bar, completed=self._done, text=self._text())
        elif self._done * _PLAIN_LINES % self._total < _PLAIN_LINES:
            self.say(f"  {self._done}/{self._total}  {self._text()}{self._remaining()}")

    def end(self) -> None:
        """The setting has ended, however."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def table(self, results: Results) -> None:
        """Every setting at every budget, comparisons, and what failed."""
        for setting in dict.fromkeys(row.setting for row in results.rows):
            rows = [row for row in results.rows if row.setting == setting]
            self.console.print(_rows_table(setting, rows))
        if results.comparisons:
            self.console.print(_comparison_table(results))
        for setting, reasons in results.errors.items():
            for reason, times in reasons.items():
                self.say(f"{setting}: {times} traces failed and are not counted: {reason}")
        for setting, timing in results.timing.items():
            self.say(
                f"{setting}: {timing['seconds']:.0f} s, {timing['tokens_per_second']:.0f} thinking "
                f"tokens/s, {timing['processed_tokens']:,.0f} tokens processed"
            )

    def _count(self, record: Record) -> None:
        self._done += 1
        if record.error is not None:
            self._failed += 1
            return
        right, number = self._right.get(record.place.problem, (0.0, 0))
        score = record.outcomes[-1].score
        self._right[record.place.problem] = (right + score, number + 1)

    def _text(self) -> str:
        rate = self._tokens / max(1e-9, time.monotonic() - self._started)
        failed = f"  {self._failed} failed" if self._failed else ""
        if not self._right:
            return f"no score yet{failed}"
        means = np.array([right / number for right, number in self._right.values()])
        samples = (self._done - self._failed) / len(means)
        accuracy = Estimate(float(means.mean()), proportion_interval(means, samples))
        return f"accuracy {_share(accuracy)}  {rate:.0f} tokens/s{failed}"

    def _remaining(self) -> str:
        each = (time.monotonic() - self._started) / max(1, self._new)
        return f"  {each * (self._total - self._done):.0f} s left"


def _rows_table(setting: str, rows: Sequence[Row]) -> Table:
    n = max(rows[0].pass_at)
    problems = f"{rows[0].problems} problems, {rows[0].samples} traces"
    table = Table(title=f"{setting}: {problems}, 95 % intervals over problems", box=SIMPLE_HEAD)
    heads = ["budget", "accuracy", f"pass@{n}", f"maj@{n}", "out of\nbudget", "thinking\ntokens"]
    heads += ["chunks", "tokens\nprocessed", "failed\ntraces"]
    heads += [f"avg@{b.k} by\nbootstrap"] if (b := rows[0].bootstrap) else []
    for name in heads:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*_cells(row, n))
    return table


def _cells(row: Row, n: int) -> list[str]:
    cells = [
        f"{row.budget:,}",
        _share(row.avg),
        f"{row.pass_at[n].value:.3f}",
        f"{row.maj_at[n].value:.3f}",
        f"{row.out_of_budget:.1%}",
        f"{row.thinking_tokens.value:,.0f}",
        f"{row.chunks:.1f}",
        f"{row.processed_tokens:,.0f}",
        str(row.errors),
    ]
    return cells + ([f"{b.mean:.4f} ± {b.sd:.4f}"] if (b := row.bootstrap) else [])


def _comparison_table(results: Results) -> Table:
    table = Table(title="second minus first, on the same problems", box=SIMPLE_HEAD)
    for name in ("first", "second"):
        table.add_column(name, overflow="fold")
    for name in ("budget", "difference", "p", "verdict"):
        table.add_column(name, justify="right")
    for one in results.comparisons:
        found, pair = one.difference, (one.first_budget, one.second_budget)
        table.add_row(
            one.first,
            one.second,
            f"{pair[0]:,}" if pair[0] == pair[1] else f"{pair[0]:,} / {pair[1]:,}",
            f"{found.value:+.3f} ({found.interval.low:+.3f} to {found.interval.high:+.3f})",
            f"{found.p_value:.3f}",
            found.verdict,
        )
    return table


def _share(one: Estimate) -> str:
    return f"{one.value:.3f} ({one.interval.low:.3f}-{one.interval.high:.3f})"
