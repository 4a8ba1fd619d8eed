"""The two curves of a question, as a picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from delethink.cost.chunks import LONGCOT, Cut
from delethink.cost.compare import crossings
from delethink.cost.estimate import Job, Lengths, estimate
from delethink.cost.hardware import Accelerator, Efficiency
from delethink.cost.shape import ModelShape
from delethink.errors import ConfigError, MissingExtraError


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
    except (OSError, ValueError) as problem:
        raise ConfigError(f"cannot write the picture to {path}: {problem}") from None
