"""Reports of an evaluation: progress and tables in the terminal, and scaling curves on disk."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from delethink.errors import ConfigError, MissingExtraError, RunDirectoryError
from delethink.evaluation.metrics import Estimate, proportion_interval
from delethink.evaluation.records import Record
from delethink.evaluation.results import ResultRow, Results
from delethink.evaluation.settings import Setting

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

_PLAIN_LINES = 10  # lines per setting without a terminal
_PLAIN_WIDTH = 120  # columns without a terminal
_REFRESH_INTERVAL_S = 0.25  # between updates of the progress bar


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
        setting=row.setting,
        kind=kind,
        budget=row.budget,
        k=k,
        accuracy=value.value,
        low=value.interval.low,
        high=value.interval.high,
        thinking_tokens=k * row.thinking_tokens.value,
        flops=None if row.flops is None else k * row.flops,
        # Per sample of each problem, to compare curves with different numbers of samples.
        seconds=None if row.seconds is None else k * row.seconds * row.problems / row.samples,
    )


def write_curves(rows: Sequence[ResultRow], task: str, folder: Path) -> None:
    """Write ``curves.csv``, ``curves.html`` and ``curves.png``.

    Raises:
        MissingExtraError: matplotlib is not installed.
        RunDirectoryError: a file cannot be written.
    """
    points, title = curve_points(rows), f"test-time scaling on {Path(task).name}"
    try:
        (folder / "curves.csv").write_text(curves_csv(points), encoding="utf-8")
        (folder / "curves.html").write_text(curves_html(points, title), encoding="utf-8")
    except OSError as error:
        raise RunDirectoryError(f"cannot write the curves to {folder}: {error.strerror}") from None
    plot_scaling(points, title, folder / "curves.png")


def curves_csv(points: Sequence[CurvePoint]) -> str:
    """Return a CSV table with one line per point."""
    text = io.StringIO()
    names = [field.name for field in fields(CurvePoint)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    return text.getvalue()


def curves_html(points: Sequence[CurvePoint], title: str) -> str:
    """Return a self-contained page with selectable axes and curves."""
    page = files("delethink").joinpath("assets/scaling.html").read_text(encoding="utf-8")
    data = {"axes": AXES, "kinds": KINDS, "points": [asdict(point) for point in points]}
    # A model name must not close the script element.
    text = json.dumps(data).replace("<", "\\u003c")
    return page.replace("{{title}}", escape(title)).replace("{{data}}", text)


def plot_scaling(points: Sequence[CurvePoint], title: str, path: Path) -> None:
    """Plot all settings: one row per kind of scaling, one column per axis.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: the image cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "eval")
    from matplotlib.figure import Figure

    axes_shown = [axis for axis in AXES if any(getattr(p, axis) is not None for p in points)]
    settings = list(dict.fromkeys(point.setting for point in points))
    figure = Figure(figsize=(4.6 * len(axes_shown), 10.5), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(KINDS), len(axes_shown), squeeze=False, sharey="row")
    for row, (kind, name) in zip(panels, KINDS.items(), strict=True):
        for axes, axis in zip(row, axes_shown, strict=True):
            for i, setting in enumerate(settings):
                own = [p for p in points if p.setting == setting and p.kind == kind]
                _draw(axes, [p for p in own if getattr(p, axis)], axis, setting, f"C{i}")
            axes.set_xscale("log")
            axes.set_xlabel(AXES[axis])
            axes.grid(alpha=0.3)
        row[0].set_ylabel(name)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(settings)))
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the image {path}: {error}") from None


def _draw(axes: Any, line: Sequence[CurvePoint], axis: str, label: str, colour: str) -> None:
    if not line:
        return
    below = [max(0.0, point.accuracy - point.low) for point in line]
    above = [max(0.0, point.high - point.accuracy) for point in line]
    axes.errorbar(
        [getattr(point, axis) for point in line],
        [point.accuracy for point in line],
        yerr=(below, above),
        marker=".",
        capsize=2,
        label=label,
        color=colour,
    )


