"""Copies of the trainer's weights on their way to the engines.

With ``weight_transfer=store`` they go through Ray's object store, to engines anywhere:

    pack (driver) -> object store -> write (worker) -> read (engine process)

With ``nccl`` they go from GPU to GPU: a ``WeightSender`` of the engine sends a ``Snapshot``
(``delethink.engines.vllm_transfer``).

With ``ipc`` they stay where they are, and engines on the same machine read them: ``SharedWeights``
are memory of a GPU, shared by CUDA IPC, or a file in memory that torch maps. Only their small
``SharedHandle`` goes through Ray.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

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


def read(place: str | bytes, slots: list[WeightSlot]) -> dict[str, torch.Tensor]:
    """Return the weights in a file from ``write``, or in shared memory, as views of it."""
    if isinstance(place, bytes):
        arguments: list[Any] = list(pickle.loads(place))
        arguments[_DEVICE] = torch.accelerator.current_device_index()
        data = rebuild_cuda_tensor(*arguments)  # type: ignore[no-untyped-call]
    else:
        data = torch.from_file(place, size=os.path.getsize(place), dtype=torch.uint8)
    return dict(_views(data, slots))


def _views(data: torch.Tensor, slots: list[WeightSlot]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, dtype, shape, offset, size in slots:
        yield name, data[offset : offset + size].view(getattr(torch, dtype)).reshape(shape)


def _cuda_handle(data: torch.Tensor) -> Any:
    """Return the arguments of ``rebuild_cuda_tensor`` in another process."""
    return reduce_tensor(data)[1]  # type: ignore[no-untyped-call]


_DEVICE = 6  # position of the device among the arguments of rebuild_cuda_tensor


@dataclass(frozen=True)
class SharedHandle:
    """The way to shared weights, for another process of this machine."""

    place: str | bytes  # path of a file, or a handle of CUDA
    slots: list[WeightSlot]


class SharedWeights:
    """A copy of weights that other processes of this machine read where it is.

    Sharded weights are gathered one by one, which is a collective of their ranks.

    Args:
        weights: weights by name.
        device: device of the copy.
        dtype: data type of the engine; numbers are cast before they are copied.
    """

    def __init__(
        self, weights: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        slots, end = list[WeightSlot](), 0
        for name, tensor in weights.items():
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            size = prod(tensor.shape) * kind.itemsize
            start = end + -end % _ALIGNMENT_BYTES
            slots.append((name, str(kind).removeprefix("torch."), tuple(tensor.shape), start, size))
            end = start + size
        self._file: int | None = None
        if device.type == "cuda":
            self._data = torch.empty(end, dtype=torch.uint8, device=device)
            place: str | bytes = pickle.dumps(_cuda_handle(self._data))
        else:
            # Not in /dev/shm, which is small in containers; the kernel frees it with this process.
            self._file = os.memfd_create("delethink-weights")
            os.truncate(self._file, end)
            place = f"/proc/{os.getpid()}/fd/{self._file}"
            self._data = torch.from_file(place, shared=True, size=end, dtype=torch.uint8)
        for name, view in _views(self._data, slots):
            whole: Any = weights[name].detach()
            view.copy_(whole.full_tensor() if hasattr(whole, "full_tensor") else whole)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # readers use other streams
        self.handle = SharedHandle(place, slots)

    def close(self) -> None:
        """Give the memory back, once no engine reads it. Safe to call twice."""
        self._data = torch.empty(0, dtype=torch.uint8)
        if self._file is not None:
            os.close(self._file)
            self._file = None
        elif isinstance(self.handle.place, bytes):
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]


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
