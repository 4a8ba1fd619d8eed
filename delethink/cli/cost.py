"""``delethink cost``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from delethink.chunking import ChunkSpec
from delethink.cli.sizes import size
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
from delethink.cost.compare import cheapest_cuts, crossings, flops_polynomial, growth
from delethink.cost.estimate import Job, Lengths, estimate, interval, longest_that_fits
from delethink.cost.flops import LONGCOT, Accounting, Cut
from delethink.cost.hardware import Accelerator, Efficiency, accelerator
from delethink.cost.models import known_models, model_shape
from delethink.cost.paper_report import REPRODUCTIONS, accounting_text
from delethink.cost.report import Answer, Comparison, as_text, table
from delethink.errors import ConfigError


def run(arguments: argparse.Namespace) -> int:
    """Answers the question."""
    if arguments.models:
        print("\n".join(known_models()))
    elif arguments.reproduce:
        print(REPRODUCTIONS[arguments.reproduce](arguments.json))
    elif arguments.calibrate:
        print(_calibrate(arguments))
    elif arguments.accounting == Accounting.PAPER.value:
        print(_as_the_paper_counts(arguments))
    else:
        answer = _answer(arguments)
        if arguments.plot:
            _plot(answer, arguments.plot)
        print(json.dumps(answer.as_dict(), indent=2) if arguments.json else as_text(answer))
    return 0


def _answer(arguments: argparse.Namespace) -> Answer:
    shape, device = model_shape(arguments.model), accelerator(arguments.gpu)
    efficiency, job, cut = _efficiency(arguments), _job(arguments), _cut(arguments)
    if arguments.price is not None and not 0 <= arguments.price < math.inf:
        raise ConfigError(f"--price must be a number of at least 0, got {arguments.price}")
    batch = -(-job.traces // job.gpus)
    asked = _lengths(arguments, cut, batch)

    def compare(lengths: Lengths) -> Comparison:
        def hours(way: Cut) -> tuple[float, float]:
            return interval(shape, lengths, way, device, efficiency, job, seed=arguments.seed)

        a, b = (estimate(shape, lengths, w, device, efficiency, job) for w in (LONGCOT, cut))
        return Comparison(a, b, hours(LONGCOT), hours(cut))

    last = asked[-1]
    twice = Lengths(last.values * 2, last.longest * 2)
    pair = [estimate(shape, n, LONGCOT, device, efficiency, job).flops for n in (last, twice)]
    ways = {"LongCoT": LONGCOT, "Delethink": cut}
    base = float(cut.context_size)
    return Answer(
        shape=shape,
        cut=cut,
        device=device,
        efficiency=efficiency,
        job=job,
        price=arguments.price,
        comparisons=[compare(lengths) for lengths in asked],
        crossings=crossings(shape, cut, device, efficiency, job),
        longest_that_fits=longest_that_fits(shape, device, efficiency, job),
        doubling=float(pair[1] / pair[0]),
        growth={
            name: growth(shape, way, device, efficiency, job, base) for name, way in ways.items()
        }
        if arguments.growth
        else {},
        polynomials={name: flops_polynomial(shape, way, job.query) for name, way in ways.items()}
        if arguments.growth
        else {},
        choices=cheapest_cuts(shape, last, device, efficiency, job, head=int(cut.fixed_head))
        if arguments.best
        else (),
    )


def _as_the_paper_counts(arguments: argparse.Namespace) -> str:
    shape, cut = model_shape(arguments.model), _cut(arguments)
    means = [float(lengths.mean) for lengths in _lengths(arguments, cut, 1)]
    return accounting_text(shape, cut, means, arguments.json)


def _calibrate(arguments: argparse.Namespace) -> str:
    runs, device = arguments.calibrate, accelerator(arguments.gpu)
    name = read_model(runs[0]) if arguments.model == paper.MODEL else arguments.model
    measured = [measurement for path in runs for measurement in read_steps(path)]
    source = f"{len(measured) // 2} steps of {', '.join(path.name for path in runs)}"
    found = fit(measured, model_shape(name), device, _efficiency(arguments), source)
    if arguments.save_efficiency:
        write_efficiency(found.efficiency, arguments.save_efficiency)
    return _fit_json(found) if arguments.json else _fit_text(found, device)


def _fit_text(found: Fit, device: Accelerator) -> str:
    values = dataclasses.asdict(found.efficiency)
    lines = [
        [name, f"{value:.4g}", "fitted" if name in found.fitted else "kept"]
        for name, value in values.items()
        if isinstance(value, float) and name != "spread"
    ]
    parts = [table([f"efficiency on {device.name}", "value", ""], lines)]
    for name, errors in (
        ("sampling", found.sampling_errors),
        ("training", found.training_errors),
    ):
        if errors.size:
            parts.append(
                f"{name}: predicted time is off by {np.median(np.abs(errors)):.1%} (median) and "
                f"{np.abs(errors).max():.1%} (most) over {errors.size} steps"
            )
    return "\n".join(parts)


def _fit_json(found: Fit) -> str:
    return json.dumps(
        {
            "efficiency": dataclasses.asdict(found.efficiency),
            "fitted": found.fitted,
            "sampling_errors": found.sampling_errors.tolist(),
            "training_errors": found.training_errors.tolist(),
        },
        indent=2,
    )


def _plot(answer: Answer, path: Path) -> None:
    from delethink.cost.report import plot_costs

    longest = max(float(one.longcot.thinking) for one in answer.comparisons)
    plot_costs(
        answer.shape, answer.cut, answer.device, answer.efficiency, answer.job, longest, path
    )


def _efficiency(arguments: argparse.Namespace) -> Efficiency:
    return read_efficiency(arguments.efficiency) if arguments.efficiency else Efficiency()


def _job(arguments: argparse.Namespace) -> Job:
    return Job(
        query=size(arguments.query, "--query"),
        group=arguments.group,
        prompts=arguments.prompts,
        steps=arguments.steps,
        gpus=arguments.gpus,
        parallel=arguments.parallel,
    )


def _cut(arguments: argparse.Namespace) -> Cut:
    context = size(arguments.context_size, "-C")
    carry = context // 2 if arguments.carryover is None else size(arguments.carryover, "-m", 0)
    head = _head(arguments, carry)
    # The rule itself refuses sizes that make no sense.
    return Cut.of(ChunkSpec(context, carry, 2, head, arguments.head_outside))


def _head(arguments: argparse.Namespace, carry: int) -> int:
    """The paper's head of 100, or all that is carried where that is less."""
    if arguments.head_size is None:
        return min(100, carry)
    return size(arguments.head_size, "--head-size", 0)


def _lengths(arguments: argparse.Namespace, cut: Cut, batch: int) -> list[Lengths]:
    seen = None if arguments.lengths is None else read_lengths(arguments.lengths)
    if arguments.thinking is None and seen is not None:
        return [Lengths.empirical(seen, batch)]
    means = [size(part, "--thinking") for part in (arguments.thinking or "24k,96k,1M").split(",")]
    for mean in means:
        if mean < cut.context_size:
            raise ConfigError(
                f"{mean:,} thinking tokens fit in the first context of C = "
                f"{cut.context_size:,.0f}, so there is nothing to compare: LongCoT and Delethink "
                "are the same; ask for longer thinking, or lower -C"
            )
    if seen is None:
        return [Lengths.constant(mean) for mean in sorted(means)]
    stretch: Callable[[int], Lengths] = lambda mean: Lengths.empirical(  # noqa: E731
        np.maximum(1, seen * mean / seen.mean()), batch
    )
    return [stretch(mean) for mean in sorted(means)]
