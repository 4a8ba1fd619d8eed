"""Output of a run: a progress bar on a terminal, plain lines elsewhere, and curves as a PNG."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

from delethink.chunking import ChunkSpec
from delethink.evaluation.heldout import HeldOutResult
from delethink.output import Waiting, open_console, safe_text
from delethink.training.metrics import METRICS, find_metric
from delethink.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from rich.console import Console

_STEPS_PER_LINE = 5
_PLAIN_INTERVAL_S = 10.0  # between lines of an evaluation without a terminal
_SHORT_RUN_STEPS = 20  # up to here, every step has its line
_CURVES = (
    "reward",
    "heldout_accuracy",
    "thinking_tokens",
    "entropy",
    "logprob_difference",
    "tokens_per_second",
)


class TrainingProgress:
    """Print the progress of a run to ``console`` (standard output by default)."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or open_console()
        self._waiting: Waiting | None = None
        self._live: Progress | None = None
        self._bar: Any = None

    def log(self, text: str) -> None:
        """Print a line."""
        self.console.print(safe_text(text, lines=False), soft_wrap=True)

    def wait(self, text: str) -> None:
        """Show what the run waits for, and for how long, until something else is shown."""
        if self._waiting is None:
            self._waiting = Waiting(self.console, text)
        else:
            self._waiting.change(text)

    def end_wait(self) -> None:
        """Stop showing what the run waits for."""
        if self._waiting is not None:
            self._waiting.stop()
            self._waiting = None

    def start_steps(self, total: int, done: int = 0) -> None:
        """Show the progress bar of the optimizer steps."""
        self.end_wait()
        if not self.console.is_terminal:
            return
        self._live = self._start_bars()
        self._bar = self._live.add_task("training", total=total, completed=done, text="")

    def _start_bars(self) -> Progress:
        bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            TimeElapsedColumn(),  # moves each second, also in a step of minutes
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        bars.start()
        return bars

    @contextmanager
    def evaluating(self, setting: str, total: int) -> Iterator[Callable[[], None]]:
        """Show the progress of an evaluation; the function it gives counts a finished trace."""
        self.end_wait()
        if not self.console.is_terminal:
            yield _PlainCount(self.log, setting, total)
            return
        bars = self._live or self._start_bars()
        bar = bars.add_task(f"evaluating {setting}", total=total, text="")
        try:
            yield lambda: bars.advance(bar)
        finally:
            bars.remove_task(bar)
            if self._live is None:
                bars.stop()

    def step(self, metrics: Mapping[str, Any], total: int) -> None:
        """Show the metrics of an optimizer step."""
        text = step_line(metrics) if "reward" in metrics else "same traces again"
        step, accuracy = metrics["step"], metrics.get("heldout_accuracy")
        if self._live is not None:
            self._live.update(self._bar, advance=1, text=safe_text(text))
        elif (
            total <= _SHORT_RUN_STEPS
            or step % _STEPS_PER_LINE == 0
            or accuracy is not None
            or step in (1, total)
        ):
            self.log(f"step {step:4d}/{total}  {text}")
        if accuracy is not None:
            self.log(f"step {step:4d}/{total}  held-out accuracy {accuracy:.3f}")

    def stop_steps(self) -> None:
        """Remove the progress bar."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def finished(self, directory: RunDirectory, spec: ChunkSpec) -> None:
        """Print the results of a finished run."""
        self.log(f"the run is finished, after {directory.finished_step} steps")
        rows = [HeldOutResult.from_dict(row) for row in directory.read_table()]
        self.table(rows, spec, directory.path)

    def table(self, rows: Sequence[HeldOutResult], spec: ChunkSpec, path: Path) -> None:
        """Print the table of results and the run directory."""
        if not rows:  # trained without evaluation
            self.log(f"run directory: {path}")
            return
        sizes = f"C={spec.context_size} m={spec.carryover_size} budget {spec.budget}"
        title = f"{rows[0].num_problems} held-out problems, {sizes}, 95 % intervals"
        table = Table(title=title, box=SIMPLE_HEAD)
        table.add_column("setting")
        for name in ("accuracy", "thinking\ntokens", "chunks", "out of\nbudget"):
            table.add_column(name, justify="right")
        for row in rows:
            shortest, longest = row.thinking_tokens_interval
            table.add_row(
                row.setting,
                row.accuracy_text("-"),
                f"{row.thinking_tokens:.0f} ({shortest:.0f}-{longest:.0f})",
                f"{row.chunks:.1f}",
                f"{row.budget_share:.1%}",
            )
        self.console.print(table)
        self.log(f"run directory: {path}")


class _PlainCount:
    """Count finished traces in a line now and then, where there is no terminal."""

    def __init__(self, log: Callable[[str], None], setting: str, total: int) -> None:
        self._log, self._setting, self._total = log, setting, total
        self._done, self._started = 0, time.monotonic()
        self._shown = self._started

    def __call__(self) -> None:
        """Count a trace."""
        self._done, now = self._done + 1, time.monotonic()
        if now - self._shown < _PLAIN_INTERVAL_S or self._done == self._total:
            return
        self._shown = now
        left = (now - self._started) / self._done * (self._total - self._done)
        self._log(
            f"evaluating {self._setting}: {self._done}/{self._total}, about {left:.0f} s left "
            "(evaluation.num_problems=0 trains without)"
        )


def step_line(metrics: Mapping[str, Any]) -> str:
    """Return the line of a step: the metrics with a ``step_line`` format, in the table's order."""
    shown = [(metric, metrics.get(metric.key)) for metric in METRICS if metric.step_line]
    return "  ".join(f"{m.key} none" if v is None else m.step_line.format(v) for m, v in shown)


def plot_metrics(metrics: list[dict[str, Any]], title: str, path: Path) -> None:
    """Plot metrics over steps to a PNG; a metric without values has empty axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(safe_text(title, lines=False))
    for axes, key in zip(figure.subplots(2, 3).flat, _CURVES, strict=True):
        found = [(line["step"], line.get(key)) for line in metrics]
        points = [(step, value) for step, value in found if isinstance(value, (int, float))]
        metric = find_metric(key)
        axes.set_title(f"{key} ({metric.unit})" if metric else key, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if points:
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
    figure.savefig(path, dpi=120)
