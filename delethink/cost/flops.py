"""FLOPs of a forward pass: exact sums over positions, vectorised.

Letters: a, b are positions in a context, counted from 0; a pass works on the tokens a..b-1 with a
cache of the a tokens before them. ``docs/cost.md`` has every formula on one page.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from delethink.cost.shape import Mixer, ModelShape

Floats = NDArray[np.float64]
Numbers = Any  # what numpy broadcasts: a number or an array of them


class Accounting(str, Enum):
    """What is counted as work."""

    TRUE = "true"  # causal: a query works with the keys that it may see, and no others
    MASKED = "masked"  # every query with every key, as kernels that mask and torch's counter do
    PAPER = "paper"  # the paper's: verl's counter, 6 N s + 12 L d s^2, embedding and mask counted


def visible_pairs(start: Numbers, stop: Numbers, window: int | None) -> Floats:
    """Pairs of a query at a position in ``start..stop-1`` and a key that it may look at.

    The sum over positions p of min(p + 1, W): a query sees itself, what went before, and no more
    than its window.
    """
    return np.asarray(_pairs_before(stop, window) - _pairs_before(start, window))


def _pairs_before(stop: Numbers, window: int | None) -> Floats:
    """The sum over positions p < stop of min(p + 1, W)."""
    stop = np.asarray(stop, float)
    ramp = stop if window is None else np.minimum(stop, window)
    full = 0 if window is None else (stop - ramp) * window
    return np.asarray(ramp * (ramp + 1) / 2 + full)


def forward_flops(
    shape: ModelShape,
    start: Numbers,
    stop: Numbers,
    heads: Numbers,
    accounting: Accounting = Accounting.TRUE,
) -> Floats:
    """FLOPs of one pass over the tokens ``start..stop-1``, as prefill and training do it.

    2 N (b - a) for the weights, pairs times the FLOPs of a pair for attention, and 2 V d for each
    of the ``heads`` positions that logits are made for.

    Args:
        shape: the model.
        start: tokens that are cached already.
        stop: the length of the context after the pass.
        heads: positions whose logits are needed.
        accounting: whether pairs that the mask hides are counted.
    """
    tokens = np.asarray(stop, float) - start
    total = 2.0 * shape.token_weights * tokens + 2.0 * shape.head_weights * np.asarray(heads)
    for mixer, count in shape.mixers:
        pairs = _pairs(mixer, start, stop, accounting)
        total = total + count * (mixer.pair_flops * pairs + mixer.token_flops * tokens)
    return np.asarray(total, float)


def _pairs(mixer: Mixer, start: Numbers, stop: Numbers, accounting: Accounting) -> Floats:
    if accounting is Accounting.MASKED:
        return np.asarray((np.asarray(stop, float) - start) * stop)
    return visible_pairs(start, stop, mixer.window)


def decode_flops(shape: ModelShape, start: Numbers, stop: Numbers) -> Floats:
    """FLOPs of decoding one token after another at the positions ``start..stop-1``.

    Each is a pass over one token, with logits. One query at a time hides no pair, so the accounting
    makes no difference; latent attention works in its latent space.
    """
    tokens = np.asarray(stop, float) - start
    total = 2.0 * (shape.token_weights + shape.head_weights) * tokens
    for mixer, count in shape.mixers:
        pairs = visible_pairs(start, stop, mixer.window)
        total = total + count * (mixer.decode_pair_flops * pairs + mixer.token_flops * tokens)
    return np.asarray(total, float)
