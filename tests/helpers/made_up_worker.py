"""A worker that is real but for its engine, so that it starts in the second that Ray takes."""

from __future__ import annotations

import asyncio
import os

from delethink.engines.exchange import Answer, EngineCounts, Job, WorkerState
from delethink.engines.vllm import VllmWorker
from delethink.types import StopReason


class MadeUpWorker(VllmWorker):
    """Its tokens are the last of the prompt, over and over."""

    async def start(self) -> WorkerState:
        """There is no engine to start."""
        self._batch_size = self._config.max_batch_size or 8
        self._counter = self
        return WorkerState(os.getpid(), self._config.max_model_tokens or 0, self._batch_size)

    def counts(self) -> EngineCounts:
        """In place of what vLLM counts."""
        return EngineCounts()

    async def _sample(self, job: Job) -> Answer:
        await asyncio.sleep(0.01)
        count = job.max_new_tokens
        tokens = job.prompt_ids[-1:] * count
        return Answer.pack(job.number, tokens, [-0.5] * count, StopReason.LENGTH, self._version)


class Unbound(MadeUpWorker):
    """Its node's address is not one of the machine's own."""

    async def listen(self, secret: bytes, peer: str, silence_s: float) -> tuple[str, int]:
        """As the system says it."""
        raise OSError(99, "Cannot assign requested address")
