"""New weights from the trainer's GPU straight into an engine, by vLLM's own weight transfer.

    trainer's GPU  ──NCCL, or CUDA IPC on one GPU──►  engine process
    Transfer (driver)  ──►  VllmWorker (Ray actor)  ──►  AsyncLLM

The bytes and the calls that go with them are vLLM's affair (``vllm.distributed.weight_transfer``).
What is added: a worker refuses weights that do not fit before anything is touched, and says
afterwards whether what came is what was sent and what it runs. Each worker has a transfer of its
own, with a group of two sides, so that each takes weights up when it is idle, and one that dies
takes no other with it.

This module loads vLLM and is imported where a pool is asked for such a transfer.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import ray
import torch
from vllm.distributed.weight_transfer import (
    ParamMeta,
    RayVLLMWeightSyncClient,
    WeightSource,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.utils.network_utils import get_open_port

from delethink.config import WeightTransfer
from delethink.engines.cluster import cause
from delethink.engines.weight_check import Sent
from delethink.errors import PolicyError


def this_device() -> torch.device:
    """The GPU of the thread that asks; the CPU where there is none, as in tests."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return torch.device("cpu")
    return torch.device(found.type, torch.accelerator.current_device_index())


class Snapshot:
    """A copy of weights that stays as it is while the trainer trains on.

    Args:
        weights: the whole state of a model, on any device.
        device: where the copy is held.

    Attributes:
        weights: the copy.
        shapes: of each weight.
        digests: of what a worker compares with what has come to it (``weight_check.Sent``).
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self.weights = {
            name: tensor.detach().to(device=device, copy=True) for name, tensor in weights.items()
        }
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # readers use streams of their own
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        self.digests = {name: Sent.of(tensor).digest() for name, tensor in self.weights.items()}


class Transfer:
    """The way of weights into one life of a worker.

    Args:
        kind: "nccl", or "ipc" where the worker is on the same GPU.
        worker: the Ray actor, a ``VllmWorker``.
        num_ranks: of its engine.
        device: from which weights are sent.

    The calls block, each in a thread that the caller can do without. A worker that dies while an
    update comes by IPC leaves a view of that snapshot behind, whose memory is free again when this
    process ends.
    """

    def __init__(
        self, kind: WeightTransfer, worker: Any, num_ranks: int, device: torch.device
    ) -> None:
        self._kind, self._worker, self._num_ranks = kind, worker, num_ranks
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._source, self._client = _Source(), _Client(worker, self.close)
        self._sender: Any = None  # vLLM's, once both sides have met
        self._closed = False
        self._lock = threading.Lock()  # of the two above

    def meet(self) -> None:
        """Makes the two sides known to each other, once, before the first weights.

        Where the worker dies meanwhile, it waits for as long as vLLM does.
        """
        with self._on_device():
            sender = WeightTransferTrainerFactory.trainer_init(
                self._init_info(), client=self._client, source=self._source
            )
        with self._lock:
            if not self._closed:
                self._sender = sender
                return
        sender.shutdown()
        raise PolicyError("the transfer of weights was closed")

    def send(self, snapshot: Snapshot, version: int) -> int:
        """Gives weights to the worker, until it runs them.

        Returns:
            The version that the engine says it runs.

        Raises:
            WeightSyncError: the worker refused them, or runs others.
            Exception: whatever else; both sides have to begin anew then.
        """
        self._source.weights = snapshot.weights
        ray.get(self._worker.expect.remote(snapshot.shapes))
        try:
            with self._on_device():
                self._sender.send_weights()
        except Exception:  # raised again, with the worker's own reason where there is one
            if self._client.failure is not None:
                raise self._client.failure from None
            raise
        said: int = ray.get(self._worker.confirm.remote(version, snapshot.digests))
        return said

    def close(self) -> None:
        """Ends the transfer, also one that waits for a worker that is gone."""
        with self._lock:
            self._closed = self._source.closed = True
            sender, self._sender = self._sender, None
        if sender is not None:
            sender.shutdown()

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """What waits for a worker that has died must not hold up what the trainer computes."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def _init_info(self) -> IPCTrainerInitInfo | NCCLTrainerInitInfo:
        if self._kind == "ipc":
            return IPCTrainerInitInfo(rank=0)
        return NCCLTrainerInitInfo(
            rank=0,
            master_address=ray.util.get_node_ip_address(),
            master_port=get_open_port(),
            world_size=1 + self._num_ranks,
            packed=False,  # packed ones go over streams that all transfers share
        )


class _Source(WeightSource):  # type: ignore[misc]  # vLLM may not be there to be checked against
    """What vLLM's side asks for weights: those of the latest update."""

    def __init__(self) -> None:
        self.weights: Mapping[str, torch.Tensor] = {}
        self.closed = False

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in self.weights.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.weights.items():
            if self.closed:  # the group may be gone, and is not to be used
                raise PolicyError("the transfer of weights was closed")
            yield name, tensor


class _Client(RayVLLMWeightSyncClient):  # type: ignore[misc]
    """vLLM's calls to a worker. Where one fails, the sender need not wait to learn it."""

    def __init__(self, worker: Any, close: Any) -> None:
        super().__init__(worker)
        self._close = close
        self.failure: Exception | None = None

    def update_weights(self, update_info: Any) -> None:
        try:
            super().update_weights(update_info)
        except Exception as error:  # raised again; the sender is told
            self.failure = cause(error)
            self._close()  # the worker receives nothing more, for which the sender would wait
            raise
