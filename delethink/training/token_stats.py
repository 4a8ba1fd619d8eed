"""Log-probs and entropies of single tokens under the trainer's weights, kept for the viewer.

With ``training.trace_token_stats`` a run writes ``token_stats/step_N.jsonl`` beside the traces of
the same name: a line for each chunk in the loss, as the first optimizer step on its batch saw it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from delethink.training.batching import FILLER
from delethink.training.data_parallel import RankGroup

if TYPE_CHECKING:
    from delethink.training.batching import ForwardBatch, MicroBatch
    from delethink.training.loss import TokenBatch

_DECIMALS = 4


class TokenStats:
    """Collects the values of an optimizer step; without ``is_on`` it costs nothing."""

    def __init__(self, is_on: bool) -> None:
        self._is_on = is_on
        self._chunks: dict[tuple[int, int], dict[str, Any]] = {}  # by trace and chunk

    def add(self, inputs: MicroBatch, batch: ForwardBatch, tokens: TokenBatch) -> None:
        """Add the chunks of a forward pass; ``tokens`` are detached."""
        if not self._is_on:
            return
        columns = zip(
            batch.rows,
            batch.unpad(tokens.logprobs.float()),
            batch.unpad(tokens.entropies.float()),
            strict=True,
        )
        for row, logprobs, entropies in columns:
            if row.trace == FILLER:
                continue
            key = inputs.traces[row.trace].index, row.chunk
            self._chunks[key] = {
                "trace": key[0],  # index in the batch, and in the file of its traces
                "chunk": key[1],
                "trainer_logprobs": [round(value, _DECIMALS) for value in logprobs.tolist()],
                "entropies": [round(value, _DECIMALS) for value in entropies.tolist()],
            }

    def take(self, ranks: RankGroup) -> list[dict[str, Any]]:
        """Return the values of all ranks, in order, and reset them. A collective, if it is on."""
        if not self._is_on:
            return []
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for own in ranks.gather(self._chunks) or []:
            found |= own
        self._chunks = {}
        return [found[key] for key in sorted(found)]
