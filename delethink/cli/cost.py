"""The command ``delethink cost``."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from pathlib import Path

import numpy as np

from delethink.chunking import ChunkSpec
from delethink.cli.arguments import check_model_name, parse_carryover, parse_head_size, size
from delethink.cost import paper
from delethink.cost.calibrate import (
    Fit,
    fit,
    read_efficiency,
    read_lengths,
    read_model,
    read_steps,
    write_efficiency,
)
from delethink.cost.estimate import (
    Cost,
    Lengths,
    Workload,
    crossings,
    estimate,
    interval,
    longest_that_fits,
)
from delethink.cost.flops import LONGCOT, Cut, FloatArray
from delethink.cost.hardware import Accelerator, Efficiency, accelerator
from delethink.cost.models import known_models, model_shape
from delethink.cost.report import CostPair, CostReport, as_text, plot_costs, table
from delethink.cost.shape import ModelShape
from delethink.engines.loading import base_model
from delethink.errors import ConfigError
from delethink.output import echo, echo_json


def run(arguments: argparse.Namespace) -> int:
    """Print the estimate, or the list, the reproduction or the fit asked for."""
    if arguments.models:
        echo("\n".join(known_models()))
    elif arguments.reproduce:
        echo(paper.reproduction(arguments.reproduce, arguments.json))
    elif arguments.calibrate:
        _calibrate(arguments)
    elif arguments.accounting == "paper":
        shape, cut = _shape(arguments), _cut(arguments)
        means = [float(lengths.mean) for lengths in _lengths(arguments, cut, 1)]
        echo(paper.accounting_text(shape, cut, means, arguments.json))
    else:
        report = _report(arguments)
        if arguments.plot:
            plot_costs(report, arguments.plot)
        if arguments.json:
            echo_json(report.as_dict())
        else:
            echo(as_text(report))
    return 0


def _report(arguments: argparse.Namespace) -> CostReport:
    shape, device = _shape(arguments), accelerator(arguments.gpu)
    efficiency, cut = _efficiency(arguments), _cut(arguments)
    workload = Workload(
        query=size(arguments.query, "--query"),
        group=arguments.group,
        prompts=arguments.prompts,
        steps=arguments.steps,
        gpus=arguments.gpus,
        parallel=arguments.parallel,
    )
    if arguments.price is not None and not 0 <= arguments.price < math.inf:
        raise ConfigError(f"--price must be a number of at least 0, got {arguments.price}")
    if arguments.seed < 0:
        raise ConfigError(f"--seed must be at least 0, got {arguments.seed}")

    def cost(lengths: Lengths, method: Cut) -> Cost:
        return estimate(shape, lengths, method, device, efficiency, workload)

    def hours(lengths: Lengths, method: Cut) -> tuple[float, float]:
        seed = arguments.seed
        return interval(shape, lengths, method, device, efficiency, workload, seed=seed)

    lengths = _lengths(arguments, cut, -(-workload.traces // workload.gpus))
    last = lengths[-1]
    twice = Lengths(last.values * 2, last.longest * 2)
    return CostReport(
        shape=shape,
        cut=cut,
        device=device,
        efficiency=efficiency,
        workload=workload,
        price=arguments.price,
        pairs=[
            CostPair(cost(n, LONGCOT), cost(n, cut), hours(n, LONGCOT), hours(n, cut))
            for n in lengths
        ],
        crossings=crossings(shape, cut, device, efficiency, workload),
        longest_that_fits=longest_that_fits(shape, device, efficiency, workload),
        doubling=float(cost(twice, LONGCOT).flops / cost(last, LONGCOT).flops),
    )


def _calibrate(arguments: argparse.Namespace) -> None:
    runs, device = arguments.calibrate, accelerator(arguments.gpu)
    measured = [measurement for path in runs for measurement in read_steps(path)]
    shape = _shape(arguments, default=read_model(runs[0]))
    source = f"{len(measured) // 2} steps of {', '.join(path.name for path in runs)}"
    found = fit(measured, shape, device, _efficiency(arguments), source)
    if arguments.save_efficiency:
        write_efficiency(found.efficiency, arguments.save_efficiency)
    if not arguments.json:
        echo(_fit_text(found, device))
        return
    values = {
        "efficiency": dataclasses.asdict(found.efficiency),
        "fitted": found.fitted,
        "sampling_errors": found.sampling_errors.tolist(),
        "training_errors": found.training_errors.tolist(),
    }
    echo_json(values)


def _fit_text(found: Fit, device: Accelerator) -> str:
    values = dataclasses.asdict(found.efficiency)
    lines = [
        [name, f"{value:.4g}", "fitted" if name in found.fitted else "kept"]
        for name, value in values.items()
        if isinstance(value, float) and name != "spread"
    ]
    parts = [table([f"efficiency on {device.name}", "value", ""], lines)]
    measured = {"sampling": found.sampling_errors, "training": found.training_errors}
    for name, errors in measured.items():
        if errors.size:
            parts.append(
                f"{name}: error of the predicted time {np.median(np.abs(errors)):.1%} (median), "
                f"{np.abs(errors).max():.1%} (maximum) over {errors.size} steps"
            )
    return "\n".join(parts)


def _shape(arguments: argparse.Namespace, default: str = paper.MODEL) -> ModelShape:
    model = arguments.model
    if model is not None:
        check_model_name(model)
    if model is not None and os.path.isdir(model):  # false for figures longer than a path may be
        model = base_model(model)  # of a LoRA adapter
    return model_shape(default if model is None else model)


def _efficiency(arguments: argparse.Namespace) -> Efficiency:
    return read_efficiency(arguments.efficiency) if arguments.efficiency else Efficiency()


def _cut(arguments: argparse.Namespace) -> Cut:
    context = size(arguments.context_size, "-C")
    carried = arguments.carryover_size
    carried = context // 2 if carried is None else size(carried, "--carryover-size", 0)
    head = parse_head_size(arguments.head_size)
    policy = parse_carryover(arguments.carryover)
    return Cut.of(ChunkSpec(context, carried, 2, head, arguments.head_outside, policy))


def _seen_lengths(path: Path) -> FloatArray:
    if not (path / "settings.json").is_file():
        return read_lengths(path)
    from delethink.evaluation.stored import thinking_lengths

    return np.array(thinking_lengths(path))


def _lengths(arguments: argparse.Namespace, cut: Cut, batch: int) -> list[Lengths]:
    seen = None if arguments.lengths is None else _seen_lengths(arguments.lengths)
    if arguments.thinking is None and seen is not None:
        return [Lengths.empirical(seen, batch)]
    means = [size(part, "--thinking") for part in (arguments.thinking or "24k,96k,1M").split(",")]
    short = [mean for mean in means if mean < cut.context_size]
    if short:
        listed = ", ".join(f"{mean:,}" for mean in short)
        text = (
            f"{listed} thinking tokens fit in the first context of C = {cut.context_size:,.0f}, "
            "so LongCoT and Delethink are the same"
        )
        if len(short) == len(means):
            raise ConfigError(f"{text}; use a longer --thinking or a smaller -C")
        echo(f"left out: {text}", stderr=True)
        means = [mean for mean in means if mean not in short]
    if seen is None:
        return [Lengths.constant(mean) for mean in sorted(means)]
    return [
        Lengths.empirical(np.maximum(1, seen * mean / seen.mean()), batch) for mean in sorted(means)
    ]
