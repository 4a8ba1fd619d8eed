"""Sends weights from the trainer's GPU straight into a vLLM engine, by vLLM's own weight transfer.

    trainer's GPU -- NCCL --> engine process
    VllmWeightSender (driver) -> VllmWorker (Ray actor) -> AsyncLLM

vLLM moves the bytes and makes the necessary calls (``vllm.distributed.weight_transfer``). Each
worker has its own transfer, a group of two sides. So each loads weights as soon as its chunks are
done, and a dying worker disturbs no other.

This module imports vLLM; pools use this module only with ``weight_transfer=nccl``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
import torch
from vllm.distributed.weight_transfer import ParamMeta, WeightSource, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.utils.network_utils import get_open_port

from delethink.engines.cluster import cause
from delethink.engines.weight_sync import Snapshot
from delethink.errors import PolicyError


class VllmWeightSender:
    """Sends weights into one ``VllmWorker``; the calls block.

    Args:
        worker: the actor.
        num_ranks: ranks of the worker's engine.
        device: device of the weights to send.
    """

    def __init__(self, worker: Any, num_ranks: int, device: torch.device) -> None:
        self._worker, self._num_ranks = worker, num_ranks
        # A separate stream: waiting for a dead worker must not hold up the trainer.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._source, self._client = _Source(), _Client(worker, self.close)
        self._sender: Any = None  # vLLM's trainer side, once both sides are connected
        self._lock = threading.Lock()  # protects the sender, and whether the source is closed

    def connect(self) -> None:
        """Connect the two sides. If the worker dies meanwhile, this waits for vLLM's timeout."""
        info = NCCLTrainerInitInfo(
            rank=0,
            master_address=ray.util.get_node_ip_address(),
            master_port=get_open_port(),
            world_size=1 + self._num_ranks,
            packed=False,  # packed tensors go over streams shared by all transfers
        )
        with torch.cuda.stream(self._stream):
            sender = WeightTransferTrainerFactory.trainer_init(
                info, client=self._client, source=self._source
            )
        with self._lock:
            if not self._source.closed:
                self._sender = sender
                return
        sender.shutdown()
        raise PolicyError("the weight transfer was closed")

    def send(self, snapshot: Snapshot, version: int) -> int:
        """Send weights to the worker and return the version its engine then runs.

        After an error other than ``WeightSyncError``, both sides have to connect anew.
        """
        self._source.weights = snapshot.weights
        verify = ray.get(self._worker.prepare_transfer.remote(snapshot.shapes))
        try:
            with torch.cuda.stream(self._stream):
                self._sender.send_weights()
        except Exception:  # raised again, with the worker's own reason if there is one
            if self._client.failure is not None:
                raise self._client.failure from None
            raise
        digests = snapshot.digests if verify else None
        return int(ray.get(self._worker.confirm_transfer.remote(version, digests)))

    def close(self) -> None:
        """Close the transfer, also while ``connect`` or ``send`` waits for a lost worker."""
        with self._lock:
            self._source.closed = True
            sender, self._sender = self._sender, None
        if sender is not None:
            sender.shutdown()


class _Source(WeightSource):  # type: ignore[misc]  # vLLM may not be installed for mypy
    """The weights of the latest update, as vLLM's trainer side reads them."""

    def __init__(self) -> None:
        self.weights: Mapping[str, torch.Tensor] = {}
        self.closed = False

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in self.weights.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.weights.items():
            if self.closed:  # the group may be gone
                raise PolicyError("the weight transfer was closed")
            yield name, tensor


class _Client:
    """vLLM's ``VLLMWeightSyncClient``: calls of the trainer side to the worker."""

    def __init__(self, worker: Any, close: Callable[[], None]) -> None:
        self._worker, self._close = worker, close
        self.failure: Exception | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", WeightTransferInitRequest(init_info=init_info))

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        try:
            self._call("update_weights", WeightTransferUpdateRequest(update_info=update_info))
        except Exception as error:  # raised again
            self.failure = cause(error)
            self._close()  # else the sender would wait for the worker
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update")

    def _call(self, method: str, *arguments: Any) -> None:
        ray.get(self._worker.call_engine.remote(method, *arguments))
