"""What a process that samples or trains wants set before anything heavy is imported."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import warnings
from contextlib import suppress


def set_up_process() -> None:
    """Settings that libraries read when they are imported; a value the user has set stays."""
    _keep_freed_memory()
    # Imported modules and traces stay alive: rescanning them every 700 objects costs a tenth of
    # the time that vLLM takes to import.
    gc.set_threshold(50_000)
    # On a busy machine, threads that spin while they wait take the cores from those that work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # The workers call vLLM themselves; TRL's own use of it, which this is about, is off.
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")
    # A name that TRL gives to transformers and that transformers is about to change.
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing` is deprecated")
    # TRL's own account of a trace without a reward is the whole trace; ours is in traces/.
    logging.getLogger("trl.trainer.grpo_trainer").setLevel(logging.ERROR)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # TRL imports parts of vLLM before vLLM has read that.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    for name in ("httpx", "httpx2", "openai"):  # at INFO, each logs every request
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _keep_freed_memory() -> None:
    """Has the C library keep freed memory for the next tensor, where it is glibc.

    On the CPU, decoding and training free and take the same large tensors over and over; handed
    back to the kernel each time, half the time of a long decode goes into clearing pages.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # the names of malloc.h
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**26)
