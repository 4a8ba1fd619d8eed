"""Copies of the trainer's weights on their way to the engines.

With ``weight_transfer=store`` they go through Ray's object store, to engines anywhere:

    pack (driver) -> object store -> write (worker) -> read (engine process)

With ``nccl`` and ``ipc`` they go from GPU to GPU: a ``WeightSender`` of the engine sends a
``Snapshot`` (``delethink.engines.vllm_transfer``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from delethink.engines.weight_check import Columns

if TYPE_CHECKING:
    import numpy as np

PackedWeight = tuple["np.ndarray", str, tuple[int, ...]]  # bytes, dtype, shape
PackedWeights = Mapping[str, PackedWeight]
WeightSlot = tuple[str, str, tuple[int, ...], int, int]  # name, dtype, shape, offset, size in bytes

_ALIGNMENT_BYTES = 64  # a view of another dtype must start at a multiple of its item size


def pack(weights: Mapping[str, torch.Tensor]) -> PackedWeights:
    """Return weights as bytes: Ray's object store shares NumPy arrays without a copy."""
    return {
        name: (
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(),
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
        )
        for name, tensor in weights.items()
    }


def write(weights: PackedWeights) -> tuple[int, list[WeightSlot]]:
    """Write weights into an anonymous file in memory.

    The engine process maps the file without a copy. The kernel frees the file with the last process
    using it.

    Returns:
        The file descriptor, for the caller to close, and the slot of each weight in the file.
    """
    slots = []
    descriptor = os.memfd_create("delethink-weights")
    with os.fdopen(descriptor, "wb", closefd=False) as file:
        for name, (data, dtype, shape) in weights.items():
            file.seek(-file.tell() % _ALIGNMENT_BYTES, os.SEEK_CUR)
            slots.append((name, dtype, shape, file.tell(), data.nbytes))
            file.write(data.data)
    return descriptor, slots


def read(path: str, slots: list[WeightSlot]) -> dict[str, torch.Tensor]:
    """Return the weights in a file from ``write``, as views of it."""
    data = torch.from_file(path, size=os.path.getsize(path), dtype=torch.uint8)
    return {
        name: data[offset : offset + size].view(getattr(torch, dtype)).reshape(shape)
        for name, dtype, shape, offset, size in slots
    }


def local_device() -> torch.device:
    """Return the GPU of the calling thread, or the CPU if there is none, as in tests."""
    if (found := torch.accelerator.current_accelerator(check_available=True)) is None:
        return torch.device("cpu")
    return torch.device(found.type, torch.accelerator.current_device_index())


class Snapshot:
    """A copy of weights on a GPU, unchanged while training continues."""

    def __init__(self, weights: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self.weights = {
            name: tensor.detach().to(device=device, copy=True) for name, tensor in weights.items()
        }
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # readers use other streams
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}

    @cached_property
    def digests(self) -> dict[str, str]:
        """Digest of the checked columns of each weight, which a worker compares with its own."""
        return {name: Columns.of(tensor).digest() for name, tensor in self.weights.items()}
