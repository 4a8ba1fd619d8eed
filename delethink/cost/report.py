"""The report of ``delethink cost``: tables, a summary in one or two sentences, JSON, a plot."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from delethink.cost.estimate import Cost, Crossings, Lengths, Workload, estimate
from delethink.cost.flops import LONGCOT, Cut
from delethink.cost.hardware import Accelerator, Efficiency
from delethink.cost.shape import ModelShape
from delethink.errors import ConfigError, MissingExtraError
from delethink.output import safe_text


@dataclass(frozen=True)
class CostPair:
    """Costs of LongCoT and Delethink at one thinking length."""

    longcot: Cost
    delethink: Cost
    longcot_hours: tuple[float, float]  # 5 % and 95 % quantiles of LongCoT's GPU-hours
    delethink_hours: tuple[float, float]  # 5 % and 95 % quantiles of Delethink's GPU-hours


@dataclass(frozen=True)
class CostReport:
    """All results of one ``delethink cost`` command, with its settings."""

    shape: ModelShape
    cut: Cut
    device: Accelerator
    efficiency: Efficiency
    workload: Workload
    price: float | None
    pairs: Sequence[CostPair]
    crossings: Crossings
    longest_that_fits: float
    doubling: float  # LongCoT's FLOPs at twice the last length, relative to the last length

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values; infinity and NaN become ``None``."""

        def values(cost: Cost, hours: tuple[float, float]) -> dict[str, Any]:
            figures = cost.as_dict() | {"gpu_hours_5_95": list(hours)}
            return {name: _json_value(figure) for name, figure in figures.items()}

        return {
            "model": {
                "name": self.shape.name,
                "parameters": self.shape.parameters,
                "active_parameters": self.shape.active_parameters,
                "layers": len(self.shape.layers),
                "unbounded_layers": self.shape.unbounded_layers,
            },
            "context_size": _json_value(self.cut.context_size),
            "carryover_size": _json_value(self.cut.carryover_size),
            "device": self.device.__dict__,
            "efficiency": self.efficiency.__dict__,
            "workload": self.workload.__dict__,
            "thinking": [
                {
                    "longcot": values(p.longcot, p.longcot_hours),
                    "delethink": values(p.delethink, p.delethink_hours),
                }
                for p in self.pairs
            ],
            "crossings": self.crossings._asdict(),
            "longest_longcot_that_fits": _json_value(self.longest_that_fits),
            "longcot_flops_of_a_doubling": _json_value(self.doubling),
            "in_words": summary(self),
        }


def as_text(report: CostReport) -> str:
    """Return the whole report as text."""
    tables = [_pair_table(report, pair) for pair in report.pairs]
    return "\n\n".join([_heading(report), *tables, _crossings_table(report), summary(report)])


def summary(report: CostReport) -> str:
    """Return the comparison at the last length in one or two sentences."""
    last = report.pairs[-1]
    tokens = _tokens(last.longcot.thinking)
    longcot, delethink = float(last.longcot.gpu_hours), float(last.delethink.gpu_hours)
    if not math.isfinite(longcot):
        verdict = (
            f"Thinking for {tokens} tokens in one context does not fit on this hardware; with "
            f"Delethink it takes {_figure(delethink)} GPU-hours."
        )
    else:
        ratio = longcot / delethink
        better = f"{ratio:.1f} times fewer" if ratio > 1 else f"{1 / ratio:.2f} times as many"
        than = "than" if ratio > 1 else "as"
        low = last.longcot_hours[0] / last.delethink_hours[1]
        high = last.longcot_hours[1] / last.delethink_hours[0]
        unsure = ", but the uncertainty covers the opposite" if low < 1 < high else ""
        verdict = (
            f"At {tokens} thinking tokens Delethink takes {better} GPU-hours {than} LongCoT: "
            f"{_figure(delethink)} against {_figure(longcot)}{unsure}."
        )
    return f"{verdict} {_layers_note(report)}".strip()


def _layers_note(report: CostReport) -> str:
    """Return a note on the growth of LongCoT, if some layers have bounded cost per token."""
    layers, unbounded = len(report.shape.layers), report.shape.unbounded_layers
    if unbounded == layers:
        return ""
    if not unbounded:
        return (
            "Every layer of this model has a window or a state of fixed size, so LongCoT is linear "
            "already: a reset saves no compute in the long run."
        )
    return (
        f"Only {unbounded} of {layers} layers have full attention, so LongCoT with this model is "
        f"far from quadratic: from {_tokens(report.pairs[-1].longcot.thinking)} tokens on, twice "
        f"the thinking takes {report.doubling:.2f} times the FLOPs."
    )


