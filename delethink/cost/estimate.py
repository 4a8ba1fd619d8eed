"""The whole estimate: what a method costs for a model, a length of thinking, a device and a job."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from delethink.cost.flops import Cut, Floats, Numbers, cut_traces, sampling_flops, training_flops
from delethink.cost.hardware import Accelerator, Efficiency
from delethink.cost.memory import (
    cache_bytes,
    longest_context,
    longest_thinking,
    training_bytes,
    weight_bytes,
)
from delethink.cost.shape import ModelShape
from delethink.cost.timing import new_weights_seconds, sampling_seconds, update_seconds
from delethink.errors import ConfigError, ModelError

MAX_LENGTHS = 256  # equally likely lengths that stand for a distribution


@dataclass(frozen=True)
class Job:
    """A reinforcement-learning run, as far as its cost goes.

    Args:
        query: tokens of a query (|q|).
        group: traces of a query (G).
        prompts: queries of a step.
        steps: training steps.
        gpus: devices; they sample and train in turns.
        parallel: devices that one engine is spread over; ``None``: as few as the model needs.
        extra_passes: forward passes of training beyond the one: activations computed again, and
            log-probs under the old weights.
        micro_tokens: the most tokens in one forward pass of training, if chunks are shorter.
        prefix_cache: whether the engine keeps prefixes that prompts share.

    Raises:
        ConfigError: a figure that makes no sense.
    """

    query: int = 256
    group: int = 8
    prompts: int = 128
    steps: int = 1000
    gpus: int = 8
    parallel: int | None = None
    extra_passes: float = 2.0
    micro_tokens: int = 32_768
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        counts = ("query", "group", "prompts", "steps", "gpus", "micro_tokens")
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.parallel is not None and not 1 <= self.parallel <= self.gpus:
            raise ConfigError(
                f"an engine can be spread over 1 to {self.gpus} GPUs, got {self.parallel}"
            )

    @property
    def traces(self) -> int:
        """Traces of a step."""
        return self.prompts * self.group


class Lengths(NamedTuple):
    """How long traces think: equally likely lengths on the last axis, and a batch's longest.

    Args:
        values: tokens, [..., T].
        longest: tokens that the longest trace of an engine's batch is expected to have, [...].
    """

    values: Floats
    longest: Floats

    @property
    def mean(self) -> Floats:
        """Mean thinking tokens of a trace."""
        return np.asarray(self.values.mean(-1))

    @classmethod
    def constant(cls, thinking: Numbers) -> Lengths:
        """Every trace as long as every other."""
        thinking = np.asarray(thinking, float)
        return cls(thinking[..., None], thinking)

    @classmethod
    def empirical(cls, seen: Numbers, batch: int) -> Lengths:
        """Lengths as they were seen; the longest of ``batch`` draws has (i/S)^batch below it."""
        ordered = np.sort(np.asarray(seen, float).ravel())
        below = np.arange(ordered.size + 1) / ordered.size
        longest = float(ordered @ np.diff(below**batch))
        if ordered.size > MAX_LENGTHS:
            edges = np.linspace(0, ordered.size, MAX_LENGTHS + 1).astype(int)
            ordered = np.add.reduceat(ordered, edges[:-1]) / np.diff(edges)
        return cls(ordered, np.asarray(longest))


@dataclass(frozen=True)
class Cost:
    """What a method costs. Of a trace unless said; arrays where the question was one.

    Args:
        thinking: sampled tokens.
        chunks: how many.
        sampling_flops: prefills and decoding.
        training_flops: forward and backward, extra passes included.
        cache_bytes: the most its cache holds, for the longest trace.
        training_bytes: the most a training device holds.
        concurrent: traces that an engine's memory takes side by side.
        sampling_seconds: of a step.
        prefill_seconds: of them, for prefills.
        training_seconds: of a step, gradients and the optimizer.
        sync_seconds: of a step, until the engines have new weights.
        compute_bound: share of the decoded tokens whose step is bound by compute, not by memory.
        gpus: devices.
        traces: of a step.
        steps: of the run.
    """

    thinking: Floats
    chunks: Floats
    sampling_flops: Floats
    training_flops: Floats
    cache_bytes: Floats
    training_bytes: Floats
    concurrent: Floats
    sampling_seconds: Floats
    prefill_seconds: Floats
    training_seconds: Floats
    sync_seconds: float
    compute_bound: Floats
    gpus: int
    traces: int
    steps: int

    @property
    def flops(self) -> Floats:
        """Of sampling and training."""
        return self.sampling_flops + self.training_flops

    @property
    def step_seconds(self) -> Floats:
        """Of a step."""
        return self.sampling_seconds + self.training_seconds + self.sync_seconds

    @property
    def gpu_hours(self) -> Floats:
        """Of the run."""
        return self.step_seconds * self.steps * self.gpus / 3600

    @property
    def tokens_per_second(self) -> Floats:
        """Sampled tokens a second and device, while sampling."""
        return self.traces * self.thinking / self.sampling_seconds / self.gpus

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, with the sums."""
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
    job: Job | None = None,
) -> Cost:
    """What a way of cutting thinking costs.

    Vectorised: lengths [..., T] and the cut's parts [...] are broadcast against each other. Where a
    single trace's cache does not fit, times are NaN and ``concurrent`` is 0.

    Raises:
        ModelError: the model itself does not fit on the devices.
    """
    efficiency, job = efficiency or Efficiency(), job or Job()
    parallel = job.parallel or engine_size(shape, device, efficiency, job.gpus)
    room = engine_room(shape, device, efficiency, parallel)
    share = -(-job.traces * parallel // job.gpus)  # of an engine, rounded up
    parts = Cut(*(np.asarray(part)[..., None] for part in cut))
    chunks = cut_traces(lengths.values, job.query, parts, job.group, job.prefix_cache)
    context = longest_context(lengths.longest, job.query, cut)
    largest = cache_bytes(shape, context, device.dtype_bytes)
    sampling = sampling_seconds(
        shape, chunks, lengths.longest, share, room, device, efficiency, parallel
    )
    fits = largest <= room
    flops = training_flops(shape, chunks, extra_passes=job.extra_passes).mean(-1)
    passes = chunks.per_trace.mean(-1) * efficiency.pass_seconds
    rate = device.peak_flops * efficiency.training
    training = job.traces / job.gpus * (flops / rate + passes)
    mean = np.broadcast_to(lengths.mean, fits.shape)
    return Cost(
        thinking=mean,
        chunks=chunks.per_trace.mean(-1),
        sampling_flops=sampling_flops(shape, chunks).mean(-1),
        training_flops=flops,
        cache_bytes=largest,
        training_bytes=training_bytes(
            shape, np.maximum(context, job.micro_tokens), job.gpus, device.dtype_bytes
        ),
        concurrent=np.where(fits, sampling.concurrent, 0),
        sampling_seconds=np.where(fits, sampling.seconds, np.nan),
        prefill_seconds=np.where(fits, sampling.prefill, np.nan),
        training_seconds=training + update_seconds(shape, device, job.gpus),
        sync_seconds=new_weights_seconds(shape, device),
        compute_bound=sampling.compute_bound,
        gpus=job.gpus,
        traces=job.traces,
        steps=job.steps,
    )


def engine_room(
    shape: ModelShape, device: Accelerator, efficiency: Efficiency, parallel: int
) -> float:
    """Bytes that an engine over ``parallel`` devices has for caches."""
    usable = device.memory * parallel * efficiency.cache_share
    return usable - weight_bytes(shape, device.dtype_bytes)


def engine_size(shape: ModelShape, device: Accelerator, efficiency: Efficiency, gpus: int) -> int:
    """The fewest devices, a power of two, whose memory is more than half free beside the weights.

    Raises:
        ModelError: not even all of them hold the weights.
    """
    size, weights = 1, weight_bytes(shape, device.dtype_bytes)
    while size < gpus and device.memory * size * efficiency.cache_share < 2 * weights:
        size = min(2 * size, gpus)
    if engine_room(shape, device, efficiency, size) <= 0:
        raise ModelError(
            f"{shape.name} does not fit: its weights take {weights / 1e9:.0f} GB, and "
            f"{gpus} x {device.name} have {gpus * device.memory / 1e9:.0f} GB, of which "
            f"{efficiency.cache_share:.0%} are for weights and caches"
        )
    return size


def longest_that_fits(
    shape: ModelShape, device: Accelerator, efficiency: Efficiency, job: Job
) -> float:
    """The longest thinking of a single trace in one context that an engine's memory holds."""
    parallel = job.parallel or engine_size(shape, device, efficiency, job.gpus)
    room = engine_room(shape, device, efficiency, parallel)
    return longest_thinking(shape, job.query, room, device.dtype_bytes)


def interval(
    shape: ModelShape,
    lengths: Lengths,
    cut: Cut,
    device: Accelerator,
    efficiency: Efficiency | None = None,
    job: Job | None = None,
    draws: int = 200,
    seed: int = 0,
) -> tuple[float, float]:
    """The 5 % and 95 % quantiles of a run's GPU-hours, by sampling what is not known.

    Each efficiency is drawn from a log-normal distribution of the measurement's spread, and the
    lengths of a step from their distribution.
    """
    efficiency, job = efficiency or Efficiency(), job or Job()
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
        hours.append(float(estimate(shape, again, cut, device, drawn, job).gpu_hours))
    low, high = np.quantile(hours, [0.05, 0.95])
    return float(low), float(high)
