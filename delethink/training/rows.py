"""A trace as one row of a trainer, and back.

TRL's trainer takes one completion for each prompt. A trace of chunks (x_1, y_1) ... (x_L, y_L) fits
into one row: the prompt is x_1 and the completion y_1 x_2 y_2 ... x_L y_L, with a mask that is 1 on
the sampled y tokens and 0 on the x tokens. So every row has one advantage, its masked length is the
trace's own number of sampled tokens, and no row is ever added or dropped. The mask alone says where
the chunks lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from delethink.errors import RolloutError
from delethink.types import TokenIds, Trace


class Row(NamedTuple):
    """One trace, flattened; the last three have one entry for each completion token."""

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]  # the engine's, 0 where the mask is 0
    mask: list[int]  # 1 = sampled


class Span(NamedTuple):
    """Where a chunk lies in a completion: prompt in ``start:output``, output in ``output:end``.

    The first chunk has an empty prompt span: its prompt is the row's.
    """

    start: int
    output: int
    end: int


def flatten(trace: Trace, pad_id: int) -> Row:
    """The row of a trace. A trace without a single token becomes one masked ``pad_id``.

    Raises:
        RolloutError: a chunk has no log-probs, because nobody sampled it.
    """
    ids: list[int] = []
    logprobs: list[float] = []
    mask: list[int] = []
    for chunk in trace.chunks:
        if not chunk.output_ids:  # a chunk that failed before its first token
            continue
        if len(chunk.logprobs) != len(chunk.output_ids):  # played by hand: nothing to train on
            raise RolloutError(
                f"a chunk of {len(chunk.output_ids)} tokens has {len(chunk.logprobs)} log-probs; "
                "a trace that was not sampled by a policy cannot be trained on"
            )
        prompt: TokenIds = chunk.prompt_ids if ids else ()
        ids += [*prompt, *chunk.output_ids]
        logprobs += [0.0] * len(prompt) + list(chunk.logprobs)
        mask += [0] * len(prompt) + [1] * len(chunk.output_ids)
    if not ids:
        return Row(list(trace.query_ids), [pad_id], [0.0], [0])
    return Row(list(trace.query_ids), ids, logprobs, mask)


def spans(mask: Sequence[int]) -> list[Span]:
    """The chunks of a row, from its mask; padding after the last sampled token is left out."""
    found: list[Span] = []
    start = 0
    while True:
        output = _next(mask, start, 1)
        if output == len(mask):
            return found
        end = _next(mask, output, 0)
        found.append(Span(start, output, end))
        start = end


def _next(mask: Sequence[int], start: int, value: int) -> int:
    return next((i for i in range(start, len(mask)) if mask[i] == value), len(mask))
