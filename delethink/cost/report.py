"""The estimate as text: tables that line up, and a sentence in plain words."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from delethink.cost.compare import Choice, Crossings, Growth, Polynomial, crossings
from delethink.cost.estimate import Cost, Job, Lengths, estimate
from delethink.cost.flops import LONGCOT, Cut
from delethink.cost.hardware import Accelerator, Efficiency
from delethink.cost.shape import ModelShape
from delethink.errors import ConfigError, MissingExtraError


@dataclass(frozen=True)
class Comparison:
    """LongCoT and Delethink at one length of thinking.

    Args:
        longcot: its cost.
        delethink: its cost.
        longcot_hours: 5 % and 95 % quantiles of its GPU-hours.
        delethink_hours: likewise.
    """

    longcot: Cost
    delethink: Cost
    longcot_hours: tuple[float, float]
    delethink_hours: tuple[float, float]


@dataclass(frozen=True)
class Answer:
    """Everything that was asked, answered."""

    shape: ModelShape
    cut: Cut
    device: Accelerator
    efficiency: Efficiency
    job: Job
    price: float | None
    comparisons: Sequence[Comparison]
    crossings: Crossings
    longest_that_fits: float
    doubling: float  # LongCoT's FLOPs at twice the last length over those at it
    growth: dict[str, Sequence[Growth]] = field(default_factory=dict)
    polynomials: dict[str, Polynomial] = field(default_factory=dict)
    choices: Sequence[Choice] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for programs; what is not finite becomes ``None``."""
        return {
            "model": {
                "name": self.shape.name,
                "parameters": self.shape.parameters,
                "active_parameters": self.shape.active_parameters,
                "layers": len(self.shape.layers),
                "unbounded_layers": self.shape.unbounded_layers,
            },
            "context_size": _plain(self.cut.context_size),
            "carryover_size": _plain(self.cut.carryover_size),
            "device": self.device.__dict__,
            "efficiency": self.efficiency.__dict__,
            "job": self.job.__dict__,
            "thinking": [
                {
                    "longcot": {k: _plain(v) for k, v in one.longcot.as_dict().items()}
                    | {"gpu_hours_5_95": [_plain(h) for h in one.longcot_hours]},
                    "delethink": {k: _plain(v) for k, v in one.delethink.as_dict().items()}
                    | {"gpu_hours_5_95": [_plain(h) for h in one.delethink_hours]},
                }
                for one in self.comparisons
            ],
            "crossings": self.crossings._asdict(),
            "longest_longcot_that_fits": _plain(self.longest_that_fits),
            "longcot_flops_of_a_doubling": _plain(self.doubling),
            "growth": {name: [g._asdict() for g in rows] for name, rows in self.growth.items()},
            "training_flops_polynomial": {
                name: [float(c) for c in polynomial]
                for name, polynomial in self.polynomials.items()
            },
            "cheapest_cuts": [
                {
                    "context_size": choice.context_size,
                    "carryover_size": choice.carryover_size,
                    "gpu_hours": _plain(choice.cost.gpu_hours),
                }
                for choice in self.choices
            ],
            "in_words": in_words(self),
        }


def as_text(answer: Answer) -> str:
    """The whole answer for a person."""
    parts = [_heading(answer)]
    parts += [_comparison(answer, one) for one in answer.comparisons]
    parts.append(_crossings(answer))
    if answer.growth:
        parts.append(_growth(answer))
    if answer.choices:
        parts.append(_choices(answer))
    parts.append(in_words(answer))
    return "\n\n".join(parts)


def in_words(answer: Answer) -> str:
    """One sentence or two: is it worth it?"""
    last = answer.comparisons[-1]
    tokens = _tokens(float(last.longcot.thinking))
    ours = float(last.delethink.gpu_hours)
    if not math.isfinite(float(last.longcot.gpu_hours)):
        verdict = (
            f"Thinking for {tokens} tokens in one context does not fit on this hardware; with "
            f"Delethink it takes {_figure(ours)} GPU-hours."
        )
    else:
        theirs = float(last.longcot.gpu_hours)
        ratio = theirs / ours
        better = f"{ratio:.1f} times fewer" if ratio > 1 else f"{1 / ratio:.2f} times as many"
        than = "than" if ratio > 1 else "as"
        low, high = _ratios(last)
        unsure = ", but what is not known could turn that round" if low < 1 < high else ""
        verdict = (
            f"At {tokens} thinking tokens Delethink takes {better} GPU-hours {than} LongCoT: "
            f"{_figure(ours)} against {_figure(theirs)}{unsure}."
        )
    return f"{verdict} {_architecture(answer)}".strip()


