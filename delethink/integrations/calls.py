"""Sampling calls of one size, for loops that cannot choose the size of each call."""

from __future__ import annotations

import math

from delethink.carryover import name_of
from delethink.chunking import ChunkSpec
from delethink.errors import ConfigError


def largest_call(spec: ChunkSpec) -> int:
    """Return the largest number of tokens a call with which calls of one size fill every chunk.

    Raises:
        ConfigError: chunks have no size known in advance.
    """
    if spec.is_longcot:
        return spec.context_size
    policy = spec.effective_carryover
    carried = policy.carried_length(spec.carryover_size)
    if spec.boundary is not None or spec.ask is not None or carried is None:
        reason = policy if spec.boundary is None else spec.boundary
        raise ConfigError(
            f"{name_of(reason)!r} gives chunks of different sizes, and every call samples the same "
            "number of tokens; use a carryover of constant length, such as head_tail, and no early "
            "boundary"
        )
    size, new = spec.context_size, spec.context_size - spec.carryover_size
    return math.gcd(size, new, size - min(carried.total, spec.carryover_size))


def check_call_size(spec: ChunkSpec, max_tokens: int) -> None:
    """Raise a ``ConfigError`` unless calls of ``max_tokens`` tokens end at every boundary."""
    largest = largest_call(spec)
    if max_tokens < 1 or largest % max_tokens:
        raise ConfigError(
            f"max_tokens={max_tokens} does not divide the chunks, so a call would sample beyond a "
            f"boundary: with context_size={spec.context_size} and "
            f"carryover_size={spec.carryover_size} it must divide {largest}; set "
            f"max_tokens={largest}"
        )
