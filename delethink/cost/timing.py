"""Seconds: sampling, training, new weights. A roofline with measured efficiencies.

One decoding step moves the weights and the batch's caches and computes a token for each sequence:
it takes the longer of the two, and a constant. A batch lasts as long as its longest trace; where
its caches do not fit side by side, traces wait for a place.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from delethink.cost.flops import Chunks, Floats, Numbers, decode_flops, prefill_flops
from delethink.cost.hardware import Accelerator, Efficiency
from delethink.cost.memory import cache_bytes, weight_bytes
from delethink.cost.shape import ModelShape

_POINTS = (np.arange(8) + 0.5) / 8  # where a chunk's decoding is looked at


class Sampling(NamedTuple):
    """Seconds of sampling one engine's share of a batch, and what bounds them.

    Args:
        seconds: in all.
        prefill: of them, for prefills.
        steps: decoding steps.
        concurrent: traces side by side.
        compute_bound: share of the decoded tokens whose step computes longer than it moves.
    """

    seconds: Floats
    prefill: Floats
    steps: Floats
    concurrent: Floats
    compute_bound: Floats


def moved_weight_bytes(shape: ModelShape, batch: Numbers, dtype_bytes: int) -> Floats:
    """Bytes of the weights that a decoding step reads: of the experts, those that a token chose.

    With E experts and k a token, each is chosen by a batch of b with probability 1 - (1 - k/E)^b,
    if choices are independent and even.
    """
    embedding = 0 if shape.tied_embeddings else shape.head_weights  # rows are looked up
    total = np.full_like(
        np.asarray(batch, float), shape.parameters - shape.expert_weights - embedding
    )
    for part, count in shape.feed_forwards:
        if part.experts:
            chosen = 1 - (1 - part.experts_per_token / part.experts) ** np.asarray(batch, float)
            total = total + count * part.experts * part.expert_weights * chosen
    return total * dtype_bytes


def mean_cache_bytes(shape: ModelShape, chunks: Chunks, dtype_bytes: int) -> Floats:
    """Bytes that a trace keeps in the cache, on average over its tokens."""
    middle = chunks.prompt[..., None] + chunks.new[..., None] * _POINTS
    tokens = chunks.count * chunks.new
    kept = cache_bytes(shape, middle, dtype_bytes).mean(-1)
    return np.asarray((tokens * kept).sum(-1) / tokens.sum(-1))


def decode_steps(mean: Numbers, longest: Numbers, traces: Numbers, concurrent: Numbers) -> Floats:
    """Decoding steps until the last trace of an engine's share has ended.

    All side by side: as many as the longest trace has tokens. Else places are refilled as they come
    free, and the drain at the end is about as long as the longest trace is longer than the mean.
    """
    waiting = traces * np.asarray(mean) / concurrent
    drain = (np.asarray(longest) - mean) * (1 - 1 / np.asarray(concurrent, float))
    return np.where(concurrent >= traces, longest, np.maximum(longest, waiting + drain))


def sampling_seconds(
    shape: ModelShape,
    chunks: Chunks,
    longest: Numbers,
    traces: Numbers,
    room: Numbers,
    device: Accelerator,
    efficiency: Efficiency,
    parallel: int = 1,
) -> Sampling:
    """Seconds until one engine has sampled its traces.

    Args:
        shape: the model.
        chunks: the chunks of a trace; axis -2 is the traces of a distribution, equally likely.
        longest: tokens that the longest of the traces is expected to have.
        traces: how many traces the engine samples.
        room: bytes for caches.
        device: what it runs on.
        efficiency: how much of the device it reaches.
        parallel: devices that an engine is spread over; what they say to each other is left out.
    """
    size = device.dtype_bytes
    tokens = (chunks.count * chunks.new).sum(-1)
    mean = tokens.mean(-1)
    per_trace = (mean_cache_bytes(shape, chunks, size) * tokens).mean(-1) / mean
    concurrent = np.clip(np.floor(room / per_trace), 1, traces)
    steps = decode_steps(mean, longest, traces, concurrent)
    batch = traces * mean / steps  # traces in a step, on average
    weights = moved_weight_bytes(shape, batch, size) / batch
    context = chunks.prompt[..., None] + chunks.new[..., None] * _POINTS
    moved = weights[..., None, None, None] + cache_bytes(shape, context, size)
    compute = decode_flops(shape, context - 1, context)
    moving = moved / (device.bandwidth * parallel * efficiency.bandwidth)
    computing = compute / (device.peak_flops * parallel * efficiency.decode)
    weight = (chunks.count * chunks.new)[..., None] / len(_POINTS)
    decode = (weight * np.maximum(moving, computing)).sum((-1, -2)).mean(-1) * traces
    bound = (weight * (computing > moving)).sum((-1, -2)).mean(-1) / mean
    rate = device.peak_flops * parallel * efficiency.prefill
    prefill = prefill_flops(shape, chunks).mean(-1) * traces / rate
    overhead = steps * efficiency.step_seconds + traces * mean * efficiency.token_seconds
    return Sampling(decode + prefill + overhead, prefill, steps, concurrent, bound)


def update_seconds(shape: ModelShape, device: Accelerator, devices: int) -> float:
    """Seconds of Adam's update: it reads and writes 16 bytes a weight."""
    return 2 * 16 * shape.parameters / (device.bandwidth * devices)


def new_weights_seconds(shape: ModelShape, device: Accelerator) -> float:
    """Seconds until an engine has the new weights over the link."""
    return weight_bytes(shape, device.dtype_bytes) / device.link
