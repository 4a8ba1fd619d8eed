"""The extension of vLLM's worker with the stand-ins of ``transfer_without_gpu``."""

from __future__ import annotations

from transfer_without_gpu import put_in_place

from delethink.engines.vllm_extension import WorkerExtension


class Extension(WorkerExtension):
    """Puts the stand-ins in place before the worker is made."""

    def __new__(cls, *args: object, **kwargs: object) -> WorkerExtension:
        put_in_place()
        return super().__new__(cls, *args, **kwargs)
