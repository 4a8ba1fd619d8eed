"""Time of sampling in seconds: a roofline model with efficiencies.

A decoding step moves the weights and the batch's caches and computes one token per sequence. It
takes the longer of the two, plus a constant. A batch lasts as long as its longest trace. If not all
caches fit in memory, traces wait for a free slot.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from delethink.cost.flops import Chunks, FloatArray, Numbers, decode_flops, prefill_flops
from delethink.cost.hardware import Accelerator, Efficiency
from delethink.cost.memory import cache_bytes, read_bytes
from delethink.cost.shape import ModelShape

_POINTS = (np.arange(8) + 0.5) / 8  # positions within a chunk at which decoding is evaluated


class SamplingTime(NamedTuple):
    """Time for an engine to sample its part of a batch."""

    seconds: FloatArray  # total, prefills included
    prefill: FloatArray  # seconds of prefills
    steps: FloatArray  # decoding steps
    concurrent: FloatArray  # traces sampled at once
    compute_bound: FloatArray  # fraction of the decoded tokens in steps bound by compute


def moved_weight_bytes(shape: ModelShape, batch: Numbers, dtype_bytes: int) -> FloatArray:
    """Return the bytes of weights that a decoding step reads.

    Of E experts with k per token, a batch of b tokens reads each one with probability
    1 - (1 - k/E)^b, if the router's choices are independent and uniform.
    """
    embedding = 0 if shape.tied_embeddings else shape.head_weights  # only single rows are read
    rows = embedding + shape.row_parameters
    total = np.full_like(np.asarray(batch, float), shape.parameters - shape.expert_weights - rows)
    for part, count in shape.feed_forwards:
        if part.experts:
            chosen = 1 - (1 - part.experts_per_token / part.experts) ** np.asarray(batch, float)
            total = total + count * part.experts * part.expert_weights * chosen
    return total * dtype_bytes


def decode_steps(
    mean: Numbers, longest: Numbers, traces: Numbers, concurrent: Numbers
) -> FloatArray:
    """Return the decoding steps until the last trace of an engine has ended.

    With all traces at once: the tokens of the longest. Otherwise free slots are refilled, and the
    drain at the end takes about the difference between the longest and the mean trace.
    """
    waiting = traces * np.asarray(mean) / concurrent
    drain = (np.asarray(longest) - mean) * (1 - 1 / np.asarray(concurrent, float))
    return np.where(concurrent >= traces, longest, np.maximum(longest, waiting + drain))


def sampling_time(
    shape: ModelShape,
    chunks: Chunks,
    longest: Numbers,
    traces: Numbers,
    room: Numbers,
    device: Accelerator,
    efficiency: Efficiency,
    parallel: int = 1,
    sequences: int | None = None,
) -> SamplingTime:
    """Return the time for one engine to sample its traces, with ``room`` bytes for caches.

    Axis -2 of ``chunks`` holds the equally likely traces of a distribution, and ``longest`` is the
    expected number of tokens of the longest trace. An engine samples at most ``sequences`` of them
    at once. Communication between the ``parallel`` devices of an engine is not counted.
    """
    size = device.dtype_bytes
    tokens = chunks.count * chunks.new
    mean = tokens.sum(-1).mean(-1)
    context = chunks.prompt[..., None] + chunks.new[..., None] * _POINTS
    caches = cache_bytes(shape, context, size)
    per_trace = (tokens * caches.mean(-1)).sum(-1).mean(-1) / mean  # averaged over its tokens
    most = traces if sequences is None else np.minimum(traces, sequences)
    concurrent = np.clip(np.floor(room / per_trace), 1, most)
    steps = decode_steps(mean, longest, traces, concurrent)
    batch = traces * mean / steps  # average traces per step
    weights = moved_weight_bytes(shape, batch, size) / batch
    moved = weights[..., None, None, None] + read_bytes(shape, context, size)
    compute = decode_flops(shape, context - 1, context)
    moving = moved / (device.bandwidth * parallel * efficiency.bandwidth)
    computing = compute / (device.peak_flops * parallel * efficiency.decode)
    weight = tokens[..., None] / len(_POINTS)
    decode = (weight * np.maximum(moving, computing)).sum((-1, -2)).mean(-1) * traces
    bound = (weight * (computing > moving)).sum((-1, -2)).mean(-1) / mean
    rate = device.peak_flops * parallel * efficiency.prefill
    prefill = prefill_flops(shape, chunks).mean(-1) * traces / rate
    overhead = steps * efficiency.step_seconds + traces * mean * efficiency.token_seconds
    return SamplingTime(decode + prefill + overhead, prefill, steps, concurrent, bound)
