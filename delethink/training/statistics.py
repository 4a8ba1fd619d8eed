"""What is measured of trained tokens, summed for each place of a chunk in its trace.

TRL's own averages weight micro-batches, not tokens. These are sums over tokens, so that neither
micro-batches nor processes change them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

_SUMS = ("entropy", "difference", "outside", "ratio", "clipped", "correction", "kl")


class Means(NamedTuple):
    """Of one place of chunks in their traces, or of all. Without tokens all are 0."""

    tokens: int
    entropy: float  # nats a token
    difference: float  # |log-prob of the trainer - of the engine|
    difference_max: float
    outside: float  # share of tokens whose probabilities in the two differ by more than a tenth
    ratio: float  # probability now over that before the first step on the batch
    clipped: float  # share of tokens that the clip holds back
    correction: float  # weight that corrects for the engine's probabilities
    kl: float  # from the reference weights, where it is asked for


class StepStatistics(NamedTuple):
    """Of the tokens trained on since it was last asked for."""

    total: Means
    by_chunk: list[Means]  # first chunks, second chunks, ...


class ChunkStatistics:
    """Gathers sums of per-token values by the place of their chunk."""

    def __init__(self) -> None:
        self._sums = torch.zeros(0, 1 + len(_SUMS), dtype=torch.float64)
        self._largest = torch.zeros(0, dtype=torch.float64)

    def add(
        self, places: Sequence[int], is_output: torch.Tensor, values: Mapping[str, torch.Tensor]
    ) -> None:
        """Adds a forward batch.

        Args:
            places: of each of its K chunks, from 0.
            is_output: [K, T], the tokens that count.
            values: by the names of ``Means``, [K, T] each; those left out count as 0.
        """
        self._grow(max(places) + 1)
        zeros = torch.zeros_like(is_output, dtype=torch.float64)
        columns = [is_output.double()] + [values.get(name, zeros).double() for name in _SUMS]
        sums = torch.stack([column.where(is_output, zeros).sum(-1) for column in columns], -1)
        index = torch.tensor(places)
        self._sums.index_add_(0, index, sums.cpu())
        largest = values["difference"].double().where(is_output, zeros).amax(-1)
        self._largest.scatter_reduce_(0, index, largest.cpu(), "amax")

    def take(self, accelerator: Any) -> StepStatistics:
        """The means over all processes, which must all ask; gathering starts anew."""
        sums, largest = self._sums, self._largest
        self._sums, self._largest = sums[:0], largest[:0]
        both = torch.cat([sums, largest[:, None]], 1).to(accelerator.device)
        padded = accelerator.pad_across_processes(both, dim=0)
        gathered = accelerator.gather(padded[None]).cpu()
        sums, largest = gathered[:, :, :-1].sum(0), gathered[:, :, -1].amax(0)
        by_chunk = [_means(row, most) for row, most in zip(sums, largest.tolist(), strict=True)]
        most = max(largest.tolist(), default=0.0)
        return StepStatistics(_means(sums.sum(0), most), by_chunk)

    def _grow(self, size: int) -> None:
        missing = max(0, size - len(self._sums))
        self._sums = torch.cat([self._sums, self._sums.new_zeros(missing, self._sums.size(1))])
        self._largest = torch.cat([self._largest, self._largest.new_zeros(missing)])


def _means(sums: torch.Tensor, largest: float) -> Means:
    tokens, *rest = sums.tolist()
    means = {name: value / max(1, tokens) for name, value in zip(_SUMS, rest, strict=True)}
    return Means(tokens=round(tokens), difference_max=largest, **means)
