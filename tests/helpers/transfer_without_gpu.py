"""vLLM's weight transfer where there is no GPU: what NCCL does goes by TCP.

All else is vLLM's own on both sides: the rendezvous, the calls and their order, the descriptions of
tensors, the loading. ``transfer_extension`` puts the stand-ins in place in the engine process of a
``Worker``; the other side calls ``put_in_place``. vLLM is imported inside functions, because a
worker sets its environment before that.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from delethink.engines.vllm import VllmPool, VllmWorker

SHARED = Path(tempfile.gettempdir())
STANDS_STILL = SHARED / "delethink-stands-still"  # where it is, whoever receives next does


class Communicator:
    """In place of ``PyNcclCommunicator``, over the TCP store of its group.

    As with NCCL, a sender waits until all have received, or until it is destroyed.
    """

    def __init__(self, group: Any, device: Any) -> None:
        self._group, self._round = group, 0
        self._destroyed = False

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        self._round += 1
        came = self._group.broadcast(tensor, src)
        if self._group.rank != src:
            tensor.copy_(came)
            if STANDS_STILL.exists():
                STANDS_STILL.unlink()
                os.kill(os.getpid(), signal.SIGSTOP)
            self._group.store.set(f"received/{self._round}/{self._group.rank}", b"1")
            return
        others = [rank for rank in range(self._group.world_size) if rank != src]
        while not self._group.store.check([f"received/{self._round}/{rank}" for rank in others]):
            if self._destroyed:
                raise RuntimeError("the communicator was destroyed")
            time.sleep(0.001)

    def destroy(self) -> None:
        self._destroyed = True


def put_in_place(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Lets the stand-ins answer in this process.

    Args:
        replace: as ``setattr``.
    """
    from vllm.distributed.device_communicators import pynccl

    replace(pynccl, "PyNcclCommunicator", Communicator)
    replace(torch.accelerator, "current_device_index", lambda: 0)
    replace(torch.accelerator, "synchronize", lambda device=None: None)
    replace(torch.cuda, "current_stream", lambda device=None: None)


class Worker(VllmWorker):
    """A worker whose engine has the stand-ins."""

    extension = "transfer_extension.Extension"


class Pool(VllmPool):
    """A pool of workers with the stand-ins."""

    worker_class = Worker
