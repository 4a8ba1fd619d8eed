"""A trace as one row of TRL's trainer.

TRL takes one completion for each prompt and gives each row one advantage. A trace is one row: the
prompt is its query and the completion all that was sampled, chunk after chunk. So a row's length is
the trace's own number of sampled tokens, the baseline of a group is taken over traces, and no row
is ever added or dropped. What the chunks were sampled after is read from the trace itself.
"""

from __future__ import annotations

from typing import NamedTuple

from delethink.errors import RolloutError
from delethink.types import Trace


class Row(NamedTuple):
    """One trace, flattened; the last three have one entry for each completion token."""

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]  # the engine's
    mask: list[int]  # 1 = has a place in the loss


def flatten(trace: Trace, pad_id: int, in_loss: bool = True) -> Row:
    """The row of a trace. A trace without a single token becomes one masked ``pad_id``.

    Raises:
        RolloutError: a chunk has no log-probs, because nobody sampled it.
    """
    ids: list[int] = []
    logprobs: list[float] = []
    for chunk in trace.chunks:
        if len(chunk.logprobs) != len(chunk.output_ids):  # played by hand: nothing to train on
            raise RolloutError(
                f"a chunk of {len(chunk.output_ids)} tokens has {len(chunk.logprobs)} log-probs; "
                "a trace that was not sampled by a policy cannot be trained on"
            )
        ids += chunk.output_ids
        logprobs += chunk.logprobs
    if not ids:
        return Row(list(trace.query_ids), [pad_id], [0.0], [0])
    return Row(list(trace.query_ids), ids, logprobs, [int(in_loss)] * len(ids))