def _ratios(one: Comparison) -> tuple[float, float]:
    """LongCoT / Delethink at its least and at its most, errors going against each other."""
    low = one.longcot_hours[0] / one.delethink_hours[1]
    return low, one.longcot_hours[1] / one.delethink_hours[0]


def _architecture(answer: Answer) -> str:
    """What the layers say about how LongCoT grows, where it is not simply quadratic."""
    shape = answer.shape
    bounded = len(shape.layers) - shape.unbounded_layers
    if not bounded:
        return ""
    if not shape.unbounded_layers:
        return (
            "Every layer of this model looks back a bounded distance or keeps a state of fixed "
            "size, so LongCoT is linear already: a reset saves no compute in the long run."
        )
    last = answer.comparisons[-1].longcot
    return (
        f"Only {shape.unbounded_layers} of {len(shape.layers)} layers look at everything before "
        "them, so LongCoT with this model is far from quadratic: from "
        f"{_tokens(float(last.thinking))} tokens on, twice the thinking takes "
        f"{answer.doubling:.2f} times the FLOPs."
    )


def _heading(answer: Answer) -> str:
    shape, device, job, cut = answer.shape, answer.device, answer.job, answer.cut
    billions = f"{shape.parameters / 1e9:.3g} B parameters"
    if shape.active_parameters != shape.parameters:
        billions += f", {shape.active_parameters / 1e9:.3g} B active"
    return "\n".join(
        [
            f"{shape.name}: {billions}, {len(shape.layers)} layers",
            f"C = {cut.context_size:,.0f}, m = {cut.carryover_size:,.0f}, query {job.query}; "
            f"{job.prompts} prompts x {job.group} traces, {job.steps:,} steps on "
            f"{job.gpus} x {device.name}",
            f"efficiencies from {answer.efficiency.source}: times are known to a factor of about "
            f"{math.exp(answer.efficiency.spread):.2f}",
        ]
    )


def _comparison(answer: Answer, one: Comparison) -> str:
    a, b = one.longcot, one.delethink
    rows: list[tuple[str, Any, Any]] = [
        ("chunks", a.chunks, b.chunks),
        ("FLOPs of a trace, sampling", a.sampling_flops, b.sampling_flops),
        ("FLOPs of a trace, training", a.training_flops, b.training_flops),
        ("cache of the longest trace, GB", a.cache_bytes / 1e9, b.cache_bytes / 1e9),
        ("memory of a training GPU, GB", a.training_bytes / 1e9, b.training_bytes / 1e9),
        ("traces side by side in an engine", a.concurrent, b.concurrent),
        ("sampled tokens/s and GPU", a.tokens_per_second, b.tokens_per_second),
        ("seconds a step, sampling", a.sampling_seconds, b.sampling_seconds),
        ("seconds a step, training", a.training_seconds, b.training_seconds),
        ("GPU-hours of the run", a.gpu_hours, b.gpu_hours),
        ("  5 % to 95 %", _range(one.longcot_hours), _range(one.delethink_hours)),
    ]
    if answer.price is not None:
        rows.append(("price of the run", a.gpu_hours * answer.price, b.gpu_hours * answer.price))
    lines = [[name, _cell(left), _cell(right), _ratio(left, right)] for name, left, right in rows]
    title = f"{_tokens(float(a.thinking))} thinking tokens a trace"
    notes = [
        _too_large(name, cost, answer.device) for name, cost in (("LongCoT", a), ("Delethink", b))
    ]
    return table([title, "LongCoT", "Delethink", "ratio"], lines) + "".join(notes)


def _too_large(name: str, cost: Cost, device: Accelerator) -> str:
    needed = float(cost.training_bytes)
    if needed <= device.memory:
        return ""
    return (
        f"\n{name}: training needs {needed / 1e9:,.0f} GB on a GPU that has "
        f"{device.memory / 1e9:,.0f}; its times hold only where a trace is split over GPUs."
    )


