"""The curves of a run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
