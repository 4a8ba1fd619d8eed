"""Smaller budgets out of one pass: a trace is cut where a smaller budget would have cut it."""

from __future__ import annotations

from dataclasses import replace

from delethink.errors import ConfigError, RolloutError
from delethink.rule import ChunkSpec, start
from delethink.types import Chunk, StopReason, Trace

DEFAULT_BUDGETS = 5  # points of a curve, where only its end is asked for


def cut(trace: Trace, spec: ChunkSpec) -> Trace:
    """What the trace would have been under ``spec``, a smaller budget of the same rule.

    The rule itself is played again over the sampled chunks, each cut at the limit that the rule
    gives it. That equals a run of its own wherever a sampler that may go on for longer draws the
    same tokens first, as one with a seed for each chunk does.

    Raises:
        RolloutError: the trace was played under another rule, so that a prompt differs.
    """
    if trace.stop.is_failure:
        return trace
    state = start(spec, trace.query_ids)
    chunks: list[Chunk] = []
    for chunk in trace.chunks:
        if chunk.prompt_ids != state.prompt_ids:
            raise RolloutError(
                f"a trace cannot be cut to {spec}: chunk {len(chunks)} starts from another prompt "
                "than this rule gives it"
            )
        kept = _cut_chunk(chunk, state.max_new_tokens)
        chunks.append(kept)
        state = state.advance(kept.output_ids, kept.stop)
        if state.stop is not None:
            return Trace(trace.query_ids, tuple(chunks), state.stop)
    raise RolloutError(f"a trace of {trace.length} tokens ends before the budget of {spec.budget}")


def _cut_chunk(chunk: Chunk, limit: int) -> Chunk:
    if len(chunk.output_ids) <= limit:
        return chunk
    return replace(
        chunk,
        output_ids=chunk.output_ids[:limit],
        logprobs=chunk.logprobs[:limit],
        stop=StopReason.LENGTH,
    )


def smaller(spec: ChunkSpec, budget: int, max_chunks: int | None = None) -> ChunkSpec:
    """The rule of ``spec`` with a smaller end: fewer chunks, or a shorter only one.

    Raises:
        ConfigError: no number of chunks has this budget, or it is larger than the spec's own.
    """
    if spec.is_longcot:
        found = ChunkSpec.longcot(budget)
    else:
        step = spec.context_size - spec.carryover_size
        chunks = max_chunks or 1 + -(-(budget - spec.context_size) // step)
        found = replace(spec, max_chunks=max(1, chunks))
    if found.budget != budget or budget > spec.budget:
        raise ConfigError(
            f"a budget of {budget} tokens is none of {spec}: C + (I - 1)(C - m) up to {spec.budget}"
        )
    return found


def spread_chunks(max_chunks: int, number: int = DEFAULT_BUDGETS) -> tuple[int, ...]:
    """At most ``number`` chunk counts from 1 to ``max_chunks``, evenly spread, both ends included.

    >>> spread_chunks(9)
    (1, 3, 5, 7, 9)
    """
    if max_chunks <= number:
        return tuple(range(1, max_chunks + 1))
    steps = number - 1
    return tuple(1 + (i * (max_chunks - 1) + steps // 2) // steps for i in range(number))
