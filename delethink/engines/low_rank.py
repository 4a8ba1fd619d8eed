"""Low-rank changes of weights on their way to an engine, which merges them into the base weights.

A run with LoRA leaves the base weights as they are. Two narrow matrices for each adapted weight say
all that an update changes:

    low_rank_changes (trainer) -> pack_changes -> object store -> unpack_changes -> added_to

The change keeps the trainer's data type on the way, and the engine adds it to the base weight in
that type. So the merged weight is the trainer's own, rounded once, to the engine's data type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from delethink.engines.weight_sync import PackedWeight, PackedWeights, pack

if TYPE_CHECKING:
    import numpy as np

_DOWN, _UP = ":down", ":up"  # suffixes of the names of packed matrices


class LowRankChange(NamedTuple):
    """Change of a weight [rows, columns]: ``scale * up @ down``."""

    down: torch.Tensor  # [rank, columns]
    up: torch.Tensor  # [rows, rank]
    scale: float

    @property
    def shape(self) -> list[int]:
        """Shape of the weight."""
        return [len(self.up), self.down.shape[1]]

    def added_to(self, base: torch.Tensor) -> torch.Tensor:
        """Return the merged weight, in the change's data type and on the device of ``base``."""
        down, up = self.down.to(base.device), self.up.to(base.device)
        return base.to(down.dtype) + (up @ down) * self.scale


class PackedChanges(NamedTuple):
    """Changes as bytes, and the scale of each."""

    matrices: PackedWeights
    scales: dict[str, float]  # by the name of the weight


def pack_changes(changes: Mapping[str, LowRankChange]) -> PackedChanges:
    """Return changes as bytes, by the names of the weights that they change."""
    matrices = {
        f"{name}{suffix}": matrix
        for name, change in changes.items()
        for suffix, matrix in ((_DOWN, change.down), (_UP, change.up))
    }
    return PackedChanges(pack(matrices), {name: c.scale for name, c in changes.items()})


def unpack_changes(
    matrices: Mapping[str, torch.Tensor], scales: Mapping[str, float]
) -> dict[str, LowRankChange]:
    """Return the changes of ``pack_changes``."""
    return {
        name: LowRankChange(matrices[f"{name}{_DOWN}"], matrices[f"{name}{_UP}"], scale)
        for name, scale in scales.items()
    }


def merge_changes(
    base: Mapping[str, torch.Tensor], changes: Mapping[str, LowRankChange], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield base weights under their names, one at a time, merged with their changes."""
    for name, tensor in base.items():
        weight, change = tensor.to(device), changes.get(name)
        yield name, weight if change is None else change.added_to(weight)


def narrow(weights: PackedWeights) -> PackedWeights:
    """Return float32 weights as bfloat16 where that loses nothing, as of a bfloat16 checkpoint."""
    return {name: _narrow(*packed) for name, packed in weights.items()}


def _narrow(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> PackedWeight:
    if dtype == "float32":
        wide = torch.from_numpy(data).view(torch.float32)
        short = wide.bfloat16()
        if torch.equal(short.float(), wide):
            return short.view(torch.uint8).numpy(), "bfloat16", shape
    return data, dtype, shape
