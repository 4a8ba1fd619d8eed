"""The estimate: cost of a method, and the lengths beyond which Delethink is cheaper."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from delethink.cost.flops import (
    LONGCOT,
    Cut,
    FloatArray,
    Numbers,
    cut_traces,
    sampling_flops,
    training_flops,
)
from delethink.cost.hardware import Accelerator, Efficiency
from delethink.cost.memory import (
    cache_bytes,
    longest_context,
    longest_thinking,
    training_bytes,
    weight_bytes,
)
from delethink.cost.shape import ModelShape
from delethink.cost.timing import sampling_time
from delethink.errors import ConfigError, ModelError

MAX_LENGTHS = 256  # equally likely lengths that represent a distribution
MAX_CROSSING_TOKENS = 10_000_000

Curve = Callable[[FloatArray], FloatArray]  # thinking tokens -> cost


@dataclass(frozen=True)
class Workload:
    """A reinforcement-learning run, reduced to the figures that decide its cost.

    Raises:
        ConfigError: a figure is out of range.
    """

    query: int = 256  # tokens per query (|q|)
    group: int = 8  # traces per query (G)
    prompts: int = 128  # queries per step
    steps: int = 1000  # training steps
    gpus: int = 8  # devices; sampling and training alternate on them
    parallel: int | None = None  # devices per engine; ``None``: as few as the model needs
    sequences: int | None = None  # most traces that an engine samples at once; ``None``: as fit
    # forward passes of training beyond the first: recomputed activations, and log-probs under the
    # old weights
    extra_passes: float = 2.0
    micro_tokens: int = 32_768  # most tokens per forward pass of training, unless a chunk is longer
    prefix_cache: bool = True  # whether the engine has a prefix cache

    def __post_init__(self) -> None:
        for name in ("query", "group", "prompts", "steps", "gpus", "micro_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.parallel is not None and not 1 <= self.parallel <= self.gpus:
            raise ConfigError(f"parallel must be from 1 to {self.gpus} GPUs, got {self.parallel}")

    @property
    def traces(self) -> int:
        """Traces per step."""
        return self.prompts * self.group


class Lengths(NamedTuple):
    """Distribution of the thinking lengths of traces."""

    values: FloatArray  # equally likely lengths in tokens, [..., T]
    longest: FloatArray  # expected length of the longest trace in an engine's batch, [...]

    @property
    def mean(self) -> FloatArray:
        """Mean thinking tokens per trace."""
        return np.asarray(self.values.mean(-1))

    @classmethod
    def constant(cls, thinking: Numbers) -> Lengths:
        """Return traces of equal length."""
        thinking = np.asarray(thinking, float)
        return cls(thinking[..., None], thinking)

    @classmethod
    def empirical(cls, seen: Numbers, batch: int) -> Lengths:
        """Return the distribution of observed lengths.

        The maximum of ``batch`` draws from S sorted lengths is at most the i-th with probability
        (i/S)^batch, so ``longest`` is an exact expectation.
        """
        ordered = np.sort(np.asarray(seen, float).ravel())
        below = np.arange(ordered.size + 1) / ordered.size
        longest = float(ordered @ np.diff(below**batch))
        if ordered.size > MAX_LENGTHS:
            edges = np.linspace(0, ordered.size, MAX_LENGTHS + 1).astype(int)
            ordered = np.add.reduceat(ordered, edges[:-1]) / np.diff(edges)
        return cls(ordered, np.asarray(longest))


@dataclass(frozen=True)
class Cost:
    """Cost of a method, per trace unless stated otherwise. Arrays for arrays of lengths."""

    thinking: FloatArray  # sampled tokens
    chunks: FloatArray
    sampling_flops: FloatArray  # FLOPs of prefills and decoding
    training_flops: FloatArray  # FLOPs of forward and backward, extra passes included
    cache_bytes: FloatArray  # peak KV cache of the longest trace
    training_bytes: FloatArray  # peak memory of a training device
    concurrent: FloatArray  # traces that fit in an engine's memory at once
    sampling_seconds: FloatArray  # seconds per step
    prefill_seconds: FloatArray  # part of ``sampling_seconds`` for prefills
    training_seconds: FloatArray  # seconds per step, optimizer included
    sync_seconds: float  # seconds per step for new weights
    compute_bound: FloatArray  # fraction of the decoded tokens in steps bound by compute
    gpus: int
    traces: int  # traces per step
    steps: int

    @property
    def flops(self) -> FloatArray:
        """FLOPs of sampling and training."""
        return self.sampling_flops + self.training_flops

    @property
    def step_seconds(self) -> FloatArray:
        """Seconds per step."""
        return self.sampling_seconds + self.training_seconds + self.sync_seconds

    @property
    def gpu_hours(self) -> FloatArray:
        """GPU-hours of the run."""
        return self.step_seconds * self.steps * self.gpus / 3600

    @property
    def tokens_per_second(self) -> FloatArray:
        """Sampled tokens per second and device, during sampling."""
        return self.traces * self.thinking / self.sampling_seconds / self.gpus

    def as_dict(self) -> dict[str, Any]:
        """Return all figures as plain numbers or lists."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        sums = ("flops", "step_seconds", "gpu_hours", "tokens_per_second")
        fields |= {name: getattr(self, name) for name in sums}
        return {name: np.asarray(value).tolist() for name, value in fields.items()}


