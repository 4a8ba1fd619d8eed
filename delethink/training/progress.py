"""What a person sees of a run: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from delethink.chunking import ChunkSpec
from delethink.evaluation.heldout import HeldOutResult
from delethink.training.run_directory import RunDirectory


class Reporter:
    """Prints the course of a run to ``console`` (standard output by default)."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._live: Progress | None = None
        self._bar: Any = None

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, soft_wrap=True, markup=False)

    def start_steps(self, total: int, done: int = 0) -> None:
        """The optimizer steps begin, after those that are done."""
        if not self.console.is_terminal:
            return
        self._live = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._bar = self._live.add_task("training", total=total, completed=done, text="")
        self._live.start()

    def step(self, metrics: dict[str, Any], total: int) -> None:
        """An optimizer step is done."""
        text = _of_batch(metrics) if "reward" in metrics else "once more on the same traces"
        accuracy = metrics.get("heldout_accuracy")
        if self._live is not None:
            self._live.update(self._bar, advance=1, text=text)
        elif metrics["step"] % 5 == 0 or accuracy is not None or metrics["step"] in (1, total):
            self.say(f"step {metrics['step']:4d}/{total}  {text}")
        if accuracy is not None:
            self.say(f"step {metrics['step']:4d}/{total}  held-out accuracy {accuracy:.3f}")

    def stop_steps(self) -> None:
        """The optimizer steps have ended, however."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def summary(self, row: HeldOutResult) -> None:
        """A row of the table is measured."""
        low, high = row.accuracy_interval
        self.say(f"{row.setting}: accuracy {row.accuracy:.3f} ({low:.3f} to {high:.3f})")

    def finished(self, run: RunDirectory, spec: ChunkSpec) -> None:
        """There is nothing to do: what the run has come to."""
        self.say(f"the run is finished, after {run.finished_step} steps")
        self.table([HeldOutResult.from_dict(row) for row in run.read_table()], spec, run.path)

    def table(self, rows: Sequence[HeldOutResult], spec: ChunkSpec, path: Path) -> None:
        """All rows, and where the run is."""
        sizes = f"C={spec.context_size} m={spec.carryover_size} budget {spec.budget}"
        title = f"{rows[0].num_problems} held-out problems, {sizes}, 95 % intervals"
        table = Table(title=title, box=SIMPLE_HEAD)
        table.add_column("setting")
        for name in ("accuracy", "thinking\ntokens", "chunks", "out of\nbudget"):
            table.add_column(name, justify="right")
        for row in rows:
            low, high = row.accuracy_interval
            less, more = row.thinking_tokens_interval
            table.add_row(
                row.setting,
                f"{row.accuracy:.3f} ({low:.3f}-{high:.3f})",
                f"{row.thinking_tokens:.0f} ({less:.0f}-{more:.0f})",
                f"{row.chunks:.1f}",
                f"{row.budget_share:.1%}",
            )
        self.console.print(table)
        self.say(f"run directory: {path}")


def _of_batch(metrics: dict[str, Any]) -> str:
    reward = "none" if metrics["reward"] is None else f"{metrics['reward']:.2f}"
    return (
        f"reward {reward}  tokens {metrics['thinking_tokens']:.0f}  "
        f"chunks {metrics['chunks']:.1f}  {metrics['tokens_per_second']:.0f} tokens/s  "
        f"padding {metrics['padding']:.1%}"
    )


_PANELS = (
    ("reward", "training reward"),
    ("heldout_accuracy", "held-out accuracy"),
    ("thinking_tokens", "thinking tokens a trace"),
    ("entropy", "entropy of a token (nats)"),
    ("logprob_difference", "|log-prob of engine - of trainer|"),
    ("tokens_per_second", "sampled tokens a second"),
)


def plot_curves(metrics: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draws the metrics over steps to a PNG; a metric that was never measured stays empty."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(title)
    for axes, (key, label) in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
        points = [(m["step"], m[key]) for m in metrics if m.get(key) is not None]
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if points:
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
    figure.savefig(path, dpi=120)
