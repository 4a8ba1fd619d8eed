"""The work of a trace: FLOPs of sampling and of training, by chunk sizes."""

from __future__ import annotations

import numpy as np

from delethink.cost.chunks import Chunks, Cut
from delethink.cost.flops import Accounting, Floats, Numbers, decode_flops, forward_flops
from delethink.cost.shape import ModelShape
from delethink.errors import UserError


def prefill_flops(shape: ModelShape, chunks: Chunks) -> Floats:
    """FLOPs of a trace's prefills: queries, and what is carried over each border, encoded again.

    Each makes the logits of one position, those of the chunk's first new token.
    """
    each = forward_flops(shape, chunks.cached, chunks.prompt, 1)
    return np.asarray((chunks.count * each).sum(-1))


def sampling_flops(shape: ModelShape, chunks: Chunks) -> Floats:
    """FLOPs of sampling a trace: its prefills, and a pass for each token but a chunk's last."""
    each = decode_flops(shape, chunks.prompt, chunks.prompt + chunks.new - 1)
    return np.asarray(prefill_flops(shape, chunks) + (chunks.count * each).sum(-1))


def scoring_flops(
    shape: ModelShape, chunks: Chunks, accounting: Accounting = Accounting.TRUE
) -> Floats:
    """FLOPs of one forward pass over a trace's chunks, with logits for the sampled tokens."""
    each = forward_flops(shape, 0, chunks.prompt + chunks.new, chunks.new, accounting)
    return np.asarray((chunks.count * each).sum(-1))


def training_flops(
    shape: ModelShape,
    chunks: Chunks,
    accounting: Accounting = Accounting.TRUE,
    extra_passes: float = 0.0,
) -> Floats:
    """FLOPs of training on a trace: forward, and twice that backward.

    A product of two matrices has two gradients, each a product of the same size.

    Args:
        shape: the model.
        chunks: the trace.
        accounting: whether pairs that the mask hides are counted.
        extra_passes: forward passes beyond the one: 1 for activations that are computed again, 1
            for log-probs under the old weights.
    """
    return np.asarray((3.0 + extra_passes) * scoring_flops(shape, chunks, accounting))


def paper_training_flops(
    shape: ModelShape,
    thinking: Numbers,
    cut: Cut,
    *,
    masked_pairs: bool = True,
    embedding: bool = True,
) -> Floats:
    """Training FLOPs of a trace as the paper counts them (verl's counter; its section 4.3).

    A sequence of s tokens takes 6 N s + 12 L d s^2, with N all weights, the embedding's as well
    (although looking up multiplies nothing), d the query heads' width, and twice the pairs that a
    causal mask leaves. LongCoT is one sequence; Delethink is 1 + (n - C)/(C - m) of C tokens, which
    need not be a whole number. Queries are left out. Without ``masked_pairs`` and ``embedding`` the
    two overcounts go, one by one; every position still has its logits.

    Raises:
        UserError: a model or lengths that this formula does not cover.
    """
    if any(mixer.window is not None or mixer.state_numbers for mixer, _ in shape.mixers) or any(
        mixer.pair_flops != mixer.decode_pair_flops for mixer, _ in shape.mixers
    ):
        raise UserError(
            f"{shape.name}: the paper's accounting covers models of plain softmax attention only; "
            "use --accounting true"
        )
    weights = shape.token_weights + (2 if embedding else 1) * shape.head_weights
    squares = sum(3.0 * count * mixer.pair_flops for mixer, count in shape.mixers)
    squares = squares if masked_pairs else squares / 2

    def sequence(tokens: Numbers) -> Numbers:
        return 6.0 * weights * tokens + squares * np.square(np.asarray(tokens, float))

    thinking, context, carry = (
        np.asarray(x, float)
        for x in np.broadcast_arrays(thinking, cut.context_size, cut.carryover_size)
    )
    if np.any(np.isfinite(context) & (thinking < context)):
        raise UserError("the paper's accounting covers thinking of at least C tokens only")
    whole = np.isinf(context)
    size = np.where(whole, thinking, context)
    count = np.where(whole, 1.0, 1 + (thinking - size) / np.where(whole, 1.0, size - carry))
    return np.asarray(count * sequence(size), float)
