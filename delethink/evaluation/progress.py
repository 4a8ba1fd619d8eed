"""What a person sees of an evaluation: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from delethink.evaluation.metrics import Estimate, proportion_interval
from delethink.evaluation.plan import Setting
from delethink.evaluation.records import Record
from delethink.evaluation.results import Results, Row

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