def _heading(report: CostReport) -> str:
    shape, workload, cut = report.shape, report.workload, report.cut
    billions = f"{shape.parameters / 1e9:.3g} B parameters"
    if shape.active_parameters != shape.parameters:
        billions += f", {shape.active_parameters / 1e9:.3g} B active"
    return "\n".join(
        [
            f"{shape.name}: {billions}, {len(shape.layers)} layers",
            f"C = {cut.context_size:,.0f}, m = {cut.carryover_size:,.0f}, query "
            f"{workload.query}; {workload.prompts} prompts x {workload.group} traces, "
            f"{workload.steps:,} steps on {workload.gpus} x {report.device.name}",
            f"efficiencies from {report.efficiency.source}: times are accurate to a factor of "
            f"about {math.exp(report.efficiency.spread):.2f}",
        ]
    )


def _pair_table(report: CostReport, pair: CostPair) -> str:
    a, b = pair.longcot, pair.delethink
    rows: list[tuple[str, Any, Any]] = [
        ("chunks", a.chunks, b.chunks),
        ("FLOPs per trace, sampling", a.sampling_flops, b.sampling_flops),
        ("FLOPs per trace, training", a.training_flops, b.training_flops),
        ("KV cache of the longest trace, GB", a.cache_bytes / 1e9, b.cache_bytes / 1e9),
        ("memory of a training GPU, GB", a.training_bytes / 1e9, b.training_bytes / 1e9),
        ("concurrent traces per engine", a.concurrent, b.concurrent),
        ("sampled tokens/s per GPU", a.tokens_per_second, b.tokens_per_second),
        ("seconds per step, sampling", a.sampling_seconds, b.sampling_seconds),
        ("seconds per step, training", a.training_seconds, b.training_seconds),
        ("GPU-hours of the run", a.gpu_hours, b.gpu_hours),
        ("  5 % to 95 %", _range(pair.longcot_hours), _range(pair.delethink_hours)),
    ]
    if report.price is not None:
        rows.append(("price of the run", a.gpu_hours * report.price, b.gpu_hours * report.price))
    lines = [[name, _cell(left), _cell(right), _ratio(left, right)] for name, left, right in rows]
    title = f"{_tokens(a.thinking)} thinking tokens per trace"
    text, memory = table([title, "LongCoT", "Delethink", "ratio"], lines), report.device.memory
    for method, cost in (("LongCoT", a), ("Delethink", b)):
        if cost.training_bytes > memory:
            text += (
                f"\n{method}: training needs {cost.training_bytes / 1e9:,.0f} GB per GPU, and a "
                f"GPU has {memory / 1e9:,.0f} GB; the times hold only if each trace is split over "
                "GPUs."
            )
    return text


def _crossings_table(report: CostReport) -> str:
    names = ("FLOPs of sampling", "FLOPs of training", "seconds per step")
    lines = [
        [name, "never" if value is None else f"{value:,} tokens"]
        for name, value in zip(names, report.crossings, strict=True)
    ]
    longest = report.longest_that_fits
    fits = "any length" if math.isinf(longest) else f"{longest:,.0f} tokens"
    lines.append(["longest thinking in one context that fits an engine", fits])
    lines.append(["longest thinking with Delethink that fits", "any length"])
    return table(["Delethink is always cheaper beyond", ""], lines)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns: the first one to the left, the others to the right."""
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


def _json_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_json_value(v) for v in value]
    value = value if isinstance(value, int) else float(value)
    return value if math.isfinite(value) else None


def _tokens(value: Any) -> str:
    return f"{float(value):,.0f}"


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else _figure(float(value))


def _figure(value: float) -> str:
    """Return at least three significant digits, with an exponent for very large or small values."""
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


def plot_costs(report: CostReport, path: Path) -> None:
    """Plot training FLOPs and GPU-hours over the thinking length, on logarithmic axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: the file cannot be written, or its format is unknown.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "eval")
    from matplotlib.figure import Figure

    shape, cut, workload, device = report.shape, report.cut, report.workload, report.device
    context = float(cut.context_size)
    longest = max(float(pair.longcot.thinking) for pair in report.pairs)
    lengths = np.geomspace(context / 4, max(longest, 4 * context), 400).round()
    equal = Lengths.constant(lengths)
    costs = {
        name: estimate(shape, equal, method, device, report.efficiency, workload)
        for name, method in (("LongCoT", LONGCOT), ("Delethink", cut))
    }
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(
        f"{safe_text(shape.name, lines=False)}, C = {context:,.0f}, m = {cut.carryover_size:,.0f}, "
        f"{workload.gpus} x {device.name}"
    )
    panels = (
        ("FLOPs of training on a trace", "training_flops", report.crossings.training_flops),
        (f"GPU-hours of {workload.steps:,} steps", "gpu_hours", report.crossings.step_seconds),
    )
    for axes, (label, key, cross) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, cost in costs.items():
            axes.loglog(lengths, getattr(cost, key), label=name)
        if cross is not None and cross > context:
            axes.axvline(cross, color="grey", linestyle=":", label=f"crossing at {cross:,}")
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("thinking tokens of a trace")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the plot to {path}: {error}") from None
