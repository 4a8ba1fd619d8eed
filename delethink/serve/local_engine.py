"""An engine in a thread of its own, so that the server answers while the engine computes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

from delethink.policy import Completion, Policy, Sampling, TokenListener, stream_completion
from delethink.tokens import Logprobs, TokenIds

_CLOSE_TIME_S = 30.0


class EngineThread:
    """Policy that samples in an event loop of another thread.

    An engine in this process computes in its event loop, and nothing else runs there meanwhile.
    """

    def __init__(self, engine: Policy) -> None:
        self._engine = engine
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """See ``Policy``."""
        return await self._call(self._engine.generate(prompt_ids, max_new_tokens, sampling))

    async def stream(
        self,
        prompt_ids: TokenIds,
        max_new_tokens: int,
        sampling: Sampling,
        on_tokens: TokenListener,
    ) -> Completion:
        """See ``StreamingPolicy``."""
        caller = asyncio.get_running_loop()

        def pass_on(token_ids: TokenIds, logprobs: Logprobs) -> None:
            caller.call_soon_threadsafe(on_tokens, token_ids, logprobs)

        sampled = stream_completion(self._engine, prompt_ids, max_new_tokens, sampling, pass_on)
        completion = await self._call(sampled)
        # The result may overtake the last tokens: those were put into this loop's queue first.
        await asyncio.sleep(0)
        return completion

    async def _call(self, sampled: Coroutine[Any, Any, Completion]) -> Completion:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(sampled, self._loop))

    def close(self) -> None:
        """End the thread; what it still computes is abandoned."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_TIME_S)
