"""The chunks of traces as the model sees them: each a sequence of its own.

A trainer's row is a trace; what is forwarded are its chunks, each under exactly the prompt that the
sampler saw, so attention never crosses a boundary. Padding is on the right, where causal attention
does not see it: positions start at 0 and no attention mask is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from delethink.errors import RolloutError
from delethink.tokens import joined, memory_of, memory_of_logprobs
from delethink.types import TokenIds, Trace


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


MOST_PADDING = 0.02
_TOLERANCES = (1.0, 0.3, 0.1, 0.06, 0.04, 0.03, 0.02)


def pack(
    lengths: Sequence[int], forward_tokens: int, most_padding: float = MOST_PADDING
) -> list[list[int]]:
    """Groups sequences into forward batches, shortest first.

    Args:
        lengths: tokens of each sequence.
        forward_tokens: the most tokens of a batch, padding included; a longer sequence is a batch
            of its own.
        most_padding: share of padding in all batches together.

    Returns:
        The places of the sequences in ``lengths``, each exactly once.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for tolerance in _TOLERANCES:
        batches = _pack(lengths, order, forward_tokens, tolerance)
        if padding_share(lengths, batches) <= most_padding:
            return batches
    return _pack(lengths, order, forward_tokens, min(most_padding, _TOLERANCES[-1]))


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Share of the forwarded tokens that are padding; 0 where there are none."""
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths[i] for batch in batches for i in batch) / padded if padded else 0.0


def _pack(
    lengths: Sequence[int], order: Sequence[int], forward_tokens: int, tolerance: float
) -> list[list[int]]:
    """Batches of which each has at most a share of padding: taken in order, the next is longest."""
    batches: list[list[int]] = []
    tokens = 0  # of the last batch, without padding
    for i in order:
        padded = (len(batches[-1]) + 1) * lengths[i] if batches else 0
        tokens += lengths[i]
        if batches and padded <= forward_tokens and padded - tokens <= tolerance * padded:
            batches[-1].append(i)
        else:
            batches.append([i])
            tokens = lengths[i]
    return batches


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


class Ledger:
    """Counts how often each trace of a batch was trained on.

    A trace goes into the loss with all its sampled tokens at once or not at all: its chunks are
    never in different optimizer steps.
    """

    def __init__(self) -> None:
        self._expected: dict[int, int] = {}
        self._times = 0
        self._seen: Counter[int] = Counter()

    def open(self, lengths: Mapping[int, int], times: int) -> None:
        """Starts a batch: sampled tokens of each trace, and how often each is to be trained on."""
        self._expected, self._times, self._seen = dict(lengths), times, Counter()

    def count(self, tokens: Mapping[int, int]) -> None:
        """Enters the tokens of each trace of a micro-batch.

        Raises:
            RuntimeError: a trace is not of the batch, is there in part, or was there before.
        """
        for trace, number in tokens.items():
            if number != self._expected.get(trace):
                raise RuntimeError(
                    f"{number} tokens of trace {trace} are in the loss, but "
                    f"{self._expected.get(trace, 'none')} were sampled"
                )
            self._seen[trace] += 1
            if self._seen[trace] > self._times:
                raise RuntimeError(
                    f"trace {trace} is trained on {self._seen[trace]} times instead of "
                    f"{self._times}"
                )

    def close(self) -> None:
        """Ends a batch.

        Raises:
            RuntimeError: a trace was dropped, or trained on less often than it should have been.
        """
        missing = [t for t in self._expected if self._seen[t] != self._times]
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(self._expected)} traces were not trained on "
                f"{self._times} times; the first: trace {missing[0]}, {self._seen[missing[0]]}"
            )