def _crossings(answer: Answer) -> str:
    names = {
        "sampling_flops": "FLOPs of sampling",
        "training_flops": "FLOPs of training",
        "step_seconds": "seconds of a step",
    }
    lines = [
        [names[key], "never" if value is None else f"{value:,} tokens"]
        for key, value in answer.crossings._asdict().items()
    ]
    longest = answer.longest_that_fits
    fits = "any length" if math.isinf(longest) else f"{longest:,.0f} tokens"
    lines.append(["longest thinking in one context that fits an engine", fits])
    lines.append(["longest thinking with Delethink that fits", "any length"])
    return table(["Delethink is cheaper for good, beyond", ""], lines)


def _growth(answer: Answer) -> str:
    tables = []
    for name, rows in answer.growth.items():
        lines = [
            [
                f"{g.factor} n = {g.thinking:,.0f}",
                *(f"{v:.2f}" for v in (g.flops, g.memory, g.training, g.sampling)),
            ]
            for g in rows
        ]
        heads = [f"{name}, times its cost at n", "FLOPs", "cache", "training", "sampling"]
        tables.append(table(heads, lines))
    formulas = [
        f"training FLOPs of a trace of n tokens, {name}: {formula}"
        for name, formula in answer.polynomials.items()
    ]
    return "\n\n".join([*tables, "\n".join(formulas)])


def _choices(answer: Answer) -> str:
    lines = [
        [
            f"C = {c.context_size:,}, m = {c.carryover_size:,}",
            _figure(float(c.cost.gpu_hours)),
            f"{float(c.cost.cache_bytes) / 1e9:.3g}",
        ]
        for c in answer.choices
    ]
    note = "This counts time alone: what a model can do with such a context has to be measured."
    heads = ["cheapest cuts at the last length", "GPU-hours", "cache, GB"]
    return table(heads, lines) + "\n" + note


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines that line up: the first column to the left, the others to the right."""
    everything = [list(heads), *map(list, rows)]
    widths = [max(len(row[i]) for row in everything) for i in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in everything
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    value = value if isinstance(value, int) else float(value)
    return value if math.isfinite(value) else None


def _tokens(value: float) -> str:
    return f"{value:,.0f}"


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else _figure(float(value))


def _figure(value: float) -> str:
    """Three digits at least; a power of ten where there are many."""
    if not math.isfinite(value):
        return "does not fit"
    if value == 0:
        return "0"
    if abs(value) >= 1e7 or abs(value) < 1e-2:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _range(hours: tuple[float, float]) -> str:
    return " to ".join(_figure(h) for h in hours) if all(map(math.isfinite, hours)) else "-"


def _ratio(left: Any, right: Any) -> str:
    if isinstance(left, str) or not float(right):
        return ""
    ratio = float(left) / float(right)
    return f"{ratio:.3g}" if math.isfinite(ratio) else ""


def plot_costs(
    shape: ModelShape,
    cut: Cut,
    device: Accelerator,
    efficiency: Efficiency,
    job: Job,
    longest: float,
    path: Path,
) -> None:
    """Draws FLOPs of training and GPU-hours of the run over thinking length, both log-log.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: the picture cannot be written, or not in that format.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "eval")
    from matplotlib.figure import Figure

    found = crossings(shape, cut, device, efficiency, job)
    context = float(cut.context_size)
    lengths = np.geomspace(context / 4, max(longest, 4 * context), 400).round()
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(
        f"{shape.name}, C = {context:,.0f}, m = {cut.carryover_size:,.0f}, "
        f"{job.gpus} x {device.name}"
    )
    panels = (
        ("FLOPs of training on a trace", "training_flops", found.training_flops),
        (f"GPU-hours of {job.steps:,} steps", "gpu_hours", found.step_seconds),
    )
    for axes, (label, key, cross) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, way in (("LongCoT", LONGCOT), ("Delethink", cut)):
            cost = estimate(shape, Lengths.constant(lengths), way, device, efficiency, job)
            axes.loglog(lengths, getattr(cost, key), label=name)
        if cross is not None and cross > context:
            axes.axvline(cross, color="grey", linestyle=":", label=f"they cross at {cross:,}")
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("thinking tokens of a trace")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the picture to {path}: {error}") from None
