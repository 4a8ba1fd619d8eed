"""What a pool and its workers say to each other, many chunks at a time.

Each message costs both sides more than what is in it, so a worker reports when it has several
things to say, or when it has been silent for long enough to be thought dead. What is said goes as
one block of bytes, in which rows are plain tuples: pickle calls Python for each of another type.
"""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from delethink.policy import Completion, Sampling
from delethink.tokens import as_list, count_in, logprob_array, memory_of, token_array
from delethink.types import StopReason, TokenIds

_STOPS = {reason.value: reason for reason in StopReason}  # much faster than asking the enum


class Job(NamedTuple):
    """A chunk for a worker; ids are packed, because a tuple of thousands is slow to send."""

    number: int  # of its lease
    prompt: bytes  # 64-bit ids
    max_new_tokens: int
    temperature: float
    seed: int | None

    @classmethod
    def pack(
        cls, number: int, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Job:
        """For the chunk of a lease."""
        prompt = memory_of(prompt_ids)
        return cls(number, prompt, max_new_tokens, sampling.temperature, sampling.seed)

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt, as vLLM takes it."""
        return as_list(token_array(self.prompt))


class Answer(NamedTuple):
    """What became of a job: tokens, or what was raised."""

    number: int
    output: bytes = b""  # 64-bit ids
    logprobs: bytes = b""  # 64-bit numbers
    stop: str = StopReason.LENGTH.value
    version: int = 0  # of the weights
    error: Exception | None = None

    @classmethod
    def pack(
        cls,
        number: int,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        stop: StopReason,
        version: int,
    ) -> Answer:
        """For a job that was sampled."""
        packed = array("q", token_ids).tobytes(), array("d", logprobs).tobytes()
        return cls(number, *packed, stop.value, version)

    @property
    def num_tokens(self) -> int:
        """How many were sampled."""
        return count_in(self.output)

    def completion(self) -> Completion:
        """As rollouts know it."""
        tokens, logprobs = token_array(self.output), logprob_array(self.logprobs)
        return Completion(tokens, logprobs, _STOPS[self.stop], self.version)


@dataclass(frozen=True)
class EngineCounts:
    """What an engine has done since it started. All of it only grows."""

    steps: int = 0  # forward passes
    tokens: int = 0  # sampled
    running: int = 0  # sum over steps of the chunks in the batch
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits: int = 0  # of those, found


class Report(NamedTuple):
    """What a worker has done since its last one."""

    answers: Sequence[Answer]
    counts: EngineCounts


def encode_jobs(jobs: Sequence[Job], dropped: Sequence[int]) -> bytes:
    """Jobs, and the numbers of those that are taken back, as they are sent."""
    return _encode((list(map(tuple, jobs)), dropped))


def decode_jobs(sent: bytes | bytearray) -> tuple[list[Job], Sequence[int]]:
    """What ``encode_jobs`` was given."""
    rows, dropped = pickle.loads(sent)
    return list(map(Job._make, rows)), dropped


def encode_report(report: Report) -> bytes:
    """A report as it is sent."""
    return _encode((list(map(tuple, report.answers)), report.counts))


def decode_report(sent: bytes | bytearray) -> Report:
    """What ``encode_report`` was given."""
    rows, counts = pickle.loads(sent)
    return Report(list(map(Answer._make, rows)), counts)


def _encode(said: Any) -> bytes:
    return pickle.dumps(said, pickle.HIGHEST_PROTOCOL)


@dataclass(frozen=True)
class WorkerState:
    """What a worker says of itself once it has started."""

    pid: int
    max_model_tokens: int
    batch_size: int  # the most chunks that the engine samples side by side


class WorkerHandle(Protocol):
    """One life of a worker, as the pool holds it; after ``kill`` nothing of it is left.

    Whatever a method raises, but for ``WeightSyncError``, means that the worker is lost.
    """

    async def start(self) -> WorkerState:
        """Starts the engine; bounded in time by itself."""
        ...

    def attend(self, hear: Callable[[Report], None], lose: Callable[[Exception], None]) -> None:
        """Listens to the worker from now on.

        Args:
            hear: told each report; there is one every few seconds, also with nothing.
            lose: told once that the worker is lost, and why, unless it was killed here.
        """
        ...

    def send(self, jobs: Sequence[Job], dropped: Sequence[int]) -> None:
        """Hands over jobs, and takes back others by their numbers. A lost worker gets none."""
        ...

    async def update(self, weights: Any, version: int) -> int:
        """Takes up weights while it has no job; returns the version that the engine runs.

        Raises:
            WeightSyncError: it refused them.
        """
        ...

    async def sleep(self) -> None:
        """Gives the memory of its GPU to others."""
        ...

    async def wake(self) -> None:
        """Takes it back."""
        ...

    async def stop(self) -> None:
        """Ends the engine in good order."""
        ...

    def kill(self) -> None:
        """Ends the worker and its engine, whatever state they are in."""
        ...
