"""The work of a trace: FLOPs of sampling and of training, by chunk sizes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from delethink.carryover import name_of
from delethink.chunking import ChunkSpec
from delethink.cost.shape import Mixer, ModelShape
from delethink.errors import ConfigError, UserError

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


class Cut(NamedTuple):
    """How thinking is cut, as numbers or arrays of them: what decides the cost of a rule.

    Args:
        context_size: thinking tokens that a context holds (C); infinite for LongCoT.
        carryover_size: thinking tokens carried over a boundary (m).
        outside: tokens of the head that come on top of both (the variant ``head_outside``).
        fixed_head: tokens at the start of every later context that never change (the head), so
            that a cache of prefixes has them.
    """

    context_size: Numbers
    carryover_size: Numbers
    outside: Numbers = 0
    fixed_head: Numbers = 0

    @classmethod
    def of(cls, spec: ChunkSpec) -> Cut:
        """The cut of a rule; one with a single chunk never carries.

        Raises:
            ConfigError: a carryover or a boundary that the closed form does not cover.
        """
        if spec.is_longcot:
            return LONGCOT
        policy, size = spec.effective_carryover, spec.carryover_size
        if spec.boundary is not None:
            raise ConfigError(
                "cost estimates cover chunks without early boundaries: got the boundary "
                f"{name_of(spec.boundary)!r}; leave it out"
            )
        carried = policy.carried_length(size)
        if carried is None:
            raise ConfigError(
                "cost estimates cover carryovers of a constant length: the length of "
                f"{name_of(policy)!r} varies or is unknown (Carryover.carried_length)"
            )
        if carried.total > spec.context_size:
            raise ConfigError(
                f"cost estimates cover carryovers of at most context_size={spec.context_size} "
                f"tokens: {name_of(policy)!r} carries {carried.total}; lower carryover_size or "
                "head_size"
            )
        outside = max(0, carried.total - size)
        return cls(spec.context_size, carried.total - outside, outside, carried.fixed)


LONGCOT = Cut(np.inf, 0)


@dataclass(frozen=True)
class Chunks:
    """The chunks of traces, those of one size together.

    The last axis is: the first chunk of the trace that comes first in its group, that of the
    others, full later chunks, the last one.

    Args:
        count: how many chunks of a size a trace has, on average over its group.
        prompt: tokens of the context before its first new token.
        new: tokens sampled in it.
        cached: tokens of the prompt that a cache of prefixes has.
    """

    count: Floats
    prompt: Floats
    new: Floats
    cached: Floats

    @property
    def per_trace(self) -> Floats:
        """Chunks of a trace."""
        return np.asarray(self.count.sum(-1))


CACHE_BLOCK = 16  # tokens: prefixes are found in whole blocks of the cache (vLLM's default size)


def cut_traces(
    thinking: Numbers, query: Numbers, cut: Cut, group: Numbers = 1, prefix_cache: bool = True
) -> Chunks:
    """The chunks of traces with ``thinking`` sampled tokens each.

    The first chunk has up to C new tokens after the query, a later one C - m after query and
    carryover; the last one has what is left.

    Args:
        thinking: sampled tokens of a trace, at least 1.
        query: tokens of the query (|q|).
        cut: how thinking is cut.
        group: traces of the same query (G): all but one find it in the cache, and every later chunk
            finds query and head there.
        prefix_cache: whether there is such a cache.
    """
    parts = np.broadcast_arrays(thinking, query, *cut, group)
    thinking, query, context, carry, outside, head, group = (np.asarray(p, float) for p in parts)
    first = np.minimum(thinking, context)
    rest = thinking - first
    step = np.where(np.isinf(context), 1.0, context - carry)  # new tokens of a full later chunk
    full = np.floor(rest / step)
    last = rest - full * step
    later = query + carry + outside
    shared, kept = (query - 1, query + head) if prefix_cache else (0 * query, 0 * query)
    nothing, in_blocks = 0 * query, CACHE_BLOCK * np.floor(kept / CACHE_BLOCK)
    return Chunks(
        count=np.stack([1 / group, 1 - 1 / group, full, (last > 0).astype(float)], -1),
        prompt=np.stack([query, query, later, later], -1),
        new=np.stack([first, first, step, np.maximum(last, 1.0)], -1),
        cached=np.stack(
            [nothing, CACHE_BLOCK * np.floor(shared / CACHE_BLOCK), in_blocks, in_blocks], -1
        ),
    )


def prefill_flops(shape: ModelShape, chunks: Chunks) -> Floats:
    """FLOPs of a trace's prefills: queries, and what is carried over each boundary, encoded again.

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
