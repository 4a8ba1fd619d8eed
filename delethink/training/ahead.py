"""Sampling goes on while the trainer trains.

The next batches are begun before the trainer steps on the one at hand. New weights reach the engine
when a step is done and enter at chunk borders, so that a trace may hold chunks of several versions;
each keeps the log-probs that it was sampled with, and the loss corrects for them.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple

from delethink.training.sampler import Batch


class _Begun(NamedTuple):
    step: int  # the optimizer steps after this one are trained on it
    state: dict[str, Any]  # of the run, before it was begun
    batch: Future[Batch]


class SamplingAhead:
    """Batches, some of them begun early.

    Args:
        begin: takes what a batch for the steps after a step needs, and returns what makes it.
        state: what is to be gone back to if a batch is lost: where the prompts stood.
        batches_ahead: the most batches that are begun beyond the one at hand; with 0 all is done
            when it is asked for.
        steps_per_batch: optimizer steps on a batch.
        last_step: of the run; nothing is sampled for steps beyond it.
    """

    def __init__(
        self,
        begin: Callable[[int], Coroutine[Any, Any, Batch]],
        state: Callable[[], dict[str, Any]],
        batches_ahead: int,
        steps_per_batch: int,
        last_step: int,
    ) -> None:
        self._begin_one, self._state = begin, state
        self._batches_ahead, self._steps_per_batch = batches_ahead, steps_per_batch
        self._last_step = last_step
        self._begun: deque[_Begun] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def next(self, step: int) -> Batch:
        """The batch for the optimizer steps after ``step``; those after it are begun."""
        if not self._batches_ahead:
            return asyncio.run(self._begin_one(step))
        if not self._begun:
            self._begin(step)
        begun = self._begun[0]
        if begun.step != step:
            raise RuntimeError(f"a batch for step {step} is asked for, but {begun.step} is next")
        batch = begun.batch.result()
        self._begun.popleft()
        following = step + self._steps_per_batch * (1 + len(self._begun))
        while len(self._begun) < self._batches_ahead and following < self._last_step:
            self._begin(following)
            following += self._steps_per_batch
        return batch

    def state(self) -> dict[str, Any]:
        """Where the prompts stand without the batches that nobody was trained on yet."""
        return self._begun[0].state if self._begun else self._state()

    def settle(self) -> None:
        """Waits until no batch is being sampled."""
        for begun in self._begun:
            with suppress(Exception):  # whoever asks for the batch is told
                begun.batch.result()

    def close(self) -> None:
        """Gives up what was begun. Safe to call twice."""
        for begun in self._begun:
            begun.batch.cancel()
        self._begun.clear()
        loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None:
            asyncio.run_coroutine_threadsafe(_finish(), loop)
            thread.join()
            loop.close()

    def _begin(self, step: int) -> None:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
            self._thread.start()
        state = self._state()
        batch = asyncio.run_coroutine_threadsafe(self._begin_one(step), self._loop)
        self._begun.append(_Begun(step, state, batch))


async def _finish() -> None:
    """Lets cancelled tasks end, then stops the loop."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    asyncio.get_running_loop().stop()
