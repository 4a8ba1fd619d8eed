"""Calibration: fit efficiencies to measured times, and read times and lengths of runs."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from delethink.cost.estimate import Lengths, Workload, estimate
from delethink.cost.flops import Cut, FloatArray
from delethink.cost.hardware import Accelerator, Efficiency
from delethink.cost.shape import ModelShape
from delethink.errors import ConfigError, MissingExtraError, did_you_mean
from delethink.json_io import (
    as_mapping,
    get_count,
    get_ids,
    get_number,
    is_finite,
    read_json,
    read_json_lines,
    read_text,
    shorten,
)
from delethink.redaction import json_text

if TYPE_CHECKING:
    from delethink.config import Recipe

_FIGURES = (
    (("bandwidth", "decode", "prefill", "step_seconds", "token_seconds"), "sampling_seconds"),
    (("training", "pass_seconds"), "training_seconds"),
)
# Start of the search for figures that are 0: the search uses logarithms.
_INITIAL_SECONDS = {"step_seconds": 1e-3, "token_seconds": 1e-5, "pass_seconds": 1e-3}
_WARM_UP_STEPS = 1  # the first step includes one-time costs
_MAX_LENGTHS = 10_000_000  # of a file of lengths; 80 MB

Row = TypeVar("Row")


class Measurement(NamedTuple):
    """A timed training step."""

    lengths: Lengths  # sampled tokens of its traces
    cut: Cut  # chunk sizes
    workload: Workload  # queries, traces and devices of the step
    sampling_seconds: float | None  # time of sampling; ``None``: not timed
    training_seconds: float | None  # time of training; ``None``: not timed


class Fit(NamedTuple):
    """Fitted efficiencies and their errors."""

    efficiency: Efficiency  # fitted efficiencies; ``spread`` is that of the errors
    fitted: tuple[str, ...]  # names of the figures that the measurements determine
    sampling_errors: FloatArray  # predicted / measured - 1 for each timed measurement
    training_errors: FloatArray  # predicted / measured - 1 for each timed measurement


def fit(
    measurements: Sequence[Measurement],
    shape: ModelShape,
    device: Accelerator,
    start: Efficiency,
    source: str,
) -> Fit:
    """Fit efficiencies to measurements by least squares of the logarithms.

    As few figures as possible are fitted. A figure that the measurements do not determine keeps its
    value in ``start``.

    Raises:
        ConfigError: no measurement has a time.
    """
    efficiency, fitted = start, []
    curves: list[Errors] = []
    for names, field in _FIGURES:
        timed = [m for m in measurements if getattr(m, field)]
        curves.append(_log_errors(timed, field, shape, device))
        if timed:
            efficiency, found = _select(curves[-1], efficiency, names, len(timed))
            fitted += found
    if not fitted:
        raise ConfigError("nothing to calibrate on: no measurement has a time")
    sampling, training = (errors(efficiency) for errors in curves)
    spread = float(np.sqrt(np.mean(np.concatenate([sampling, training]) ** 2)))
    efficiency = dataclasses.replace(efficiency, spread=spread, source=source)
    return Fit(efficiency, tuple(fitted), np.expm1(sampling), np.expm1(training))


Errors = Callable[[Efficiency], FloatArray]


def _log_errors(
    measurements: Sequence[Measurement], field: str, shape: ModelShape, device: Accelerator
) -> Errors:
    """Return a function for the log of predicted over measured time of each measurement."""

    def errors(efficiency: Efficiency) -> FloatArray:
        predicted = [
            float(getattr(estimate(shape, m.lengths, m.cut, device, efficiency, m.workload), field))
            for m in measurements
        ]
        measured = [getattr(m, field) for m in measurements]
        return np.asarray(np.log(np.array(predicted) / np.array(measured)))

    return errors


def _select(
    errors: Errors, start: Efficiency, names: Sequence[str], points: int
) -> tuple[Efficiency, list[str]]:
    """Fit as few figures as explain the times.

    One figure alone may explain little when two together explain everything. So all pairs are
    tried, and further figures are added one at a time while each reduces the squared error by a
    tenth.
    """

    def fitted(chosen: Sequence[str]) -> tuple[float, Efficiency, list[str]]:
        efficiency = _minimize(errors, start, chosen)
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


def _minimize(errors: Errors, start: Efficiency, names: Sequence[str]) -> Efficiency:
    """Minimize the squared errors over the logarithms of the named figures."""
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise MissingExtraError("scipy", "eval") from None

    def at(logs: FloatArray) -> Efficiency:
        values: dict[str, Any] = dict(zip(names, np.exp(logs).tolist(), strict=True))
        return dataclasses.replace(start, **values)

    logs = np.log([getattr(start, n) or _INITIAL_SECONDS[n] for n in names])
    # Fractions of a peak are at most 1; the margin keeps a start of 1 feasible.
    upper = [np.inf if name.endswith("_seconds") else 1e-9 for name in names]
    found = least_squares(lambda x: errors(at(x)), logs, bounds=(-np.inf, upper), xtol=1e-10)
    return at(np.minimum(found.x, np.where(np.isinf(upper), np.inf, 0.0)))


def read_lengths(path: Path) -> FloatArray:
    """Read the thinking lengths of traces, in tokens.

    ``path`` is a run directory, or a text file with ``length`` or ``length,count`` on each line.

    Raises:
        ConfigError: there are no lengths, or a line has another form.
    """
    if path.is_dir():
        seen = [float(record[0]) for records in _traces(path).values() for record in records]
    else:
        seen = []
        for number, line in enumerate(read_text(path, ConfigError).splitlines(), start=1):
            if not line.strip() or line.startswith("#"):
                continue
            length, _, count = line.partition(",")
            try:
                times = int(count or 1)
                if not 1 <= float(length) < float("inf") or not 0 <= times <= _MAX_LENGTHS:
                    raise ValueError
                seen += [float(length)] * times
            except (ValueError, OverflowError):
                raise ConfigError(
                    f"{path}, line {number}: expected a length of at least 1, or length,count; "
                    f"got {line!r:.80}"
                ) from None
            if len(seen) > _MAX_LENGTHS:
                raise ConfigError(f"{path} has more than {_MAX_LENGTHS:,} lengths; give a sample")
    if not seen:
        raise ConfigError(f"{path} holds no lengths of traces")
    return np.array(seen, float)


def read_model(path: Path) -> str:
    """Return the model of a run directory."""
    return _recipe(path).model


def read_steps(path: Path) -> list[Measurement]:
    """Read the timed steps of a run directory, without the first one.

    Sampling and training are separate measurements, because they may run on different devices.

    Raises:
        ConfigError: the path is no run directory, no step was timed, or a batch of traces has
            several optimizer steps.
        MissingExtraError: the YAML reader is not installed.
    """
    recipe, traces = _recipe(path), _traces(path)
    training, engine, cut = recipe.training, recipe.engine, Cut.of(recipe.thinking.spec())
    if training.num_iterations > 1 or training.steps_per_generation:
        raise ConfigError(
            "a run with several optimizer steps per batch of traces cannot be calibrated on: set "
            "training.num_iterations=1 and leave out training.steps_per_generation"
        )
    metrics = _times(path / "metrics.jsonl")
    timed = sorted(step for step in metrics if step in traces)[_WARM_UP_STEPS:]
    if not timed:
        raise ConfigError(
            f"{path} has no step to calibrate on: metrics.jsonl has {len(metrics)} steps, and the "
            "first one is left out"
        )
    engines = max(1, round(engine.num_engines * engine.gpus_per_engine))
    measured = []
    for step in timed:
        lengths = [float(length) for length, _ in traces[step]]
        seen = Lengths.empirical(lengths, -(-len(lengths) // engines))
        workload = Workload(
            query=round(np.mean([query for _, query in traces[step]])),
            group=training.num_generations,
            prompts=max(1, len(lengths) // training.num_generations),
            steps=1,
            gpus=engines,
            extra_passes=float(training.gradient_checkpointing),
            # Engines in Ray workers have a prefix cache; "auto" on CPUs is not known here.
            prefix_cache=engine.name not in ("auto", "transformers") or engine.gpus_per_engine > 0,
        )
        alone, (sampling, updating) = dataclasses.replace(workload, gpus=1), metrics[step]
        measured.append(Measurement(seen, cut, workload, sampling, None))
        measured.append(Measurement(seen, cut, alone, None, updating))
    return measured


def _recipe(path: Path) -> Recipe:
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path} is not a run directory: it has no config.yaml")
    from delethink.config import load_recipe  # imported here because estimates need no YAML

    return load_recipe(path / "config.yaml")


def _traces(path: Path) -> dict[int, list[tuple[int, int]]]:
    """Return length and query length of the traces of a run directory, by step."""
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for file in sorted((path / "traces").glob("step_*.jsonl")):
        step = file.stem.removeprefix("step_")
        if step.isdecimal():
            found[int(step)] += _lines(
                file, lambda line: (get_count(line, "length"), len(get_ids(line, "query_ids")))
            )
    return found


def _times(path: Path) -> dict[int, tuple[float, float]]:
    """Return the seconds of sampling and of training by step."""
    keys = ("seconds_sampling", "seconds_training")
    return dict(
        _lines(
            path,
            lambda line: (
                get_count(line, "step"),
                (get_number(line, keys[0]), get_number(line, keys[1])),
            ),
        )
    )


def _lines(path: Path, convert: Callable[[dict[str, Any]], Row]) -> list[Row]:
    """Return the converted lines of a JSONL file, without a last one that a crash cut short."""
    found = []
    for number, line in read_json_lines(path, ConfigError, partial="skip"):
        try:
            found.append(convert(as_mapping(line, "the line")))
        except (KeyError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ConfigError(f"{path}, line {number}: {reason}") from None
    return found


def write_efficiency(efficiency: Efficiency, path: Path) -> None:
    """Write efficiencies as JSON."""
    try:
        path.write_text(json_text(dataclasses.asdict(efficiency), indent=2) + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def read_efficiency(path: Path) -> Efficiency:
    """Read the efficiencies in a file of ``write_efficiency``; missing figures keep their default.

    Raises:
        ConfigError: the file cannot be read, or a figure is unknown or not positive.
    """
    values = read_json(path, ConfigError)
    known = {field.name for field in dataclasses.fields(Efficiency)}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no efficiencies: expected a JSON object")
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{path}: unknown figure {name!r}.{did_you_mean(name, known)}")
        may_be_zero = name.endswith("_seconds") or name == "spread"
        if name == "source":
            is_valid = isinstance(value, str)
        else:
            is_valid = type(value) in (int, float) and is_finite(value)
            is_valid = is_valid and (value > 0 or (may_be_zero and value == 0))
        if not is_valid:
            expected = "a text" if name == "source" else "a positive number"
            raise ConfigError(f"{path}: {name} must be {expected}, got {shorten(value)}")
    return Efficiency(**values)
