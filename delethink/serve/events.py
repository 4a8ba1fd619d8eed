"""Events of a trace that is being sampled, in the order in which ``think`` yields them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from delethink.tokens import Logprobs, TokenIds


class Phase(str, Enum):
    """Part of a trace."""

    THINKING = "thinking"
    ANSWER = "answer"


class EndReason(str, Enum):
    """Reason the thinking of a trace ended."""

    MARK = "mark"  # the model wrote the mark of the end of thinking
    BUDGET = "budget"  # the tokens or the chunks of thinking were used up
    EOS = "eos"  # the model ended its turn without the mark
    LOOP = "loop"  # the thinking repeated itself
    TIME = "time"  # the time of thinking was over
    STOP = "stop"  # a stop string in the thinking ended the trace
    NONE = "none"  # the query ended the thinking before it began

    @property
    def is_forced(self) -> bool:
        """Return whether the mark was written for the model."""
        return self not in (EndReason.MARK, EndReason.STOP, EndReason.NONE)


@dataclass(frozen=True)
class SampledText:
    """New tokens, new text, or both.

    Text comes after its tokens where it may still become a mark, a stop string or a character.
    """

    phase: Phase
    text: str  # whole characters
    token_ids: TokenIds = ()
    logprobs: Logprobs = ()


@dataclass(frozen=True)
class BoundaryCrossed:
    """The context was reset, and the next chunk begins."""

    chunk: int  # chunks of thinking before the boundary
    carried_tokens: int  # of the context after the boundary
    reencoded_tokens: int  # prompt of the next chunk: the query and the carried tokens
    is_nudge: bool = False  # after a loop, whose repeats are not carried


@dataclass(frozen=True)
class ThinkingEnded:
    """The thinking is over; the answer follows, except after ``EndReason.STOP``."""

    reason: EndReason
    mark: str  # the mark, written by the model or for it; empty after ``EndReason.STOP``


@dataclass(frozen=True)
class ToolsCalled:
    """The calls of tools in the answer, which is over; comes for requests with tools alone."""

    content: str  # of the answer besides the calls
    calls: tuple[Mapping[str, Any], ...]  # in OpenAI's form


@dataclass(frozen=True)
class TraceUsage:
    """Tokens of a trace. Carried tokens count once, where they were sampled."""

    prompt_tokens: int = 0  # of the query
    reasoning_tokens: int = 0  # sampled thinking, the mark and written carryovers included
    answer_tokens: int = 0  # sampled after the mark
    carried_tokens: int = 0  # over all boundaries
    reencoded_tokens: int = 0  # prompts of the later chunks and of a separate answer
    chunks: int = 0  # of thinking
    boundaries: int = 0
    nudges: int = 0  # boundaries after a loop

    @property
    def completion_tokens(self) -> int:
        """Return the number of sampled tokens."""
        return self.reasoning_tokens + self.answer_tokens


@dataclass(frozen=True)
class TraceEnded:
    """The trace is over."""

    is_cut: bool  # the answer itself reached its limit
    reason: EndReason  # of the end of thinking
    usage: TraceUsage = field(default_factory=TraceUsage)
    stop_string: str | None = None  # the one that ended the trace


ThinkingEvent = SampledText | BoundaryCrossed | ThinkingEnded | ToolsCalled | TraceEnded
