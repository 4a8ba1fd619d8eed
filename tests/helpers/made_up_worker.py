"""A worker without an engine, which starts in the second that a Ray actor takes."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator

from delethink.engines.base import EngineCounts, WorkerSpec, WorkerState
from delethink.engines.ray import RayPool
from delethink.engines.weight_sync import SharedHandle, read
from delethink.policy import Completion, Sampling
from delethink.types import StopReason, TokenIds


class MadeUpWorker:
    """Implements ``Worker``; its tokens are the last of the prompt, repeated.

    Their log-prob is -0.5, or the weight "logprob" in shared memory.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._steps = itertools.count(1)
        self._version = 0
        self._cancelled = 0
        self._logprob = -0.5

    async def start(self) -> WorkerState:
        return WorkerState(os.getpid(), self._spec.max_model_tokens or 0, batch_size=8)

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        try:
            # The temperature stands in for the time that a chunk takes.
            await asyncio.sleep(sampling.temperature)
        except asyncio.CancelledError:
            self._cancelled += 1
            raise
        tokens = tuple(prompt_ids[-1:]) * max_new_tokens
        logprobs = (self._logprob,) * max_new_tokens
        return Completion(tokens, logprobs, StopReason.LENGTH, self._version)

    async def stream(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> AsyncIterator[Completion]:
        for _ in range(max_new_tokens):
            yield await self.generate(prompt_ids, 1, sampling)

    async def health(self) -> EngineCounts:
        return EngineCounts(steps=next(self._steps), tokens=self._cancelled)

    async def update_weights(self, weights: object, version: int) -> int:
        if isinstance(weights, SharedHandle):
            found = read(weights.place, weights.slots)
            self._logprob = float(found.get("logprob", -0.5))
        self._version = version
        return version

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...

    async def stop(self) -> None: ...


class MadeUpPool(RayPool):
    """A pool of made-up workers."""

    worker_class = MadeUpWorker
