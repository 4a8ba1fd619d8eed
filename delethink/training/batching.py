"""From sampled traces to forward batches of chunks.

The dataset row of the trainer is a trace, but the model forwards its chunks: each is a sequence of
its own under the prompt it was sampled with, so attention never crosses a boundary. Sequences are
padded on the right, after the last token that causal attention sees. Positions therefore start at
0, and no attention mask is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from delethink.errors import RolloutError
from delethink.tokens import joined, logprob_array
from delethink.training.loss import StepSize
from delethink.types import Logprobs, TokenIds, Trace

MAX_PADDING_SHARE = 0.02
_PADDING_TOLERANCES = (1.0, 0.3, 0.1, 0.06, 0.04, 0.03, 0.02)
FILLER = -1


# -- batches of traces -------------------------------------------------------------------------


class RolloutBatch(NamedTuple):
    """One trace per example, group after group."""

    examples: list[dict[str, Any]]  # rows of the dataset
    traces: list[Trace]


class ScoredBatch(NamedTuple):
    """A batch of traces with rewards and advantages, all in the same order."""

    examples: list[dict[str, Any]]  # rows of the dataset
    traces: list[Trace]
    rewards: list[dict[str, float | None]]  # by name; None where a reward does not apply
    advantages: list[float]
    in_loss: list[bool]


@dataclass(frozen=True)
class TrainingTrace:
    """A trace of this rank, with the values that its loss needs."""

    index: int  # in the batch of all ranks
    trace: Trace
    advantage: float  # of all its tokens
    in_loss: bool
    old_logprobs: torch.Tensor | None = None  # [length], before the first step; None: one step only
    ref_logprobs: torch.Tensor | None = None  # [length], under the reference; None: no KL term


class MicroBatch(NamedTuple):
    """Traces of this rank in one micro-batch, and the size of its optimizer step."""

    traces: list[TrainingTrace]
    step: StepSize


class TraceRow(NamedTuple):
    """One trace as TRL's ``rollout_func`` returns it; the lists have one entry per token."""

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]  # log-probs in the engine
    env_mask: list[int]  # 1: the token is in the loss


def trace_row(trace: Trace, pad_id: int, in_loss: bool = True) -> TraceRow:
    """Return the row of a trace. A trace without tokens becomes one masked ``pad_id``.

    Raises:
        RolloutError: A chunk has no log-probs, because no policy sampled it.
    """
    ids: list[int] = []
    logprobs: list[float] = []
    for chunk in trace.chunks:
        if len(chunk.logprobs) != len(chunk.output_ids):
            raise RolloutError(
                f"a chunk of {len(chunk.output_ids)} tokens has {len(chunk.logprobs)} log-probs: "
                "train only on traces sampled by a policy"
            )
        ids += chunk.output_ids
        logprobs += chunk.logprobs
    if not ids:
        return TraceRow(list(trace.query_ids), [pad_id], [0.0], [0])
    return TraceRow(list(trace.query_ids), ids, logprobs, [int(in_loss)] * len(ids))


# -- forward batches of chunks -----------------------------------------------------------------


class ChunkRow(NamedTuple):
    """One chunk (x_l, y_l) to forward."""

    prompt_ids: TokenIds
    output_ids: TokenIds
    engine_logprobs: Logprobs  # [len(output_ids)]
    trace: int  # index in the list of traces; FILLER for a row that only fills a batch
    chunk: int  # index of the chunk in its trace
    start: int  # index of its first output token among the sampled tokens of its trace

    @property
    def length(self) -> int:
        """Number of forwarded tokens."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def end(self) -> int:
        """Index after its last output token."""
        return self.start + len(self.output_ids)

    def engine_logprobs_on(self, device: torch.device) -> torch.Tensor:
        """Return the engine's log-probs in float64: [len(output_ids)]."""
        numbers = np.array(logprob_array(self.engine_logprobs))
        return torch.tensor(numbers, dtype=torch.float64, device=device)


class PackedChunks(NamedTuple):
    """Chunks grouped into forward batches."""

    batches: list[list[ChunkRow]]
    tokens: int  # without padding
    padding: float  # share of the forwarded tokens


class ForwardCounts(NamedTuple):
    """Tokens and batches forwarded by the loss."""

    tokens: int = 0  # without padding
    padded_tokens: float = 0.0
    batches: int = 0


def chunk_rows(traces: Sequence[Trace]) -> list[ChunkRow]:
    """Return the chunks of all traces that have output tokens, in order."""
    rows = []
    for index, trace in enumerate(traces):
        start = 0
        for number, chunk in enumerate(trace.chunks):
            if chunk.output_ids:
                ids, logprobs = chunk.output_ids, chunk.logprobs
                rows.append(ChunkRow(chunk.prompt_ids, ids, logprobs, index, number, start))
                start += len(ids)
    return rows


