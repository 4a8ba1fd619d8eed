"""An engine's processes end with the worker that started them, however it ends.

vLLM itself does not notice that the process which started an engine is gone. With one rank, the
engine's process is where ``WeightUpdates`` is made; with several, it has an executor of ours, which
starts a process for each rank:

    VllmWorker (Ray actor)  ──►  engine process  ──►  ranks
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h

EXECUTOR = "delethink.engines.vllm_executor.Executor"  # of an engine of several ranks


def die_with_parent() -> None:
    """Ends this process when the one that started it ends.

    The kernel's signal also ends a process that is stopped; the thread sees a parent that was gone
    before.
    """
    if (parent := multiprocessing.parent_process()) is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