def estimate(
    shape: ModelShape,
    lengths: Lengths,
    cut: Cut,
    device: Accelerator,
    efficiency: Efficiency | None = None,
    workload: Workload | None = None,
) -> Cost:
    """Estimate the cost of one way of cutting thinking into chunks.

    Lengths [..., T] and the parts of the cut [...] broadcast against each other. If the cache of a
    single trace does not fit, times are NaN and ``concurrent`` is 0.

    Raises:
        ModelError: the weights do not fit on the devices.
    """
    efficiency, workload = efficiency or Efficiency(), workload or Workload()
    parallel, room = _engine(shape, device, efficiency, workload)
    share = -(-workload.traces * parallel // workload.gpus)  # traces per engine, rounded up
    parts = Cut(*(np.asarray(part)[..., None] for part in cut))
    chunks = cut_traces(
        lengths.values, workload.query, parts, workload.group, workload.prefix_cache
    )
    context = longest_context(lengths.longest, workload.query, cut)
    largest = cache_bytes(shape, context, device.dtype_bytes)
    engine = device, efficiency, parallel, workload.sequences
    sampling = sampling_time(shape, chunks, lengths.longest, share, room, *engine)
    fits = largest <= room
    flops = training_flops(shape, chunks, extra_passes=workload.extra_passes).mean(-1)
    passes = chunks.per_trace.mean(-1) * efficiency.pass_seconds
    rate = device.peak_flops * efficiency.training
    training = workload.traces / workload.gpus * (flops / rate + passes)
    # Adam reads and writes 16 bytes per parameter.
    update = 2 * 16 * shape.parameters / (device.bandwidth * workload.gpus)
    return Cost(
        thinking=np.broadcast_to(lengths.mean, fits.shape),
        chunks=chunks.per_trace.mean(-1),
        sampling_flops=sampling_flops(shape, chunks).mean(-1),
        training_flops=flops,
        cache_bytes=largest,
        training_bytes=training_bytes(
            shape, np.maximum(context, workload.micro_tokens), workload.gpus, device.dtype_bytes
        ),
        concurrent=np.where(fits, sampling.concurrent, 0),
        sampling_seconds=np.where(fits, sampling.seconds, np.nan),
        prefill_seconds=np.where(fits, sampling.prefill, np.nan),
        training_seconds=training + update,
        sync_seconds=weight_bytes(shape, device.dtype_bytes) / device.link,
        compute_bound=sampling.compute_bound,
        gpus=workload.gpus,
        traces=workload.traces,
        steps=workload.steps,
    )


def _engine(
    shape: ModelShape, device: Accelerator, efficiency: Efficiency, workload: Workload
) -> tuple[int, float]:
    """Return the devices per engine and the bytes left for its caches.

    By default, devices are the least power of two whose weights fill at most half of the memory.
    """
    gpus, weights = workload.gpus, weight_bytes(shape, device.dtype_bytes)
    usable = device.memory * efficiency.cache_share
    if workload.parallel:
        return workload.parallel, usable * workload.parallel - weights
    size = 1
    while size < gpus and usable * size < 2 * weights:
        size = min(2 * size, gpus)
    if usable * size <= weights:
        raise ModelError(
            f"{shape.name} does not fit: its weights take {weights / 1e9:.0f} GB, and "
            f"{gpus} x {device.name} have {gpus * device.memory / 1e9:.0f} GB, "
            f"{efficiency.cache_share:.0%} of them for weights and caches; use more --gpus"
        )
    return size, usable * size - weights


def longest_that_fits(
    shape: ModelShape, device: Accelerator, efficiency: Efficiency, workload: Workload
) -> float:
    """Return the longest thinking in one context that fits in an engine's memory, in tokens."""
    _, room = _engine(shape, device, efficiency, workload)
    return longest_thinking(shape, workload.query, room, device.dtype_bytes)


def interval(
    shape: ModelShape,
    lengths: Lengths,
    cut: Cut,
    device: Accelerator,
    efficiency: Efficiency | None = None,
    workload: Workload | None = None,
    draws: int = 200,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 5 % and 95 % quantiles of a run's GPU-hours by Monte Carlo.

    Efficiencies are drawn from log-normal distributions with the measured spread, and the lengths
    of a step from their distribution.
    """
    efficiency, workload = efficiency or Efficiency(), workload or Workload()
    rng = np.random.default_rng(seed)
    hours = []
    for _ in range(draws):
        drawn = dataclasses.replace(
            efficiency,
            **{
                name: getattr(efficiency, name) * float(np.exp(efficiency.spread * rng.normal()))
                for name in ("bandwidth", "decode", "prefill", "training", "token_seconds")
            },
        )
        picked = rng.integers(0, lengths.values.size, lengths.values.size)
        again = Lengths(lengths.values[picked], lengths.longest)
        hours.append(float(estimate(shape, again, cut, device, drawn, workload).gpu_hours))
    low, high = np.quantile(hours, [0.05, 0.95])
    return float(low), float(high)


def crossing(
    longcot: Curve, delethink: Curve, start: int, stop: int = MAX_CROSSING_TOKENS
) -> int | None:
    """Return the length in tokens beyond which Delethink is always cheaper.

    Delethink's cost has a step at each boundary, so the curves may cross several times. The last
    crossing counts.

    Returns:
        The last length at which Delethink is not cheaper; ``start`` if it is cheaper everywhere;
        ``None`` if it is not cheaper at ``stop``.
    """
    grid = np.unique(np.geomspace(start, stop, 4000).round())
    behind = np.flatnonzero(longcot(grid) <= delethink(grid))
    if behind.size == 0:
        return start
    if behind[-1] == grid.size - 1:
        return None
    near = np.arange(grid[behind[-1]], grid[behind[-1] + 1] + 1)
    return int(near[np.flatnonzero(longcot(near) <= delethink(near))[-1]])


class Crossings(NamedTuple):
    """Thinking tokens beyond which Delethink is always cheaper, for each quantity."""

    sampling_flops: int | None
    training_flops: int | None
    step_seconds: int | None


def crossings(
    shape: ModelShape, cut: Cut, device: Accelerator, efficiency: Efficiency, workload: Workload
) -> Crossings:
    """Return the crossings of LongCoT and Delethink from C tokens on."""

    def curve(method: Cut, figure: str) -> Curve:
        def costs(n: FloatArray) -> FloatArray:
            cost = estimate(shape, Lengths.constant(n), method, device, efficiency, workload)
            values = getattr(cost, figure)
            return np.asarray(np.nan_to_num(values, nan=np.inf))  # NaN: does not fit

        return costs

    start = int(cut.context_size)
    return Crossings(
        *(crossing(curve(LONGCOT, f), curve(cut, f), start) for f in Crossings._fields)
    )
