"""Preparation of a process for sampling or training, before heavy imports."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import logging
import os
import warnings
from contextlib import suppress

from delethink.errors import MissingExtraError


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
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX of malloc.h
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-2, 2**26)  # M_TOP_PAD


def require_packages(extra: str, *packages: str) -> None:
    """Raise ``MissingExtraError`` if a package of an extra is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, extra)
