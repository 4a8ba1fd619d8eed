"""Which chunks are forwarded together: pure arithmetic over lengths.

Sequences of one forward batch are padded to the longest of them, so batches hold like lengths. A
batch of equal lengths has no padding; how unlike they may be is found for each set of sequences, so
that the padding of all batches together stays below a share and the batches are few.
"""

from __future__ import annotations

from collections.abc import Sequence

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
