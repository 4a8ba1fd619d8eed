"""Memory in bytes: weights, KV cache, and the peak of training."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from delethink.cost.flops import Cut, FloatArray, Numbers
from delethink.cost.shape import ModelShape

_HEAD_TILE_TOKENS, _HEAD_TILE_WORDS = 4096, 32_768  # trl.kernels.chunked_logprob


def cache_bytes(
    shape: ModelShape, tokens: Numbers, dtype_bytes: int = 2, block: int = 1
) -> FloatArray:
    """Return the bytes of the KV cache of a sequence.

    Each layer holds its values for every token, or for those in its window, and its state. A cache
    block of ``block`` tokens takes its full space also where it is partly filled.
    """
    total = np.zeros_like(np.asarray(tokens, float))
    for mixer, count in shape.mixers:
        seen = tokens if mixer.window is None else np.minimum(tokens, mixer.window)
        kept = np.ceil(np.asarray(seen, float) / block) * block
        total = total + count * dtype_bytes * (mixer.cache_numbers * kept + mixer.state_numbers)
        total = total + count * 4 * mixer.float32_numbers
    return np.asarray(total, float)


def read_bytes(shape: ModelShape, tokens: Numbers, dtype_bytes: int = 2) -> FloatArray:
    """Return the bytes of caches that a decoding step reads for a sequence of ``tokens``.

    Those of the cache, and again those that a layer reads from the cache of an earlier one.
    """
    total = cache_bytes(shape, tokens, dtype_bytes)
    for mixer, count in shape.mixers:
        seen = tokens if mixer.window is None else np.minimum(tokens, mixer.window)
        total = total + count * dtype_bytes * mixer.shared_numbers * np.asarray(seen, float)
    return np.asarray(total, float)


def weight_bytes(shape: ModelShape, dtype_bytes: int = 2) -> float:
    """Return the bytes of the weights."""
    return float(shape.parameters * dtype_bytes)


def longest_context(thinking: Numbers, query: Numbers, cut: Cut) -> FloatArray:
    """Return the longest context of a trace with ``thinking`` sampled tokens, in tokens."""
    parts = np.broadcast_arrays(thinking, query, cut.context_size, cut.carryover_size, cut.outside)
    thinking, query, context, carry, outside = (np.asarray(part, float) for part in parts)
    first = np.minimum(thinking, context)
    second = np.minimum(thinking - first, context - carry) + carry + outside
    return np.asarray(query + np.where(thinking > context, np.maximum(first, second), first))


def longest_thinking(shape: ModelShape, query: int, room: float, dtype_bytes: int = 2) -> float:
    """Return the longest thinking in one context whose cache fits in ``room`` bytes.

    Returns:
        Tokens; 0 if not even the query fits; infinity if the cache does not grow (every layer has a
        window or a state).
    """
    longest = 2**60
    if cache_bytes(shape, longest, dtype_bytes) <= room:
        return np.inf
    too_long = bisect_right(
        range(longest), room, key=lambda tokens: float(cache_bytes(shape, tokens, dtype_bytes))
    )
    return float(max(0, too_long - 1 - query))


def training_bytes(
    shape: ModelShape,
    tokens: Numbers,
    devices: int = 1,
    dtype_bytes: int = 2,
    by_layer: bool = True,
) -> FloatArray:
    """Return the peak memory of a training device for a pass over ``tokens``, in bytes.

    Weights, gradients and Adam's state take 16 bytes per parameter, sharded over the devices: 2 + 2
    + 4 + 4 + 4 in mixed precision, 4 + 4 + 4 + 4 in float32. The backward pass keeps per token and
    layer the six streams around the two norms, the mixer's values, and four times the feed-forward
    width (gate, its activation, up, product). The larger of two terms comes on top: the gradient
    between two layers, or a tile of TRL's fused head (4,096 tokens by 32,768 words).

    ``tokens`` include padding, and ``dtype_bytes`` is the size of an activation. ``by_layer`` keeps
    only the input of each layer and recomputes the rest (gradient checkpointing).
    """
    activations = activation_bytes(shape, tokens, dtype_bytes, by_layer=by_layer)
    return np.asarray(16.0 * shape.parameters / devices + activations)


def activation_bytes(
    shape: ModelShape,
    tokens: Numbers,
    dtype_bytes: int = 2,
    *,
    by_layer: bool = True,
    stream_bytes: int | None = None,
) -> FloatArray:
    """Return the peak memory of a pass over ``tokens`` without weights, in bytes.

    ``stream_bytes`` is the size of a value between layers and around norms, if it differs: autocast
    keeps them in float32, and beside them copies in its own type for the products.
    """
    tokens, hidden = np.asarray(tokens, float), shape.hidden_size
    stream = dtype_bytes if stream_bytes is None else stream_bytes
    copies = 0 if stream_bytes is None else 2 * hidden * dtype_bytes
    layers = [
        6 * hidden * stream
        + copies
        + (layer.mixer.kept_numbers + 4 * layer.feed_forward.width) * dtype_bytes
        for layer in shape.layers
    ]
    kept = len(layers) * hidden * stream + max(layers) if by_layer else sum(layers)
    passing = tokens * max(layer.feed_forward.width for layer in shape.layers)
    tile = np.minimum(tokens, _HEAD_TILE_TOKENS) * _HEAD_TILE_WORDS
    outer = 4 * hidden * stream
    return np.asarray(tokens * (kept + outer) + dtype_bytes * np.maximum(passing, tile))
