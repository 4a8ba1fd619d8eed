"""Fits efficiencies to measured times, and says how well they fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from delethink.cost.chunks import Cut
from delethink.cost.estimate import Job, Lengths, estimate
from delethink.cost.flops import Floats
from delethink.cost.hardware import Accelerator, Efficiency
from delethink.cost.shape import ModelShape
from delethink.errors import ConfigError

SAMPLING = ("bandwidth", "decode", "prefill", "step_seconds", "token_seconds")
TRAINING = ("training", "pass_seconds")
# Where the search begins for a figure that is 0: from nearly nothing it would not move.
_FIRST = {"step_seconds": 1e-3, "token_seconds": 1e-5, "pass_seconds": 1e-3}


class Measurement(NamedTuple):
    """A step that was timed.

    Args:
        lengths: sampled tokens of its traces.
        cut: how thinking was cut.
        job: what a step was.
        sampling_seconds: of the step, or ``None`` if it was not timed.
        training_seconds: likewise.
    """

    lengths: Lengths
    cut: Cut
    job: Job
    sampling_seconds: float | None
    training_seconds: float | None


class Fit(NamedTuple):
    """Efficiencies and how far they are from what was measured.

    Args:
        efficiency: fitted; its ``spread`` is that of the errors.
        fitted: names of the figures that the measurements could tell.
        sampling_errors: predicted / measured - 1, for each measurement that was timed.
        training_errors: likewise.
    """

    efficiency: Efficiency
    fitted: tuple[str, ...]
    sampling_errors: Floats
    training_errors: Floats


def fit(
    measurements: Sequence[Measurement],
    shape: ModelShape,
    device: Accelerator,
    start: Efficiency,
    source: str,
) -> Fit:
    """Efficiencies that predict the measurements best, by least squares of the logarithms.

    As few figures as possible are let go: one that the measurements cannot tell from another keeps
    the value of ``start``.

    Raises:
        ConfigError: nothing was timed.
    """
    efficiency, fitted = start, []
    for names, field in ((SAMPLING, "sampling_seconds"), (TRAINING, "training_seconds")):
        timed = [m for m in measurements if getattr(m, field)]
        if timed:
            errors = _errors(timed, field, shape, device)
            efficiency, found = _select(errors, efficiency, names, len(timed))
            fitted += found
    if not fitted:
        raise ConfigError("nothing to calibrate on: no measurement has a time")
    sampling, training = (
        np.expm1(_errors([m for m in measurements if getattr(m, f)], f, shape, device)(efficiency))
        for f in ("sampling_seconds", "training_seconds")
    )
    spread = float(np.sqrt(np.mean(np.log1p(np.concatenate([sampling, training])) ** 2)))
    efficiency = dataclasses.replace(efficiency, spread=spread, source=source)
    return Fit(efficiency, tuple(fitted), sampling, training)


Errors = Callable[[Efficiency], Floats]


def _errors(
    measurements: Sequence[Measurement], field: str, shape: ModelShape, device: Accelerator
) -> Errors:
    """The logarithm of predicted over measured, for each measurement."""

    def errors(efficiency: Efficiency) -> Floats:
        predicted = [
            float(getattr(estimate(shape, m.lengths, m.cut, device, efficiency, m.job), field))
            for m in measurements
        ]
        measured = [getattr(m, field) for m in measurements]
        return np.asarray(np.log(np.array(predicted) / np.array(measured)))

    return errors


def _select(
    errors: Errors, start: Efficiency, names: Sequence[str], points: int
) -> tuple[Efficiency, list[str]]:
    """Lets as few figures go as explain the times.

    One alone may explain little where two together explain all: so every pair is tried, and from
    the best one on a figure more at a time, as long as each lowers the squared error by a tenth.
    """

    def fitted(chosen: Sequence[str]) -> tuple[float, Efficiency, list[str]]:
        efficiency = _minimise(errors, start, chosen)
        return float(np.sum(errors(efficiency) ** 2)), efficiency, list(chosen)

    def best(choices: Iterable[Sequence[str]]) -> tuple[float, Efficiency, list[str]]:
        return min((fitted(chosen) for chosen in choices), key=lambda found: found[0])

    found = best((name,) for name in names)
    for size in range(2, min(len(names), points) + 1):
        kept = found[2] if size > 2 else []
        more = best(
            (*kept, *added)
            for added in combinations([n for n in names if n not in kept], size - len(kept))
        )
        if found[0] < 1e-12 or more[0] > 0.9 * found[0]:
            break
        found = more
    return found[1], found[2]


def _minimise(errors: Errors, start: Efficiency, names: Sequence[str]) -> Efficiency:
    """Levenberg and Marquardt's method on the logarithms of the named figures."""
    most = np.array([np.inf if name.endswith("_seconds") else 0.0 for name in names])  # of shares

    def at(logs: Floats) -> Efficiency:
        values: dict[str, Any] = dict(zip(names, np.exp(logs).tolist(), strict=True))
        return dataclasses.replace(start, **values)

    logs = np.log([getattr(start, n) or _FIRST[n] for n in names])
    now, damping = errors(at(logs)), 1e-2
    for _ in range(60):
        columns = [(errors(at(logs + 1e-4 * unit)) - now) / 1e-4 for unit in np.eye(len(names))]
        jacobian = np.stack(columns, axis=1)
        normal = jacobian.T @ jacobian
        normal += damping * np.diag(np.diag(normal) + 1e-9)
        step = np.clip(np.linalg.solve(normal, -jacobian.T @ now), -2, 2)
        step = np.minimum(logs + step, most) - logs
        tried = errors(at(logs + step))
        if tried @ tried < now @ now:
            close = now @ now - tried @ tried < 1e-10 * (now @ now)
            logs, now, damping = logs + step, tried, damping / 3
            if close:
                break
        else:
            damping *= 4
            if damping > 1e9:
                break
    return at(logs)
