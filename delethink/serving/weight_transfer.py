"""New weights from the trainer's GPU straight into an engine, by vLLM's own weight transfer.

    trainer's GPU  ──NCCL, or CUDA IPC on one GPU──►  engine process
    Transfer (driver)  ──►  VllmWorker (Ray actor)  ──►  AsyncLLM

The bytes and the calls that go with them are vLLM's affair (``vllm.distributed.weight_transfer``).
What is added: a worker refuses weights that do not fit before anything is touched, and says
afterwards what it really runs. Each worker has a transfer of its own, with a group of two sides, so
that each takes weights up when it is idle, and one that dies takes no other with it.

This module loads vLLM and is imported where a pool is asked for such a transfer.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Literal

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

from delethink.errors import PolicyError

Backend = Literal["ipc", "nccl"]
Weights = Mapping[str, torch.Tensor]

_PACKED = True  # many small tensors go by NCCL as one


def snapshot(weights: Weights, dtype: str) -> Weights:
    """A copy of weights on this process's GPU, as an engine of ``dtype`` will hold them.

    It stays as it is while the trainer trains on, for workers that restart.
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    wanted = getattr(torch, dtype)
    copies = {
        name: tensor.detach().to(
            device=device, dtype=wanted if tensor.is_floating_point() else None, copy=True
        )
        for name, tensor in weights.items()
    }
    if device.type == "cuda":
        torch.cuda.current_stream().synchronize()  # whoever reads them uses another stream
    return copies


class Transfer:
    """The way of weights into one life of a worker.

    Args:
        backend: "nccl", or "ipc" where the worker is on this process's GPU.
        worker: the Ray actor, a ``VllmWorker``.
        num_ranks: of its engine.
    """

    def __init__(self, backend: Backend, worker: Any, num_ranks: int) -> None:
        self._backend, self._worker, self._num_ranks = backend, worker, num_ranks
        self._source = _Source()
        self._sender: Any = None  # vLLM's, once both sides have met
        self._closed = False
        self._lock = threading.Lock()  # of the two above

    def send(self, weights: Weights, version: int) -> int:
        """Gives weights to the worker; blocks until it runs them.

        Returns:
            The version that the engine says it runs.

        Raises:
            WeightSyncError: the worker refused them, or runs others.
            Exception: whatever else; both sides have to begin anew then.
        """
        self._source.weights = weights
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        ray.get(self._worker.expect.remote(shapes))
        with _own_stream():
            if self._sender is None:
                self._meet()
            self._sender.send_weights()
        said: int = ray.get(self._worker.confirm.remote(version))
        return said

    def close(self) -> None:
        """Ends the transfer, also one that waits for a worker that is gone."""
        with self._lock:
            self._closed = True
            sender, self._sender = self._sender, None
        if sender is not None:
            sender.shutdown()

    def _meet(self) -> None:
        sender = WeightTransferTrainerFactory.trainer_init(
            self._init_info(),
            client=RayVLLMWeightSyncClient(self._worker),
            source=self._source,
        )
        with self._lock:
            if not self._closed:
                self._sender = sender
                return
        sender.shutdown()
        raise PolicyError("the transfer of weights was closed")

    def _init_info(self) -> IPCTrainerInitInfo | NCCLTrainerInitInfo:
        if self._backend == "ipc":
            return IPCTrainerInitInfo(rank=0)
        return NCCLTrainerInitInfo(
            rank=0,
            master_address=ray.util.get_node_ip_address(),
            master_port=get_open_port(),
            world_size=1 + self._num_ranks,
            packed=_PACKED,
        )


class _Source(WeightSource):  # type: ignore[misc]  # vLLM may not be there to be checked against
    """What vLLM's side asks for weights: those of the latest update."""

    def __init__(self) -> None:
        self.weights: Weights = {}

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in self.weights.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.weights.items())


@contextlib.contextmanager
def _own_stream() -> Iterator[None]:
    """What waits for a worker that has died must not hold up what the trainer computes."""
    if not torch.cuda.is_available():
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        yield
