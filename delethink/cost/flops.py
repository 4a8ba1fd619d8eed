"""FLOPs of sampling and training, from the sizes of a trace's chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from delethink.carryover import name_of
from delethink.chunking import ChunkSpec
from delethink.cost.shape import ModelShape
from delethink.errors import ConfigError

FloatArray = NDArray[np.float64]
Numbers = Any  # a number or an array of numbers, broadcast by NumPy

CACHE_BLOCK_TOKENS = 16  # vLLM's default block; a prefix cache holds whole blocks


def visible_pairs(
    start: Numbers, stop: Numbers, window: int | None, chunked: bool = False
) -> FloatArray:
    """Return the number of query-key pairs under a causal mask and a window W.

    The queries are at positions ``start`` to ``stop - 1``: the sum over p of min(p + 1, W), or of
    p mod W + 1 if attention is ``chunked``.
    """

    def pairs_before(position: Numbers) -> FloatArray:
        position = np.asarray(position, float)
        if window is None:
            return np.asarray(position * (position + 1) / 2)
        ramp = position % window if chunked else np.minimum(position, window)
        full = (position - ramp) * ((window + 1) / 2 if chunked else window)
        return np.asarray(ramp * (ramp + 1) / 2 + full)

    return np.asarray(pairs_before(stop) - pairs_before(start))


def _flat_flops(shape: ModelShape) -> float:
    """Return the FLOPs of one token but for mixing and the head: 2 N, and products beside N."""
    beside = sum(part.token_flops * count for part, count in shape.feed_forwards)
    return 2.0 * shape.token_weights + beside


def forward_flops(
    shape: ModelShape, start: Numbers, stop: Numbers, heads: Numbers, masked: bool = False
) -> FloatArray:
    """Return the FLOPs of one forward pass over positions ``start`` to ``stop - 1``.

    2 N (stop - start) for the weights, the few products beside them, pairs times FLOPs per pair for
    attention, and 2 V d for each position with logits, of which there are ``heads``. The cache
    holds ``start`` tokens before the pass. ``masked`` also counts the pairs hidden by the causal
    mask or a window, as kernels with a mask and ``FlopCounterMode`` of torch do.
    """
    tokens = np.asarray(stop, float) - start
    total = _flat_flops(shape) * tokens + 2.0 * shape.head_weights * np.asarray(heads)
    for mixer, count in shape.mixers:
        pairs = tokens * stop if masked else visible_pairs(start, stop, mixer.window, mixer.chunked)
        total = total + count * (mixer.pair_flops * pairs + mixer.token_flops * tokens)
    return np.asarray(total, float)


def decode_flops(shape: ModelShape, start: Numbers, stop: Numbers) -> FloatArray:
    """Return the FLOPs of decoding the positions ``start`` to ``stop - 1`` one by one.

    Each step is a pass over one token with logits. Latent attention works in its latent space. A
    single query has no masked pair.
    """
    tokens = np.asarray(stop, float) - start
    total = (_flat_flops(shape) + 2.0 * shape.head_weights) * tokens
    for mixer, count in shape.mixers:
        pairs = visible_pairs(start, stop, mixer.window, mixer.chunked)
        total = total + count * (mixer.decode_pair_flops * pairs + mixer.token_flops * tokens)
    return np.asarray(total, float)


class Cut(NamedTuple):
    """Sizes of the chunks that thinking is cut into, as numbers or arrays."""

    context_size: Numbers  # thinking tokens per context (C); infinite for LongCoT
    carryover_size: Numbers  # thinking tokens carried over a boundary, within C (m)
    outside: Numbers = 0  # carried tokens on top of C (``head_outside``)
    fixed_head: Numbers = 0  # leading carried tokens that never change; a prefix cache holds them

    @classmethod
    def of(cls, spec: ChunkSpec) -> Cut:
        """Return the sizes for a spec; ``LONGCOT`` for a spec with one chunk.

        Raises:
            ConfigError: the number of carried tokens varies, or chunks may end early.
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
                f"{name_of(policy)!r} varies, or its method carried_length does not state it"
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
    """Chunks of traces, grouped by size.

    The last axis has four entries: the first chunk of the first trace in a group, the first chunk
    of the other traces, full later chunks, and the last chunk.
    """

    count: FloatArray  # chunks of each size per trace, averaged over the group
    prompt: FloatArray  # prompt tokens
    new: FloatArray  # sampled tokens
    cached: FloatArray  # prompt tokens found in the prefix cache

    @property
    def per_trace(self) -> FloatArray:
        """Chunks per trace."""
        return np.asarray(self.count.sum(-1))


def cut_traces(
    thinking: Numbers, query: Numbers, cut: Cut, group: Numbers = 1, prefix_cache: bool = True
) -> Chunks:
    """Return the chunks of traces with ``thinking`` sampled tokens each.

    The first chunk has up to C new tokens after the query. Later chunks have C - m after query and
    carryover, and the last one has the rest. ``thinking`` is at least 1.

    Of the ``group`` traces of a query, all but the first find the query in the prefix cache. All
    later chunks find query and head there.
    """
    parts = np.broadcast_arrays(thinking, query, *cut, group)
    thinking, query, context, carry, outside, head, group = (np.asarray(p, float) for p in parts)
    first = np.minimum(thinking, context)
    rest = thinking - first
    step = np.where(np.isinf(context), 1.0, context - carry)  # new tokens of a full later chunk
    full = np.floor(rest / step)
    last = rest - full * step
    later = query + carry + outside
    none = np.zeros_like(query)
    in_first = _whole_blocks(query - 1) if prefix_cache else none
    in_later = _whole_blocks(query + head) if prefix_cache else none
    return Chunks(
        count=np.stack([1 / group, 1 - 1 / group, full, (last > 0).astype(float)], -1),
        prompt=np.stack([query, query, later, later], -1),
        new=np.stack([first, first, step, np.maximum(last, 1.0)], -1),
        cached=np.stack([none, in_first, in_later, in_later], -1),
    )


def _whole_blocks(tokens: FloatArray) -> FloatArray:
    return np.asarray(CACHE_BLOCK_TOKENS * np.floor(tokens / CACHE_BLOCK_TOKENS))


def prefill_flops(shape: ModelShape, chunks: Chunks) -> FloatArray:
    """Return the prefill FLOPs per trace: queries, and the carryover at each boundary.

    Each prefill computes the logits of one position, for the first new token of the chunk.
    """
    each = forward_flops(shape, chunks.cached, chunks.prompt, 1)
    return np.asarray((chunks.count * each).sum(-1))


def sampling_flops(shape: ModelShape, chunks: Chunks) -> FloatArray:
    """Return the FLOPs of sampling a trace: prefills, and a pass per token but a chunk's last."""
    each = decode_flops(shape, chunks.prompt, chunks.prompt + chunks.new - 1)
    return np.asarray(prefill_flops(shape, chunks) + (chunks.count * each).sum(-1))


def training_flops(
    shape: ModelShape, chunks: Chunks, masked: bool = False, extra_passes: float = 0.0
) -> FloatArray:
    """Return the FLOPs of training on a trace: the forward pass, and twice as many backward.

    Logits are computed for the sampled tokens only; for ``masked`` see ``forward_flops``.
    ``extra_passes`` are forward passes beyond the first: 1 for recomputed activations, 1 for
    log-probs under the old weights.
    """
    each = forward_flops(shape, 0, chunks.prompt + chunks.new, chunks.new, masked)
    return np.asarray((3.0 + extra_passes) * (chunks.count * each).sum(-1))
