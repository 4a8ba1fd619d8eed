"""Reports of an evaluation: progress and tables in the terminal, and scaling curves on disk."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from delethink.errors import ConfigError, RunDirectoryError
from delethink.evaluation.curves import AXES, KINDS, CurvePoint, curve_points
from delethink.evaluation.metrics import Estimate, avg_at_n
from delethink.evaluation.page import evaluation_report, try_report
from delethink.evaluation.records import Record
from delethink.evaluation.results import ResultRow, Results
from delethink.evaluation.settings import Setting
from delethink.output import open_console, safe_text

_PLAIN_LINES = 10  # lines per setting without a terminal
_PLAIN_WIDTH = 120  # columns without a terminal
_REFRESH_INTERVAL_S = 0.25  # between updates of the progress bar


def write_curves(results: Results, settings: Mapping[str, Any], folder: Path) -> None:
    """Write ``report.html``, ``curves.csv`` and ``curves.png``.

    ``settings`` are those of ``settings.json``.

    Raises:
        RunDirectoryError: a file cannot be written.
        ConfigError: the image cannot be written.
    """
    points = curve_points(results.rows)
    title = safe_text(f"test-time scaling on {Path(str(settings['task'])).name}", lines=False)
    try:
        with (folder / "curves.csv").open("w", encoding="utf-8") as file:
            names = [field.name for field in fields(CurvePoint)]
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(point) for point in points)
    except OSError as error:
        raise RunDirectoryError(f"cannot write the curves to {folder}: {error.strerror}") from None
    try_report(evaluation_report(results, points, AXES, KINDS, settings, folder), folder)
    plot_scaling(points, title, folder / "curves.png")


def plot_scaling(points: Sequence[CurvePoint], title: str, path: Path) -> None:
    """Plot all settings: one row per kind of scaling, one column per axis.

    Raises:
        ConfigError: the image cannot be written.
    """
    from matplotlib.figure import Figure

    axes_shown = [axis for axis in AXES if any(getattr(p, axis) is not None for p in points)]
    settings = list(dict.fromkeys(point.setting for point in points))
    figure = Figure(figsize=(4.6 * len(axes_shown), 10.5), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(KINDS), len(axes_shown), squeeze=False, sharey="row")
    for row, (kind, name) in zip(panels, KINDS.items(), strict=True):
        for axes, axis in zip(row, axes_shown, strict=True):
            for i, setting in enumerate(settings):
                own = [p for p in points if (p.setting, p.kind) == (setting, kind)]
                line = [p for p in own if getattr(p, axis)]
                axes.errorbar(
                    [getattr(p, axis) for p in line],
                    [p.accuracy for p in line],
                    yerr=(
                        [max(0.0, p.accuracy - p.low) for p in line],
                        [max(0.0, p.high - p.accuracy) for p in line],
                    ),
                    marker=".",
                    capsize=2,
                    label=setting,
                    color=f"C{i}",
                )
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


class EvaluationProgress:
    """Progress of an evaluation: a bar in a terminal, otherwise plain lines."""

    def __init__(self, stderr: bool = False) -> None:
        self.console = open_console(stderr=stderr)
        if not self.console.is_terminal:
            self.console.width = _PLAIN_WIDTH
        self._live: Progress | None = None
        self._bar: Any = None

    def print(self, text: str) -> None:
        """Print one line."""
        self.console.print(safe_text(text, lines=False), soft_wrap=True)

    def on_setting_begin(self, setting: Setting, total: int, known: Sequence[Record]) -> None:
        """Print the setting and start a progress bar."""
        self._total, self._done, self._failed = total, 0, 0
        self._scores: dict[int, list[float]] = {}  # by problem
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
                TextColumn("{task.fields[text]}", markup=False),
                TimeElapsedColumn(),  # moves before the first trace ends
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
                self._live.update(self._bar, completed=self._done, text=safe_text(self._text()))
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
        else:
            self._scores.setdefault(record.key.problem, []).append(record.outcomes[-1].score)

    def _text(self) -> str:
        rate = self._tokens / max(1e-9, time.monotonic() - self._started)
        failed = f"  {self._failed} failed" if self._failed else ""
        if not self._scores:
            return f"no score yet{failed}"
        accuracy = avg_at_n(list(self._scores.values()))
        return f"accuracy {_share(accuracy)}  {rate:.0f} tokens/s{failed}"


def _rows_table(setting: str, rows: Sequence[ResultRow]) -> Table:
    n = max(rows[0].pass_at)
    problems = f"{rows[0].problems} problems, {rows[0].samples} traces"
    table = Table(title=f"{setting}: {problems}, 95 % intervals over problems", box=SIMPLE_HEAD)
    for row in rows:
        cells = {
            "budget": f"{row.budget:,}",
            "accuracy": _share(row.avg),
            f"pass@{n}": f"{row.pass_at[n].value:.3f}",
            f"maj@{n}": f"{row.maj_at[n].value:.3f}",
            "out of\nbudget": f"{row.out_of_budget:.1%}",
            "thinking\ntokens": f"{row.thinking_tokens.value:,.0f}",
            "chunks": f"{row.chunks:.1f}",
            "tokens\nprocessed": f"{row.processed_tokens:,.0f}",
            "failed\ntraces": str(row.errors),
        }
        if b := row.bootstrap:
            cells[f"avg@{b.k} by\nbootstrap"] = f"{b.mean:.4f} ± {b.sd:.4f}"
        if not table.columns:
            for head in cells:
                table.add_column(head, justify="right")
        table.add_row(*cells.values())
    return table


def _comparison_table(results: Results) -> Table:
    table = Table(title="second minus first, on the same problems", box=SIMPLE_HEAD)
    for name in ("first", "second"):
        table.add_column(name, overflow="fold")
    for name in ("budget", "difference", "p", "verdict"):
        table.add_column(name, justify="right")
    for comparison in results.comparisons:
        difference, (low, high) = comparison.difference, comparison.difference.interval
        pair = (comparison.first_budget, comparison.second_budget)
        table.add_row(
            comparison.first,
            comparison.second,
            f"{pair[0]:,}" if pair[0] == pair[1] else f"{pair[0]:,} / {pair[1]:,}",
            f"{difference.value:+.3f} ({low:+.3f} to {high:+.3f})",
            f"{difference.p_value:.3f}",
            difference.verdict,
        )
    return table


def _share(number: Estimate) -> str:
    return f"{number.value:.3f} ({number.low:.3f}-{number.high:.3f})"
