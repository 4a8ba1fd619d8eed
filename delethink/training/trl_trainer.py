"""TRL's trainer, without the vLLM that it would load.

Where vLLM is installed, TRL's trainer imports all of it, for a way to sample that training does not
use here: its engines are processes of their own, and this one would start later and be larger for
nothing (``scripts/bench_startup.py``). A process that has loaded vLLM, or TRL's way to sample with
it, is left as it is.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec

from trl import import_utils

_GENERATION = "trl.generation.vllm_generation"


def _import_without_vllm() -> None:
    available, importing = import_utils.is_vllm_available, True

    def answer(min_version: str | None = None) -> bool:
        if not importing:  # by TRL's own generation, in a trainer of somebody else's
            raise ImportError(
                f"delethink.training has loaded TRL without vLLM: import {_GENERATION} before it "
                "in a process that also trains with use_vllm=True"
            )
        return False

    import_utils.is_vllm_available = answer
    try:
        importlib.import_module(_GENERATION)
    finally:
        import_utils.is_vllm_available, importing = available, False


if find_spec("vllm") and not {"vllm", _GENERATION} & set(sys.modules):
    _import_without_vllm()

from trl import GRPOTrainer  # noqa: E402

__all__ = ["GRPOTrainer"]
