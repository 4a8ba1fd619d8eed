"""Data types of the library, in reading order.

A *problem* becomes a *query* (token ids). A policy answers the query in *chunks*. The chunks of one
attempt are a *trace*, and the traces of one query are a *group*. Letters in parentheses follow The
Markovian Thinker (arXiv 2510.06557).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from delethink.tokens import Logprobs as Logprobs
from delethink.tokens import TokenIds as TokenIds  # re-exported with the other types

ACCEPTED_ANSWERS = "accepted_answers"  # key of a problem's metadata with all its gold answers
# The usual marks around thinking, which separate it from the answer; they do not end a chunk. Those
# of a model are found in ``thinking_marks``.
START_OF_THINKING = "<think>"
END_OF_THINKING = "</think>"  # separates thinking from the answer; does not end a chunk


class StopReason(str, Enum):
    """Reason a chunk ended. Only ``LENGTH`` leads to another chunk."""

    EOS = "eos"  # the policy ended its answer
    LENGTH = "length"  # the chunk is full, reached an early boundary, or used up the budget
    ABORT = "abort"  # the engine cancelled the request
    ERROR = "error"  # the policy raised an exception


class ChunkRole(str, Enum):
    """Purpose of a chunk."""

    THINKING = "thinking"
    CARRYOVER = "carryover"  # text written by the model to be carried over a boundary: a summary


class TraceStop(str, Enum):
    """Reason a trace ended."""

    COMPLETED = "completed"  # the policy ended its answer
    BUDGET = "budget"  # all chunks or all tokens were used up
    ABORTED = "aborted"
    ERROR = "error"
    CUT = "cut"  # chunks were removed from its end; ``extend_trace`` continues it

    @property
    def is_failure(self) -> bool:
        """Return whether something broke, which makes the trace no evidence about the policy."""
        return self in (TraceStop.ABORTED, TraceStop.ERROR)


@dataclass(frozen=True)
class Problem:
    """A question with its gold answer.

    Example: ``Problem("02:0110", answer="1001", metadata={"steps": 2})``. A list of accepted
    answers stands in ``metadata["accepted_answers"]``; each of them scores.
    """

    prompt: str  # the user's message; the tokenizer adds its chat template
    answer: str  # the gold answer
    metadata: Mapping[str, Any] = field(default_factory=dict)
    before: tuple[Mapping[str, str], ...] = ()  # earlier messages: {"role": ..., "content": ...}

    @property
    def accepted(self) -> tuple[str, ...]:
        """Return the accepted answers: the gold answer, or those in the metadata."""
        listed = self.metadata.get(ACCEPTED_ANSWERS)
        return tuple(map(str, listed)) if listed and isinstance(listed, list) else (self.answer,)

    @property
    def messages(self) -> list[dict[str, str]]:
        """Return the conversation as input for the tokenizer's chat template."""
        return [*map(dict, self.before), {"role": "user", "content": self.prompt}]


@dataclass(frozen=True)
class Chunk:
    """One uninterrupted piece of sampling: (x_l, y_l) of the paper.

    Example with C=6 and m=2, for the second chunk of the query ``(1, 2)`` after the first chunk
    ``(5, 6, 7, 8, 9, 10)``: ``prompt_ids=(1, 2, 9, 10)``, ``carried=2``, and ``output_ids`` has at
    most four tokens.
    """

    prompt_ids: TokenIds  # x_l: the query, then the carryover
    output_ids: TokenIds  # y_l: the sampled tokens, EOS included
    logprobs: Logprobs  # log-probs of y_l at the sampling temperature [len(y_l)]; empty without a
    # policy, in environments stepped by hand
    stop: StopReason
    carried: int = 0  # number of tokens in prompt_ids after the query
    policy_version: int | None = 0  # weight updates before sampling; None for a failed chunk
    error: str | None = None  # cause of an ABORT or ERROR
    role: ChunkRole = ChunkRole.THINKING
    worker: str | None = field(default=None, compare=False)  # where it was sampled, if in a pool


@dataclass(frozen=True)
class Trace:
    """One attempt at a problem."""

    query_ids: TokenIds  # q
    chunks: tuple[Chunk, ...]  # at least one
    stop: TraceStop

    @property
    def length(self) -> int:
        """Return l(tau), the number of sampled tokens.

        Carried tokens count once, where they were sampled. A carryover written by the model was
        sampled too and counts.
        """
        return sum(len(chunk.output_ids) for chunk in self.chunks)

    @property
    def thinking(self) -> tuple[Chunk, ...]:
        """Return the chunks of thinking, without written carryovers."""
        return tuple(chunk for chunk in self.chunks if chunk.role is ChunkRole.THINKING)

    @property
    def output_ids(self) -> TokenIds:
        """Return the tokens of all thinking chunks in order, as rewards read them."""
        return tuple(itertools.chain.from_iterable(chunk.output_ids for chunk in self.thinking))

    @property
    def error(self) -> str | None:
        """Return the first error of the chunks, or ``None``."""
        return next((chunk.error for chunk in self.chunks if chunk.error), None)


@dataclass(frozen=True)
class Attempt:
    """A finished trace as input of reward functions.

    ``text`` joins the chunks, so chunk boundaries do not affect rewards. The query is left out, so
    no reward finds its answer there.
    """

    problem: Problem
    text: str  # all sampled thinking, without special tokens
    stop: TraceStop
    length: int  # l(tau), sampled tokens
    num_chunks: int
    budget: int  # n, the maximum number of sampled tokens
    max_chunks: int  # I
    output_ids: TokenIds = ()  # the tokens of ``text``
    start_of_thinking: str | None = START_OF_THINKING  # None: unknown, or not marked
    end_of_thinking: str | None = END_OF_THINKING  # None: not marked; all text is the answer


@dataclass(frozen=True)
class Score:
    """The total reward of an attempt and its parts."""

    total: float | None  # None: no reward applies, or a reward failed
    parts: Mapping[str, float | None]  # unweighted, by the names of the recipe; None: no value
    errors: Mapping[str, str] = field(default_factory=dict)  # cause of each failed reward
    # cause of each 0 for an output that its grader could not evaluate, but a harmless one could
    zeroed: Mapping[str, str] = field(default_factory=dict)
