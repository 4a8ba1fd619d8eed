"""Fits efficiencies to measured times, and says how well they fit."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from delethink.chunking import ChunkSpec
from delethink.cost.estimate import Job, Lengths, estimate
from delethink.cost.flops import Cut, Floats
from delethink.cost.hardware import Accelerator, Efficiency
from delethink.cost.shape import ModelShape
from delethink.errors import ConfigError, MissingExtraError, did_you_mean

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


WARM_UP = 1  # steps that are left out: the first one pays for what is made once


def read_lengths(path: Path) -> Floats:
    """Thinking lengths of traces, in tokens.

    Args:
        path: a run directory, or a text file with a length on each line, or ``length,count``.

    Raises:
        ConfigError: it holds none.
    """
    if path.is_dir():
        seen = [record["length"] for records in _traces(path).values() for record in records]
    else:
        seen = _histogram(path)
    if not seen:
        raise ConfigError(f"{path} holds no lengths of traces")
    return np.array(seen, float)


def _histogram(path: Path) -> list[float]:
    seen: list[float] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read lengths from {path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        length, _, count = line.partition(",")
        try:
            times = int(count or 1)
            if float(length) < 1 or times < 0:
                raise ValueError
            seen += [float(length)] * times
        except (ValueError, OverflowError):
            raise ConfigError(
                f"{path}, line {number}: a length of at least 1, or length,count: got {line!r}"
            ) from None
    return seen


def read_model(path: Path) -> str:
    """The model of a run."""
    return str(_config(path)["model"])


def read_steps(path: Path) -> list[Measurement]:
    """The timed steps of a run directory, the first one left out.

    Sampling and training are separate measurements, because they may run on different devices.

    Raises:
        ConfigError: it is no run directory, or no step was timed.
        MissingExtraError: the YAML reader is not installed.
    """
    config, traces = _config(path), _traces(path)
    metrics = {m["step"]: m for m in _lines(path / "metrics.jsonl")}
    timed = sorted(step for step in metrics if step in traces)[WARM_UP:]
    if not timed:
        raise ConfigError(
            f"{path} has no step to calibrate on: {len(metrics)} steps in metrics.jsonl, the first "
            "of which is left out"
        )
    return [m for step in timed for m in _measurements(config, traces[step], metrics[step])]


def _measurements(
    config: dict[str, Any], traces: list[dict[str, Any]], metrics: dict[str, Any]
) -> Iterator[Measurement]:
    training, cut = config["training"], Cut.of(_spec(config["thinking"]))
    if training.get("num_iterations", 1) > 1 or training.get("steps_per_generation"):
        raise ConfigError(
            "a run with several optimizer steps for each batch of traces cannot be calibrated on: "
            "its steps are not alike"
        )
    lengths = np.array([trace["length"] for trace in traces], float)
    group = training["num_generations"]
    engines = max(1, round(config["num_workers"] * config["gpus_per_worker"]))
    job = Job(
        query=round(np.mean([len(trace["query_ids"]) for trace in traces])),
        group=group,
        prompts=max(1, len(traces) // group),
        steps=1,
        gpus=engines,
        extra_passes=float(training.get("gradient_checkpointing", False)),
        prefix_cache=config["engine"] == "vllm",
    )
    seen = Lengths.empirical(lengths, -(-len(lengths) // engines))
    seconds = metrics["seconds_sampling"], metrics["seconds_training"]
    yield Measurement(seen, cut, job, seconds[0], None)
    alone = Job(**{**job.__dict__, "gpus": 1})
    yield Measurement(seen, cut, alone, None, seconds[1])


def _spec(thinking: dict[str, Any]) -> ChunkSpec:
    for key in ("carryover", "boundary"):
        if thinking.get(key) is not None:
            raise ConfigError(
                f"a run with a {key} of its own ({thinking[key]['name']}) cannot be calibrated on: "
                "the estimate covers heads and tails"
            )
    return ChunkSpec(**thinking)


def _config(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:
        raise MissingExtraError("yaml", "train") from None
    file = path / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not a run directory: {error}") from None
    if not isinstance(config, dict) or not {"model", "thinking", "training"} <= config.keys():
        raise ConfigError(f"{file} is not the recipe of a run")
    return config


def _traces(path: Path) -> dict[int, list[dict[str, Any]]]:
    """Records of traces by step."""
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for file in sorted((path / "traces").glob("step_*.jsonl")):
        found[int(file.stem.removeprefix("step_"))] += _lines(file)
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; one cut short by a crash is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def write_efficiency(efficiency: Efficiency, path: Path) -> None:
    """Writes JSON."""
    try:
        path.write_text(json.dumps(dataclasses.asdict(efficiency), indent=2) + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def read_efficiency(path: Path) -> Efficiency:
    """Reads what ``write_efficiency`` wrote; a figure that is left out keeps its default.

    Raises:
        ConfigError: no such file, an unknown figure, or one that is not positive.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read efficiencies from {path}: {error}") from None
    known = {field.name for field in dataclasses.fields(Efficiency)}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no efficiencies: a JSON object is needed")
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{path}: unknown figure {name!r}.{did_you_mean(name, known)}")
        may_be_zero = name.endswith("_seconds") or name == "spread"
        if name != "source" and not (
            isinstance(value, int | float) and (value > 0 or (may_be_zero and value == 0))
        ):
            raise ConfigError(f"{path}: {name} must be a positive number, got {value!r}")
    return Efficiency(**values)
