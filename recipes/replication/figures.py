"""Figures of the study, from its results alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cells import METHODS, Cell
from claims import (
    Results,
    Scores,
    cost_values,
    families_of,
    names_of,
    scores_of,
    training_budget,
)
from learning import learning_curves
from matplotlib.axes import Axes
from matplotlib.figure import Figure

NAMES = {"delethink": "Delethink-RL", "longcot": "LongCoT-RL", "longcot-short": "LongCoT-RL, C"}
PANEL_INCHES = (4.2, 3.1)
Drawing = Callable[[Mapping[str, Cell], Results], Figure | None]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, the same bytes for the same results.

    Raises:
        OSError: the file cannot be written.
    """
    with matplotlib.rc_context({"svg.hashsalt": "replication", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")


def make_panels(rows: int, columns: int) -> tuple[Figure, Any]:
    """Return a figure and its panels [rows, columns]."""
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def beyond_figure(cells: Mapping[str, Cell], results: Results) -> Figure | None:
    """Return accuracy against budget beyond that of training; ``None`` without results.

    Each family has a panel with a line for each trained model, and a thin one for each seed.
    LongCoT-RL of budget C is not evaluated beyond the training budget.
    """
    families = families_of(cells)
    figure, (panels,) = make_panels(1, len(families))
    is_drawn = False
    for axes, family in zip(panels, families, strict=True):
        axes.set(title=family, xlabel="budget / training budget", ylabel="accuracy", xscale="log")
        for i, method in enumerate(("delethink", "longcot")):
            found = _by_budget(cells, results, f"{family}-beyond-{method}", method)
            if found is None:
                continue
            is_drawn, (budgets, by_seed) = True, found
            x = budgets / training_budget(cells[f"{family}-probe"])
            axes.plot(x, by_seed.mean(1), marker=".", color=f"C{i}", label=NAMES[method])
            axes.plot(x, by_seed, color=f"C{i}", alpha=0.3, linewidth=0.8)
        _finish(axes)
    return figure if is_drawn else None


def _by_budget(
    cells: Mapping[str, Cell], results: Results, stem: str, way: str
) -> tuple[Scores, Scores] | None:
    """Return budgets in tokens, and accuracies [budgets, seeds]."""
    names = names_of(cells, stem)
    if not names or not all(name in results for name in names):
        return None
    budgets = sorted(map(int, results[names[0]]["values"]["ways"][way]["scores"]))
    found = [scores_of(cells, results, stem, way, budget) for budget in budgets]
    means = [scores.mean((1, 2)) for scores in found if scores is not None]
    return np.array(budgets, float), np.array(means)


def learning_figure(cells: Mapping[str, Cell], results: Results) -> Figure | None:
    """Return reward against steps, tokens, FLOPs and seconds; ``None`` without a training."""
    families, axes_of = families_of(cells), ("steps", "tokens", "flops", "seconds")
    figure, panels = make_panels(len(families), len(axes_of))
    is_drawn = False
    for row, family in zip(panels, families, strict=True):
        for axes, key in zip(row, axes_of, strict=True):
            label = {"flops": "FLOPs, cost model", "seconds": "seconds of one core"}.get(key, key)
            axes.set(title=family, xlabel=label, ylabel="reward, mean of a step")
            for i, method in enumerate(METHODS):
                names = [n for n in names_of(cells, f"{family}-train-{method}") if n in results]
                for number, name in enumerate(names):
                    curves = learning_curves(cells, results, name)
                    if np.isnan(curves[key]).all():
                        continue
                    is_drawn, named = True, NAMES[method] if number == 0 else None
                    axes.plot(curves[key], curves["reward"], color=f"C{i}", alpha=0.6, label=named)
            _finish(axes)
    return figure if is_drawn else None


def cost_figure(cells: Mapping[str, Cell], results: Results) -> Figure | None:
    """Return seconds, FLOPs and memory against length; ``None`` without a cost cell."""
    costs = {str(c.settings["family"]): c for n, c in cells.items() if c.kind == "cost"}
    families = [family for family, cell in costs.items() if cell.name in results]
    if not families:
        return None
    labels = {"seconds": "seconds", "flops": "FLOPs of a trace", "peak_bytes": "peak, MiB"}
    works = [(family, phase) for family in families for phase in ("sampling", "training")]
    figure, panels = make_panels(len(works), len(labels))
    for row, (family, phase) in zip(panels, works, strict=True):
        x = costs[family].settings["cost"]["multiples"]
        for axes, (key, label) in zip(row, labels.items(), strict=True):
            axes.set(title=f"{family}, {phase}", xlabel="thinking / C", ylabel=label)
            axes.set(xscale="log", yscale="log")
            for i, method in enumerate(("delethink", "longcot")):
                values = cost_values(results, family, method, phase, key).mean(1)
                scale = 2**20 if key == "peak_bytes" else 1
                name = NAMES[method].removesuffix("-RL")
                axes.plot(x, values / scale, marker=".", color=f"C{i}", label=name)
            _finish(axes)
    return figure


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
    else:
        axes.text(0.5, 0.5, "not run yet", ha="center", transform=axes.transAxes)


FIGURES: dict[str, tuple[Drawing, str]] = {
    "beyond": (beyond_figure, "Accuracy against the budget, up to ten times that of training"),
    "learning": (learning_figure, "Reward against steps, tokens, FLOPs and seconds"),
    "cost": (cost_figure, "Seconds, FLOPs and peak memory against thinking length"),
}
