"""The chunk rule: what is carried over a border, how long a chunk may be, when a trace ends.

This is the only place that knows the rule. It is pure arithmetic over token ids: no tokenizer, no
torch, no engine. Letters in parentheses are those of The Markovian Thinker (arXiv 2510.06557,
section 4.1 and algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from delethink.errors import ConfigError, PolicyError, QueryTooLongError
from delethink.types import StopReason, TokenIds, TraceStop


@dataclass(frozen=True)
class ChunkSpec:
    """How thinking is cut into chunks.

    Args:
        context_size: thinking tokens that fit in a context, carried and new ones together (C).
        carryover_size: the most thinking tokens carried over a border (m), less than C.
        max_chunks: the most chunks of a trace (I).
        head_size: how many of the carried tokens are the first ones of the trace, which may hold a
            plan (footnote 2 of the paper: 100); the rest are the latest ones.
        head_outside: the head comes on top of ``carryover_size``, as in the paper's listing, so
            that a context holds up to ``head_size`` more tokens. Off, the bound is exactly |q| + C,
            as in the code that trained the published models.

    Raises:
        ConfigError: a combination that leaves no new token in a chunk, or no sense.

    Example: ``ChunkSpec(8192, 4096, 5)`` has a budget of 24,576 tokens.
    """

    context_size: int
    carryover_size: int
    max_chunks: int
    head_size: int = 100
    head_outside: bool = False

    def __post_init__(self) -> None:
        if self.context_size < 1 or self.max_chunks < 1:
            raise ConfigError(
                "context_size and max_chunks must be at least 1, "
                f"got {self.context_size} and {self.max_chunks}"
            )
        if not 0 <= self.carryover_size < self.context_size:
            raise ConfigError(
                f"carryover_size must be at least 0 and less than context_size, so that a chunk "
                f"has room for new tokens: got carryover_size={self.carryover_size} "
                f"and context_size={self.context_size}"
            )
        most = self.context_size if self.head_outside else self.carryover_size
        if self.head_size < 0 or (self.head_size > most and not self.is_longcot):
            bound = "context_size" if self.head_outside else "carryover_size"
            raise ConfigError(
                f"head_size must be at least 0 and at most {bound}={most}, got {self.head_size}"
            )

    @classmethod
    def longcot(cls, budget: int) -> ChunkSpec:
        """Ordinary chain of thought: the same rule with one chunk (I = 1, C = the whole budget)."""
        return cls(context_size=budget, carryover_size=0, max_chunks=1, head_size=0)

    @property
    def is_longcot(self) -> bool:
        """Whether there is one chunk only, so that nothing is ever carried."""
        return self.max_chunks == 1

    @property
    def budget(self) -> int:
        """The most sampled tokens of a trace: n = C + (I - 1)(C - m)."""
        return self.context_size + (self.max_chunks - 1) * (self.context_size - self.carryover_size)

    @property
    def max_thinking_context(self) -> int:
        """The most thinking tokens a context ever holds: C, and the head where it is outside."""
        outside = self.head_size if self.head_outside and not self.is_longcot else 0
        return self.context_size + outside

    def carry(self, head: TokenIds | None, window: TokenIds) -> tuple[TokenIds, TokenIds]:
        """What goes over a border.

        Args:
            head: the head of the trace, or ``None`` at the first border, where it is cut.
            window: the other thinking tokens of the context, carried ones first.

        Returns:
            The head and the tail, which are carried in this order.
        """
        if head is None:
            head, window = window[: self.head_size], window[self.head_size :]
        room = self.carryover_size - (0 if self.head_outside else len(head))
        return head, window[max(0, len(window) - room) :]


@dataclass(frozen=True)
class ThinkingState:
    """Where a trace stands: everything that decides what may be sampled next.

    A border throws the context away: the next prompt is ``query_ids + carried``, nothing else.
    """

    spec: ChunkSpec
    query_ids: TokenIds
    head: TokenIds | None = None  # None before the first border
    tail: TokenIds = ()
    num_chunks: int = 0  # chunks that have ended
    num_sampled: int = 0  # tokens sampled in them
    stop: TraceStop | None = None  # None while the trace goes on

    @property
    def carried(self) -> TokenIds:
        """The thinking tokens that the context starts with."""
        return (self.head or ()) + self.tail

    @property
    def prompt_ids(self) -> TokenIds:
        """x_l, what the policy sees when the next chunk starts; after the end, what it last saw."""
        return self.query_ids + self.carried

    @property
    def max_new_tokens(self) -> int:
        """How many tokens the next chunk may have: C, later C - (tokens carried).

        A head outside is not counted as carried. Never more than is left of the budget, which only
        matters where a chunk ended early; 0 after the end.
        """
        if self.stop is not None:
            return 0
        inside = len(self.tail if self.spec.head_outside else self.carried)
        return min(self.spec.context_size - inside, self.spec.budget - self.num_sampled)

    def advance(self, output_ids: TokenIds, stop: StopReason) -> ThinkingState:
        """The state after a chunk.

        Args:
            output_ids: the tokens sampled from ``prompt_ids``, EOS included.
            stop: why the chunk ended; only ``LENGTH`` leads to a next chunk. A chunk that is not
                full may end so too: that is an early border.

        Raises:
            PolicyError: more tokens than allowed, none at all where some are needed, an unknown
                stop reason, or a chunk after the end of the trace.
        """
        output_ids, stop = tuple(output_ids), _known(stop)
        self._check(output_ids, stop)
        after = replace(
            self,
            num_chunks=self.num_chunks + 1,
            num_sampled=self.num_sampled + len(output_ids),
            stop=_TRACE_STOP.get(stop),
        )
        if after.stop is not None:
            return after
        if after.num_chunks == self.spec.max_chunks or after.num_sampled == self.spec.budget:
            return replace(after, stop=TraceStop.BUDGET)
        head, tail = self.spec.carry(self.head, self.tail + output_ids)
        return replace(after, head=head, tail=tail)

    def _check(self, output_ids: TokenIds, stop: StopReason) -> None:
        if self.stop is not None:
            raise PolicyError(f"the trace has ended ({self.stop.value}); it takes no more chunks")
        if len(output_ids) > self.max_new_tokens:
            raise PolicyError(
                f"the policy returned {len(output_ids)} tokens for a chunk of at most "
                f"{self.max_new_tokens}"
            )
        if not output_ids and stop in (StopReason.EOS, StopReason.LENGTH):
            raise PolicyError(f"the policy returned no token and the stop reason {stop.value!r}")


_TRACE_STOP = {
    StopReason.EOS: TraceStop.COMPLETED,
    StopReason.ABORT: TraceStop.ABORTED,
    StopReason.ERROR: TraceStop.ERROR,
}


def _known(stop: StopReason | str) -> StopReason:
    """An engine that forgot to translate its own word must not think on past the end."""
    try:
        return StopReason(stop)
    except ValueError:
        allowed = ", ".join(reason.value for reason in StopReason)
        raise PolicyError(f"unknown stop reason {stop!r}; allowed: {allowed}") from None


def start(
    spec: ChunkSpec, query_ids: TokenIds, max_model_tokens: int | None = None
) -> ThinkingState:
    """The state of a trace that has not begun.

    Args:
        spec: how thinking is cut into chunks.
        query_ids: q, the templated prompt.
        max_model_tokens: the longest sequence that the model takes, if it is known.

    Raises:
        QueryTooLongError: the query and a whole context of thinking are longer than that, or the
            query is empty.
        ConfigError: a context of thinking alone is.
    """
    query_ids = tuple(query_ids)
    room = None if max_model_tokens is None else max_model_tokens - spec.max_thinking_context
    if room is not None and room < 1:
        raise ConfigError(
            f"a context of thinking has up to {spec.max_thinking_context} tokens and the model "
            f"takes {max_model_tokens}, so no query fits; lower context_size"
        )
    if not query_ids:
        raise QueryTooLongError("the query is empty: it has no token to start from")
    if room is not None and len(query_ids) > room:
        raise QueryTooLongError(
            f"the query has {len(query_ids)} tokens; with a context of thinking of up to "
            f"{spec.max_thinking_context} and a model that takes {max_model_tokens}, it may have "
            f"{room} at most"
        )
    return ThinkingState(spec, query_ids)
