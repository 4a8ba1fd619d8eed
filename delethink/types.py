"""Every noun of the library, in reading order.

A *problem* is asked as a *query* (token ids). A policy answers it in *chunks*; the chunks of one
attempt are a *trace*; traces of the same query are a *group*. Letters in parentheses are those of
The Markovian Thinker (arXiv 2510.06557).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

TokenIds = tuple[int, ...]

END_OF_THINKING = "</think>"  # what follows it is the answer; it ends no chunk


class StopReason(str, Enum):
    """Why a chunk ended. Only ``LENGTH`` leads to a next chunk."""

    EOS = "eos"  # the policy ended its answer
    LENGTH = "length"  # the chunk is full, or was ended early: a boundary, or the end of the budget
    ABORT = "abort"  # the engine gave up the request
    ERROR = "error"  # the policy raised


class ChunkRole(str, Enum):
    """What a chunk was sampled for."""

    THINKING = "thinking"
    CARRYOVER = "carryover"  # written at a boundary to be carried over it: a summary


class TraceStop(str, Enum):
    """Why a trace ended."""

    COMPLETED = "completed"  # the policy ended its answer
    BUDGET = "budget"  # every chunk, or every token, was used up
    ABORTED = "aborted"
    ERROR = "error"
    CUT = "cut"  # it did not: chunks were taken off its end, and it can be gone on with

    @property
    def is_failure(self) -> bool:
        """Whether the trace says nothing about the policy, because something broke."""
        return self in (TraceStop.ABORTED, TraceStop.ERROR)


@dataclass(frozen=True)
class Problem:
    """What is asked and what counts as right.

    Example: ``Problem("02:0110", answer="1001", metadata={"steps": 2})``.
    """

    prompt: str  # the user's message; the tokenizer's chat template is put around it
    answer: str  # the gold answer
    metadata: Mapping[str, Any] = field(default_factory=dict)
    before: tuple[Mapping[str, str], ...] = ()  # messages before it: {"role": ..., "content": ...}

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation that the tokenizer's chat template renders."""
        return [*map(dict, self.before), {"role": "user", "content": self.prompt}]


@dataclass(frozen=True)
class Chunk:
    """One uninterrupted stretch of sampling: (x_l, y_l) of the paper.

    Example, C=6 and m=2, second chunk of a query ``(1, 2)`` whose first chunk was ``(5, 6, 7, 8,
    9, 10)``: ``prompt_ids=(1, 2, 9, 10)``, ``carried=2``, ``output_ids`` at most four tokens.
    """

    prompt_ids: TokenIds  # x_l: query, then what was carried
    output_ids: TokenIds  # y_l: sampled tokens, EOS included; like the others, these may be blocks
    # of memory that behave as tuples do (``delethink.tokens``): JSON takes ``list(output_ids)``
    logprobs: tuple[float, ...]  # log-probs of y_l when sampled, temperature applied [len(y_l)];
    # none where an environment was played by hand
    stop: StopReason
    carried: int = 0  # how many tokens at the end of prompt_ids come after the query
    policy_version: int | None = 0  # weight updates before y_l was sampled; None where it failed
    error: str | None = None  # what went wrong, where stop is ABORT or ERROR
    role: ChunkRole = ChunkRole.THINKING


@dataclass(frozen=True)
class Trace:
    """One attempt at a problem."""

    query_ids: TokenIds  # q
    chunks: tuple[Chunk, ...]  # at least one
    stop: TraceStop

    @property
    def length(self) -> int:
        """l(tau), its sampled tokens; carried ones count once, where they were sampled.

        A carryover that the model wrote was sampled too, and counts.
        """
        return sum(len(chunk.output_ids) for chunk in self.chunks)

    @property
    def thinking(self) -> tuple[Chunk, ...]:
        """The chunks without those in which the model wrote what is carried."""
        return tuple(chunk for chunk in self.chunks if chunk.role is ChunkRole.THINKING)

    @property
    def output_ids(self) -> TokenIds:
        """All tokens of thinking in order, stitched: what the reward reads."""
        return tuple(itertools.chain.from_iterable(chunk.output_ids for chunk in self.thinking))

    @property
    def error(self) -> str | None:
        """What went wrong, if something did."""
        return next((chunk.error for chunk in self.chunks if chunk.error), None)


@dataclass(frozen=True)
class Attempt:
    """A finished trace as rewards see it. The query is no part of it, so no answer is found there.

    ``text`` is stitched over the chunks, so that it does not matter where their boundaries lie.
    """

    problem: Problem
    text: str  # all that was sampled, without special tokens
    stop: TraceStop
    length: int  # l(tau), sampled tokens
    num_chunks: int
    budget: int  # n, the most sampled tokens
    max_chunks: int  # I
    output_ids: TokenIds = ()  # what ``text`` was decoded from


@dataclass(frozen=True)
class Score:
    """What an attempt earned, and of what the sum is made."""

    total: float | None  # None: no reward applies, or one could not be computed
    parts: Mapping[str, float | None]  # by the recipe's names, before weighting; None: not scored
    errors: Mapping[str, str] = field(default_factory=dict)  # by name: why there is no score
