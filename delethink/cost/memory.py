"""Bytes: weights, caches, and what training holds."""

from __future__ import annotations

import numpy as np

from delethink.cost.flops import Cut, Floats, Numbers
from delethink.cost.shape import ModelShape

HEAD_TILE = (4096, 32_768)  # tokens and words of TRL's fused head (trl.kernels.chunked_logprob)


def cache_bytes(shape: ModelShape, tokens: Numbers, dtype_bytes: int = 2, block: int = 1) -> Floats:
    """Bytes that an engine keeps for a sequence of ``tokens``.

    For each layer: the numbers it keeps for a token, for all tokens or for those in its window, and
    its state.

    Args:
        shape: the model.
        tokens: length of the sequence.
        dtype_bytes: bytes of a cached number.
        block: tokens that are kept together; a block that is begun takes its whole place.
    """
    total = np.zeros_like(np.asarray(tokens, float))
    for mixer, count in shape.mixers:
        seen = tokens if mixer.window is None else np.minimum(tokens, mixer.window)
        kept = np.ceil(np.asarray(seen, float) / block) * block
        total = total + count * dtype_bytes * (mixer.cache_numbers * kept + mixer.state_numbers)
    return np.asarray(total, float)


def weight_bytes(shape: ModelShape, dtype_bytes: int = 2) -> float:
    """Bytes of the weights."""
    return float(shape.parameters * dtype_bytes)


def longest_context(thinking: Numbers, query: Numbers, cut: Cut) -> Floats:
    """The longest context that thinking of that length ever needs, in tokens."""
    parts = np.broadcast_arrays(thinking, query, cut.context_size, cut.carryover_size, cut.outside)
    thinking, query, context, carry, outside = (np.asarray(part, float) for part in parts)
    first = np.minimum(thinking, context)
    second = np.minimum(thinking - first, context - carry) + carry + outside
    return np.asarray(query + np.where(thinking > context, np.maximum(first, second), first))


def longest_thinking(shape: ModelShape, query: int, room: float, dtype_bytes: int = 2) -> float:
    """The longest thinking in one context whose cache fits in ``room`` bytes.

    Infinite where the cache does not grow (every layer has a window or a state).

    Returns:
        Tokens; 0 where not even the query fits.
    """
    fits, too_long = query, 2**60
    if cache_bytes(shape, too_long, dtype_bytes) <= room:
        return np.inf
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if cache_bytes(shape, middle, dtype_bytes) <= room:
            fits = middle
        else:
            too_long = middle
    return float(fits - query)


def training_bytes(
    shape: ModelShape,
    tokens: Numbers,
    devices: int = 1,
    dtype_bytes: int = 2,
    by_layer: bool = True,
) -> Floats:
    """The most that a training device holds while it works on ``tokens`` in one pass.

    Weights, gradients and Adam's state, spread over the devices: 16 bytes a parameter (mixed
    precision: 2 + 2 + 4 + 4 + 4; in float32: 4 + 4 + 4 + 4). Then what the backward pass needs of
    each token: in a layer, the six streams around its two norms, what the mixer keeps, and four
    times the width of the feed-forward part (gate, its activation, up, their product). On top
    comes the larger of what passes between two layers' gradients and a tile of the head, which TRL
    works through 4,096 tokens and 32,768 words at a time.

    Args:
        shape: the model.
        tokens: of a pass, padding included.
        devices: that weights and states are spread over.
        dtype_bytes: bytes of an activation.
        by_layer: whether only each layer's input is kept, and the rest computed again.
    """
    tokens, hidden = np.asarray(tokens, float), shape.hidden_size
    layers = [
        6 * hidden + layer.mixer.kept_numbers + 4 * layer.feed_forward.width
        for layer in shape.layers
    ]
    kept = len(layers) * hidden + max(layers) if by_layer else sum(layers)
    passing = tokens * max(layer.feed_forward.width for layer in shape.layers)
    tile = np.minimum(tokens, HEAD_TILE[0]) * HEAD_TILE[1]
    activations = tokens * (kept + 4 * hidden) + np.maximum(passing, tile)
    return np.asarray(16.0 * shape.parameters / devices + dtype_bytes * activations)
