"""Settings of a process that samples or trains, made before heavy imports."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import warnings
from contextlib import suppress


def set_up_process() -> None:
    """Set environment variables and log levels read at import; values set by the user are kept."""
    _keep_freed_memory()
    # Imported modules and traces stay alive: rescanning them every 700 objects costs a tenth of
    # the time that vLLM takes to import.
    gc.set_threshold(50_000)
    # Spinning threads take cores from working ones on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # This warning is about TRL's own use of vLLM, which is off: the workers call vLLM directly.
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")
    # TRL passes a keyword to transformers that is about to be renamed there.
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing` is deprecated")
    # TRL logs the whole text of a trace without a reward; traces/ has it already.
    logging.getLogger("trl.trainer.grpo_trainer").setLevel(logging.ERROR)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # TRL imports parts of vLLM before vLLM reads VLLM_LOGGING_LEVEL.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    for name in ("httpx", "httpx2", "openai"):  # at INFO, each logs every request
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next tensor.

    On CPUs, decoding and training free and allocate the same large tensors again and again. If each
    goes back to the kernel, half of a long decode is spent on clearing pages.
    """
    trim_threshold, top_pad, mmap_max = (
        -1,
        -2,
        -4,
    )  # M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_MAX of malloc.h
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**26)
