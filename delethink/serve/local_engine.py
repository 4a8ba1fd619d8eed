"""An engine in a thread of its own, so that the server answers while the engine computes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection

from delethink.policy import Completion, Policy, Sampling, TokenListener, stream_completion
from delethink.tokens import Logprobs, TokenIds
from delethink.types import StopReason

_CLOSE_TIME_S = 30.0
_GATHER_S = 0.005  # a call waits so long for others, which then share its batch
_MAX_GATHERS = 20  # of such waits, while further calls come or are expected


class EngineThread:
    """Policy that samples in an event loop of another thread.

    An engine in this process computes in its event loop, and nothing else runs there meanwhile. A
    chunk whose tokens are all there is complete, though others of its batch go on.

    Args:
        engine: samples in the thread.
        eos_ids: tokens that end a chunk.
    """

    def __init__(self, engine: Policy, eos_ids: Collection[int]) -> None:
        self._engine, self._eos_ids = engine, eos_ids
        self._gate: asyncio.Event | None = None  # of the calls that wait to enter the engine
        self._num_waiting = 0
        self._expected = 0  # callers with a full chunk, who will ask for the next one
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """See ``Policy``."""
        return await self.stream(prompt_ids, max_new_tokens, sampling, lambda *_: None)

    async def stream(
        self,
        prompt_ids: TokenIds,
        max_new_tokens: int,
        sampling: Sampling,
        on_tokens: TokenListener,
    ) -> Completion:
        """See ``StreamingPolicy``."""
        self._expected = max(0, self._expected - 1)
        caller, left = asyncio.get_running_loop(), threading.Event()
        done: asyncio.Future[Completion] = caller.create_future()
        ids, kept = list[int](), list[float]()

        def receive(token_ids: TokenIds, logprobs: Logprobs) -> None:
            if left.is_set():
                return
            ids.extend(token_ids)
            kept.extend(logprobs)
            on_tokens(token_ids, logprobs)
            ended = bool(ids) and ids[-1] in self._eos_ids
            if (ended or len(ids) == max_new_tokens) and not done.done():
                stop = StopReason.EOS if ended else StopReason.LENGTH
                self._expected += not ended
                done.set_result(Completion(tuple(ids), tuple(kept), stop))

        def pass_on(token_ids: TokenIds, logprobs: Logprobs) -> None:
            if left.is_set():  # the engine's own loop is busy, and learns of it here
                raise asyncio.CancelledError
            caller.call_soon_threadsafe(receive, token_ids, logprobs)

        sampled = self._enter(prompt_ids, max_new_tokens, sampling, pass_on)
        called = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(sampled, self._loop))
        try:
            # The last tokens came into this loop's queue before the completion did.
            await asyncio.wait({called, done}, return_when=asyncio.FIRST_COMPLETED)
            return done.result() if done.done() else called.result()
        finally:
            left.set()
            called.cancel()

    async def _enter(
        self,
        prompt_ids: TokenIds,
        max_new_tokens: int,
        sampling: Sampling,
        on_tokens: TokenListener,
    ) -> Completion:
        """Sample in the engine's thread, together with the calls that come at the same time.

        Traces whose chunks end in one batch ask for the next ones from another thread, one after
        the other. Without a wait, each would begin a batch of its own.
        """
        self._num_waiting += 1
        if self._gate is None:
            self._gate = asyncio.Event()
            self._opening = asyncio.ensure_future(self._open_gate(self._gate))
        await self._gate.wait()
        return await stream_completion(
            self._engine, prompt_ids, max_new_tokens, sampling, on_tokens
        )

    async def _open_gate(self, gate: asyncio.Event) -> None:
        for _ in range(_MAX_GATHERS):
            seen = self._num_waiting
            await asyncio.sleep(_GATHER_S)
            if self._num_waiting == seen and not self._expected:
                break
        self._gate, self._num_waiting, self._expected = None, 0, 0
        gate.set()

    def close(self) -> None:
        """End the thread; what it still computes is abandoned."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_TIME_S)
