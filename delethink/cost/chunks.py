"""How a trace of a given length falls into chunks: ``delethink.rule`` in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from delethink.carryover import HeadTail, Nothing, SinkWindow, Tail, name_of
from delethink.cost.flops import Floats, Numbers
from delethink.errors import ConfigError
from delethink.rule import ChunkSpec


class Cut(NamedTuple):
    """How thinking is cut, as numbers or arrays of them: what decides the cost of a rule.

    Args:
        context_size: thinking tokens that a context holds (C); infinite for LongCoT.
        carryover_size: thinking tokens carried over a border (m).
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
            ConfigError: a carryover or a border that the closed form does not cover.
        """
        if spec.is_longcot:
            return LONGCOT
        policy = spec.policy
        if spec.border is not None or not isinstance(
            policy, HeadTail | Tail | SinkWindow | Nothing
        ):
            raise ConfigError(
                "the estimate covers the carryovers head_tail, tail, sink_window and none, without "
                f"early borders: got {name_of(spec.border or policy)!r}"
            )
        if isinstance(policy, Nothing):
            return cls(spec.context_size, 0)
        if isinstance(policy, SinkWindow):
            return cls(spec.context_size, spec.carryover_size, 0, policy.num_sinks)
        if spec.head_outside and spec.head_size + spec.carryover_size > spec.context_size:
            raise ConfigError(
                "with head_outside the estimate covers head_size + carryover_size up to "
                f"context_size only: got {spec.head_size} + {spec.carryover_size} and "
                f"{spec.context_size}"
            )
        outside = spec.head_size if spec.head_outside else 0
        return cls(spec.context_size, spec.carryover_size, outside, spec.head_size)


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
