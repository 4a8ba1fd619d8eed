"""What a run measured, read back: lengths of its traces, and steps that were timed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from delethink.cost.calibrate import Measurement
from delethink.cost.chunks import Cut
from delethink.cost.estimate import Job, Lengths
from delethink.cost.flops import Floats
from delethink.errors import ConfigError, MissingExtraError
from delethink.rule import ChunkSpec

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
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"cannot read lengths from {path}: {problem}") from None
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
    for key in ("carryover", "border"):
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
    except (OSError, yaml.YAMLError) as problem:
        raise ConfigError(f"{path} is not a run directory: {problem}") from None
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
    except (OSError, ValueError) as problem:
        raise ConfigError(f"cannot read {path}: {problem}") from None