def pack_chunks(rows: Sequence[ChunkRow], forward_tokens: int) -> PackedChunks:
    """Group chunks into forward batches, the longest first, so that memory runs out early."""
    lengths = [row.length for row in rows]
    groups = pack_lengths(lengths, forward_tokens)[::-1]
    batches = [[rows[i] for i in group] for group in groups]
    return PackedChunks(batches, sum(lengths), padding_share(lengths, groups))


def pack_lengths(
    lengths: Sequence[int], forward_tokens: int, max_padding: float = MAX_PADDING_SHARE
) -> list[list[int]]:
    """Group sequences into batches, the shortest first.

    Args:
        lengths: Tokens of each sequence.
        forward_tokens: Maximum tokens of a batch, padding included. A longer sequence is a batch
            of its own.
        max_padding: Maximum share of padding over all batches.

    Returns:
        Indices into ``lengths``, each exactly once.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for tolerance in _PADDING_TOLERANCES:
        batches = _pack_sorted(lengths, order, forward_tokens, tolerance)
        if padding_share(lengths, batches) <= max_padding:
            return batches
    return _pack_sorted(lengths, order, forward_tokens, min(max_padding, _PADDING_TOLERANCES[-1]))


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Return the share of padding in the forwarded tokens; 0 without batches."""
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths[i] for batch in batches for i in batch) / padded if padded else 0.0


def _pack_sorted(
    lengths: Sequence[int], order: Sequence[int], forward_tokens: int, tolerance: float
) -> list[list[int]]:
    """Fill one batch after another, each with at most a share ``tolerance`` of padding."""
    batches: list[list[int]] = []
    tokens = 0  # tokens of the last batch, without padding
    for i in order:
        padded = (len(batches[-1]) + 1) * lengths[i] if batches else 0
        tokens += lengths[i]
        if batches and padded <= forward_tokens and padded - tokens <= tolerance * padded:
            batches[-1].append(i)
        else:
            batches.append([i])
            tokens = lengths[i]
    return batches


class ForwardBatch:
    """Tensors of K chunks, padded to S columns.

    The T = S - prompt_size last columns hold all output tokens; the columns before them are prompt
    tokens in every row. ``ids`` is [K, S], and ``is_output`` the mask of the output tokens [K, T].
    """

    def __init__(self, rows: Sequence[ChunkRow], pad_id: int, device: torch.device) -> None:
        self.rows = rows
        self.prompt_size = min(len(row.prompt_ids) for row in rows)
        longest = max(row.length for row in rows)
        ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
        for padded, row in zip(ids, rows, strict=True):
            padded[: row.length] = joined([row.prompt_ids, row.output_ids])
        self.ids = torch.from_numpy(ids).to(device)
        columns = torch.arange(longest - self.prompt_size, device=device)
        first = torch.tensor([len(r.prompt_ids) - self.prompt_size for r in rows], device=device)
        last = torch.tensor([r.length - self.prompt_size for r in rows], device=device)
        self.is_output = (columns >= first[:, None]) & (columns < last[:, None])

    def pad(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Put the values of each chunk's output tokens into their columns: [K, T], 0 elsewhere."""
        flat = torch.cat([value.to(self.ids.device) for value in values])
        padded = torch.zeros(self.is_output.shape, dtype=flat.dtype, device=flat.device)
        return padded.masked_scatter(self.is_output, flat)

    def unpad(self, padded: torch.Tensor) -> list[torch.Tensor]:
        """Return the values of each chunk's output tokens from [K, T]."""
        sizes = [len(row.output_ids) for row in self.rows]
        return list(torch.split(padded[self.is_output], sizes))


class TokenCoverageCheck:
    """Checks that each trace of a batch is trained on whole, and as often as configured.

    All sampled tokens of a trace enter the loss of the same optimizer step.
    """

    def __init__(self) -> None:
        self._expected: dict[int, int] = {}
        self._passes = 0
        self._seen: Counter[int] = Counter()

    def start(self, lengths: Mapping[int, int], passes: int) -> None:
        """Start a batch: sampled tokens by index of the trace, each trained on ``passes`` times."""
        self._expected, self._passes, self._seen = dict(lengths), passes, Counter()

    def add(self, tokens: Mapping[int, int]) -> None:
        """Count the tokens of each trace in a micro-batch.

        Raises:
            RuntimeError: A trace is unknown, incomplete, or trained on too often.
        """
        for trace, number in tokens.items():
            if number != self._expected.get(trace):
                raise RuntimeError(
                    f"{number} tokens of trace {trace} are in the loss, but "
                    f"{self._expected.get(trace, 'none')} were sampled"
                )
            self._seen[trace] += 1
            if self._seen[trace] > self._passes:
                raise RuntimeError(
                    f"trace {trace} is trained on {self._seen[trace]} times instead of "
                    f"{self._passes}"
                )

    def finish(self) -> None:
        """End a batch.

        Raises:
            RuntimeError: A trace is missing, or was trained on too rarely.
        """
        missing = [t for t in self._expected if self._seen[t] != self._passes]
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(self._expected)} traces were not trained on "
                f"{self._passes} times; the first: trace {missing[0]}, {self._seen[missing[0]]}"
            )
