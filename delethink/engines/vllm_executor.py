"""vLLM's executor of several ranks on one machine, in an engine process that ends with its worker.

vLLM loads this module by name in the engine process, which knows nothing else of ours. To name the
executor also keeps vLLM from taking Ray's, as it does by itself inside a placement group: a worker
has all the GPUs of its engine.
"""

from __future__ import annotations

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from delethink.engines.vllm_process import die_with_parent


class Executor(MultiprocExecutor):  # type: ignore[misc]  # vLLM may not be there to be checked
    """As vLLM's."""

    def _init_executor(self) -> None:
        die_with_parent()
        super()._init_executor()
