"""The chunks of traces as the model sees them: each a sequence of its own.

A trainer's row is a trace; what is forwarded are its chunks, each under exactly the prompt that the
sampler saw, so attention never crosses a border. Padding is on the right, where causal attention
does not see it: positions start at 0 and no attention mask is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from delethink.tokens import joined, memory_of, memory_of_logprobs
from delethink.training.packing import pack, padding_share
from delethink.types import TokenIds, Trace


class ChunkRow(NamedTuple):
    """A chunk (x_l, y_l) and where it belongs."""

    prompt_ids: TokenIds
    output_ids: TokenIds
    engine_logprobs: tuple[float, ...]  # of output_ids, when they were sampled
    trace: int  # place of its trace among those at hand; FILLER for what is there to be forwarded
    place: int  # of the chunk in its trace, from 0
    start: int  # place of its first output token among the sampled tokens of its trace

    @property
    def length(self) -> int:
        """Tokens that are forwarded."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def end(self) -> int:
        """One past the place of its last output token."""
        return self.start + len(self.output_ids)

    def sampled_at(self, device: torch.device) -> torch.Tensor:
        """``engine_logprobs`` in double precision: [len(output_ids)]."""
        numbers = np.frombuffer(memory_of_logprobs(self.engine_logprobs))
        return torch.tensor(numbers, dtype=torch.float64, device=device)


FILLER = -1


class Packed(NamedTuple):
    """Chunks of some traces in forward batches."""

    batches: list[list[ChunkRow]]
    tokens: int  # forwarded, without padding
    padding: float  # share of what is forwarded that is padding


def chunk_rows(traces: Iterable[Trace]) -> list[ChunkRow]:
    """The chunks of all traces, without those that failed before their first token."""
    rows = []
    for which, trace in enumerate(traces):
        start = 0
        for i, chunk in enumerate(trace.chunks):
            if chunk.output_ids:
                ids, logprobs = chunk.output_ids, chunk.logprobs
                rows.append(ChunkRow(chunk.prompt_ids, ids, logprobs, which, i, start))
                start += len(chunk.output_ids)
    return rows


def pack_rows(rows: Sequence[ChunkRow], forward_tokens: int) -> Packed:
    """Forward batches of like length, the longest first: what does not fit fails at once."""
    lengths = [row.length for row in rows]
    places = pack(lengths, forward_tokens)[::-1]
    batches = [[rows[i] for i in batch] for batch in places]
    return Packed(batches, sum(lengths), padding_share(lengths, places))


def fill_up(packed: Packed, number: int, pad_id: int) -> Packed:
    """As many batches as other processes have, those that are missing with a token of no weight."""
    filler = ChunkRow((pad_id,), (pad_id,), (0.0,), FILLER, 0, 0)
    missing = number - len(packed.batches)
    return packed._replace(batches=packed.batches + [[filler]] * missing)


class Layout:
    """Tensors of a forward batch of K chunks.

    Attributes:
        ids: [K, S], padded on the right.
        prompt_size: leading columns that hold prompts alone; what is kept of a forward pass are the
            T = S - prompt_size columns after them.
        is_output: [K, T], the sampled tokens.
    """

    def __init__(self, batch: Sequence[ChunkRow], pad_id: int, device: torch.device) -> None:
        self._batch = batch
        self._device = device
        longest = max(row.length for row in batch)
        self.prompt_size = min(len(row.prompt_ids) for row in batch)
        ids = np.full((len(batch), longest), pad_id, dtype=np.int64)
        for padded, row in zip(ids, batch, strict=True):
            memory = memory_of(joined([row.prompt_ids, row.output_ids]))
            padded[: row.length] = np.frombuffer(memory, np.int64)
        self.ids = torch.from_numpy(ids).to(device)
        columns = torch.arange(longest - self.prompt_size, device=device)
        first = torch.tensor([len(r.prompt_ids) - self.prompt_size for r in batch], device=device)
        last = torch.tensor([r.length - self.prompt_size for r in batch], device=device)
        self.is_output = (columns >= first[:, None]) & (columns < last[:, None])

    def place(self, values: Sequence[Sequence[float] | torch.Tensor]) -> torch.Tensor:
        """Values of each chunk's output tokens, where those tokens lie: [K, T], 0 elsewhere."""
        flat = torch.cat([torch.as_tensor(v).to(self._device) for v in values])
        placed = torch.zeros(self.is_output.shape, dtype=flat.dtype, device=self._device)
        return placed.masked_scatter(self.is_output, flat)

    def take(self, placed: torch.Tensor) -> list[torch.Tensor]:
        """The values of the output tokens of each chunk, out of [K, T]."""
        sizes = [len(row.output_ids) for row in self._batch]
        return list(torch.split(placed[self.is_output], sizes))