class EvaluationProgress:
    """Evaluation callback that prints to ``console``: a progress bar, or plain lines."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = _PLAIN_WIDTH
        self._live: Progress | None = None
        self._bar: Any = None

    def print(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, soft_wrap=True, markup=False)

    def on_setting_begin(self, setting: Setting, total: int, known: Sequence[Record]) -> None:
        """Print the setting and start a progress bar."""
        self._total, self._done, self._failed = total, 0, 0
        self._right: dict[int, tuple[float, int]] = {}  # problem -> (right samples, samples)
        self._shown = 0.0
        self._started, self._tokens, self._new = time.monotonic(), 0, 0
        for record in known:
            self._count(record)
        resumed = f", {self._done} of them from an earlier run" if self._done else ""
        self.print(f"{setting.key}: {total} traces of up to {setting.spec.budget} tokens{resumed}")
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

    def on_trace_end(self, record: Record) -> None:
        """Update the progress bar, or print a line now and then."""
        self._count(record)
        self._new += 1
        self._tokens += record.outcomes[-1].length if record.outcomes else 0
        if self._live is not None:
            if time.monotonic() - self._shown > _REFRESH_INTERVAL_S or self._done == self._total:
                self._shown = time.monotonic()
                self._live.update(self._bar, completed=self._done, text=self._text())
        elif self._done * _PLAIN_LINES % self._total < _PLAIN_LINES:
            each = (time.monotonic() - self._started) / self._new
            left = f"{each * (self._total - self._done):.0f} s left"
            self.print(f"  {self._done}/{self._total}  {self._text()}  {left}")

    def on_setting_end(self) -> None:
        """Stop the progress bar."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def table(self, results: Results) -> None:
        """Print accuracies, comparisons, failures and times."""
        for setting in dict.fromkeys(row.setting for row in results.rows):
            rows = [row for row in results.rows if row.setting == setting]
            self.console.print(_rows_table(setting, rows))
        if results.comparisons:
            self.console.print(_comparison_table(results))
        for setting, reasons in results.errors.items():
            for reason, times in reasons.items():
                self.print(f"{setting}: {times} traces failed and are not counted: {reason}")
        for setting, timing in results.timing.items():
            self.print(
                f"{setting}: {timing['seconds']:.0f} s, {timing['tokens_per_second']:.0f} thinking "
                f"tokens/s, {timing['processed_tokens']:,.0f} tokens processed"
            )

    def _count(self, record: Record) -> None:
        self._done += 1
        if record.error is not None:
            self._failed += 1
            return
        right, number = self._right.get(record.key.problem, (0.0, 0))
        score = record.outcomes[-1].score
        self._right[record.key.problem] = (right + score, number + 1)

    def _text(self) -> str:
        rate = self._tokens / max(1e-9, time.monotonic() - self._started)
        failed = f"  {self._failed} failed" if self._failed else ""
        if not self._right:
            return f"no score yet{failed}"
        means = np.array([right / number for right, number in self._right.values()])
        samples = (self._done - self._failed) / len(means)
        accuracy = Estimate(float(means.mean()), proportion_interval(means, samples))
        return f"accuracy {_share(accuracy)}  {rate:.0f} tokens/s{failed}"


def _rows_table(setting: str, rows: Sequence[ResultRow]) -> Table:
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


def _cells(row: ResultRow, n: int) -> list[str]:
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
    for comparison in results.comparisons:
        difference, low_high = comparison.difference, comparison.difference.interval
        pair = (comparison.first_budget, comparison.second_budget)
        table.add_row(
            comparison.first,
            comparison.second,
            f"{pair[0]:,}" if pair[0] == pair[1] else f"{pair[0]:,} / {pair[1]:,}",
            f"{difference.value:+.3f} ({low_high.low:+.3f} to {low_high.high:+.3f})",
            f"{difference.p_value:.3f}",
            difference.verdict,
        )
    return table


def _share(number: Estimate) -> str:
    return f"{number.value:.3f} ({number.interval.low:.3f}-{number.interval.high:.3f})"
