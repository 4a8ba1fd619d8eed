"""Where a pool lives: an event loop in a thread of its own, and how callers get there and back."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from delethink.engines.pool import WorkerPool, settle
from delethink.engines.pool_worker import Chunk, Outcome
from delethink.errors import PolicyError
from delethink.policy import Completion, Sampling
from delethink.types import TokenIds

T = TypeVar("T")

_CLOSE_TIMEOUT_S = 60.0

_Asked = tuple[Chunk, asyncio.Future[Completion]]
_Told = tuple[asyncio.Future[Completion], Outcome]


class PoolThread:
    """Runs a pool beside its callers, whose event loops may come and go.

    What one loop has for the other goes together, once a turn: to wake a thread is dear, and two
    that wake each other for every chunk stand in each other's way.

    Args:
        pool: nobody else may use it.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._under_way: set[concurrent.futures.Future[Any]] = set()  # of who waits in ``run``
        # By the loop of who waits: the first is touched in that loop alone, the second in this one.
        self._inbox: dict[asyncio.AbstractEventLoop, list[_Asked]] = {}
        self._outbox: dict[asyncio.AbstractEventLoop, list[_Told]] = {}

    def start(self) -> None:
        """Begins to run; the pool is for the caller to start."""
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="delethink-pool", daemon=True
        )
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """Whether it runs."""
        return self._thread is not None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Waits for something that the pool does.

        Raises:
            PolicyError: the pool is closed, or was closed meanwhile.
        """
        if not self.is_open:
            work.close()
            raise _closed()
        return self._await(work, None)

    def call(self, function: Callable[..., object], *arguments: Any) -> bool:
        """Lets the pool's loop call a function, if it runs; whether it does."""
        with contextlib.suppress(RuntimeError):
            if self.is_open:  # while it is being closed its loop runs, to end what there is
                self._loop.call_soon_threadsafe(function, *arguments)
                return True
        return False

    async def sample(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """The policy protocol, for callers in any event loop but the pool's own."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Completion] = loop.create_future()

        def deliver(outcome: Outcome) -> None:
            if not self._outbox:
                self._loop.call_soon(self._send_out)
            self._outbox.setdefault(loop, []).append((answer, outcome))

        chunk = Chunk(prompt_ids, max_new_tokens, sampling, deliver)
        if loop not in self._inbox:
            self._inbox[loop] = []
            loop.call_soon(self._hand_over, loop)
        self._inbox[loop].append((chunk, answer))
        try:
            return await answer
        except asyncio.CancelledError:  # which comes after it was handed over
            self.call(self._pool.withdraw, chunk)
            raise

    def close(self) -> None:
        """Ends the pool and the thread. Safe to call twice."""
        thread, self._thread = self._thread, None
        for future in list(self._under_way):
            future.cancel()
        if thread is not None:
            with contextlib.suppress(TimeoutError):
                self._await(self._pool.close(), _CLOSE_TIMEOUT_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join(_CLOSE_TIMEOUT_S)
        if not self._loop.is_running() and not self._loop.is_closed():
            self._pool.abandon()  # what it has not ended in time
            self._loop.close()

    def _await(self, work: Coroutine[Any, Any, T], timeout_s: float | None) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._under_way.add(future)
        try:
            return future.result(timeout_s)
        except concurrent.futures.CancelledError:
            raise PolicyError("the pool was closed meanwhile") from None
        finally:
            self._under_way.discard(future)

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        asked = self._inbox.pop(loop)
        if not self.call(self._take_in, [chunk for chunk, _ in asked]):
            _settle_all([(answer, _closed()) for _, answer in asked])

    def _take_in(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            self._pool.submit(chunk)

    def _send_out(self) -> None:
        outbox, self._outbox = self._outbox, {}
        for loop, answers in outbox.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits there
                loop.call_soon_threadsafe(_settle_all, answers)


def _settle_all(answers: list[_Told]) -> None:
    for answer, outcome in answers:
        settle(answer, outcome)


def _closed() -> PolicyError:
    return PolicyError("the pool is closed")
