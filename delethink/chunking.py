"""The chunk rule: what is carried over a boundary, how long a chunk may be, when a trace ends.

This is the only place that knows the rule. It is pure arithmetic over token ids: no torch, no
engine, and no tokenizer of its own. Letters in parentheses are those of The Markovian Thinker
(arXiv 2510.06557, section 4.1 and algorithm 1). What exactly is carried is a policy's
(``delethink.carryover``), where an early boundary falls another's (``delethink.carryover``).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from delethink.carryover import Ask, Boundary, Carryover, HeadTail, name_of
from delethink.errors import CarryoverError, ConfigError, PolicyError, QueryTooLongError
from delethink.tokenization import Tokenizer
from delethink.tokens import as_token_ids, is_block, token_array
from delethink.types import ChunkRole, StopReason, TokenIds, TraceStop

_MAX_DEFAULT_HEAD = 100  # footnote 2 of the paper
_UNSET = -1


@dataclass(frozen=True)
class ChunkSpec:
    """How thinking is cut into chunks.

    Args:
        context_size: thinking tokens that fit in a context, carried and new ones together (C).
        carryover_size: the most thinking tokens carried over a boundary (m), less than C.
        max_chunks: the most chunks of a trace (I).
        head_size: how many of the carried tokens are the first ones of the trace, which may hold a
            plan (footnote 2 of the paper); by default min(100, m // 4); the rest are the latest ones.
        head_outside: the head comes on top of ``carryover_size``, as in the paper's listing, so
            that a context holds up to ``head_size`` more tokens. Off, the bound is exactly |q| + C,
            as in the code that trained the published models.
        carryover: what is carried instead of such a head and tail; it has no use for ``head_size``.
        boundary: where a chunk that another follows may end before it is full; by default nowhere.

    Raises:
        ConfigError: a combination that leaves no new token in a chunk, or no sense.

    Example: ``ChunkSpec(8192, 4096, 5)`` has a budget of 24,576 tokens.
    """

    context_size: int
    carryover_size: int
    max_chunks: int
    head_size: int = _UNSET
    head_outside: bool = False
    carryover: Carryover | None = None
    boundary: Boundary | None = None
    effective_carryover: Carryover = field(
        init=False, repr=False, compare=False
    )  # `carryover`, or the default HeadTail

    def __post_init__(self) -> None:
        for name in ("context_size", "carryover_size", "max_chunks", "head_size"):
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
        self._set_effective_carryover()
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
        if not self.is_longcot:
            self.effective_carryover.check(self.carryover_size, self.context_size)

    def _set_effective_carryover(self) -> None:
        """One way to say it: a head and a tail are always ``head_size`` and ``head_outside``."""
        named = self.carryover
        for what, given, kind in (
            ("carryover", named, Carryover),
            ("boundary", self.boundary, Boundary),
        ):
            if given is not None and not isinstance(given, kind):
                raise ConfigError(
                    f"{what} must be a delethink.{what}.{kind.__name__}, got {given!r:.200}; "
                    f"delethink.registry.make finds one by its name"
                )
        if named is not None and (self.head_outside or self.head_size not in (0, _UNSET)):
            raise ConfigError(
                f"head_size and head_outside belong to the carryover 'head_tail': leave them out "
                f"beside {name_of(named)!r}, or give them to the policy"
            )
        if named is None and self.head_size == _UNSET:
            default = max(0, min(_MAX_DEFAULT_HEAD, self.carryover_size // 4))
            object.__setattr__(self, "head_size", default)
        if isinstance(named, HeadTail):
            object.__setattr__(self, "head_size", named.head_size)
            object.__setattr__(self, "head_outside", named.head_outside)
            object.__setattr__(self, "carryover", None)
        elif named is not None:
            object.__setattr__(self, "head_size", 0)
        policy = self.carryover or HeadTail(self.head_size, self.head_outside)
        object.__setattr__(self, "effective_carryover", policy)

    @classmethod
    def longcot(cls, budget: int) -> ChunkSpec:
        """Ordinary chain of thought: the same rule with one chunk (I = 1, C = the whole budget)."""
        return cls(context_size=budget, carryover_size=0, max_chunks=1, head_size=0)

    @property
    def is_longcot(self) -> bool:
        """Whether there is one chunk only, so that nothing is ever carried."""
        return self.max_chunks == 1

    @cached_property
    def budget(self) -> int:
        """The most sampled tokens of a trace: n = C + (I - 1)(C - m).

        Where the model writes what is carried, those tokens too.
        """
        return self.thinking_budget + (self.max_chunks - 1) * self.max_written

    @cached_property
    def thinking_budget(self) -> int:
        """The most tokens of thinking: n, without what the model writes to be carried."""
        return self.context_size + (self.max_chunks - 1) * (self.context_size - self.carryover_size)

    @cached_property
    def ask(self) -> Ask | None:
        """What the model is asked at a boundary, where it writes the carryover itself."""
        return None if self.is_longcot else self.effective_carryover.ask(self.carryover_size)

    @property
    def max_written(self) -> int:
        """The most tokens that the model writes at a boundary to be carried over it."""
        return self.ask.max_new_tokens if self.ask else 0

    @cached_property
    def max_carried(self) -> int | None:
        """The most tokens that are ever carried; ``None`` where a policy sets no bound."""
        return 0 if self.is_longcot else self.effective_carryover.bound(self.carryover_size)

    @property
    def max_thinking_context(self) -> int:
        """The most tokens that a context ever holds beside the query.

        C, and a head where it is outside. A policy without a bound may hold all thinking there is,
        and a model that is asked at a boundary needs room for the question and its answer.
        """
        if self.is_longcot:
            return self.context_size
        carried = self.max_carried
        if carried is None:
            most = self.thinking_budget
        else:
            most = self.context_size + max(0, carried - self.carryover_size)
        return most + (len(self.ask.prompt_ids) + self.max_written if self.ask else 0)

    def carry(self, head: TokenIds | None, window: TokenIds) -> tuple[TokenIds, TokenIds]:
        """What goes over a boundary, by this spec's policy and within its bound.

        Args:
            head: the head of the trace, or ``None`` at the first boundary.
            window: the other thinking tokens of the context, carried ones first; or what the model
                wrote to be carried.

        Returns:
            The head and the tail, which are carried in this order.

        Raises:
            CarryoverError: the policy returned more tokens than its bound, or no tokens.
        """
        returned = self.effective_carryover.carry(head, window, self.carryover_size)
        try:
            head, tail = map(as_token_ids, returned)
        except (TypeError, ValueError):
            raise CarryoverError(
                f"the carryover {name_of(self.effective_carryover)!r} must return a head and a tail, each a "
                f"sequence of token ids, and returned {returned!r:.200}"
            ) from None
        most, found = self.max_carried, len(head) + len(tail)
        if most is not None and found > most:
            raise CarryoverError(
                f"the carryover {name_of(self.effective_carryover)!r} returned {found} tokens and promised "
                f"{most} at most"
            )
        return head, tail

    def bind(self, tokenizer: Tokenizer) -> ChunkSpec:
        """The same spec, its policies able to read and write text.

        ``state_block``, ``summary`` and ``line_break`` need it; others are left as they are.
        """
        carryover = self.carryover and self.carryover.bind(tokenizer)
        boundary = self.boundary and self.boundary.bind(tokenizer)
        if carryover is self.carryover and boundary is self.boundary:
            return self
        return replace(self, carryover=carryover, boundary=boundary)


@dataclass(frozen=True)
class ThinkingState:
    """Where a trace stands: everything that decides what may be sampled next.

    A boundary throws the context away: the next prompt is ``query_ids + carried``, nothing else.
    Where the model writes the carryover itself, a chunk of its own at the boundary comes in
    between.
    """

    spec: ChunkSpec
    query_ids: TokenIds
    head: TokenIds | None = None  # None before the first boundary
    tail: TokenIds = ()
    num_chunks: int = 0  # chunks of thinking that have ended
    num_sampled: int = 0  # tokens sampled so far
    num_written: int = 0  # those of them that were written to be carried
    context: TokenIds | None = None  # thinking that ends, while the model writes what is carried
    stop: TraceStop | None = None  # None while the trace goes on

    @property
    def carried(self) -> TokenIds:
        """The thinking tokens that the context starts with."""
        return self.head + self.tail if self.head else self.tail

    @property
    def num_carried(self) -> int:
        """How many they are."""
        return len(self.tail) + (0 if self.head is None else len(self.head))

    @property
    def role(self) -> ChunkRole:
        """What the next chunk is for."""
        return ChunkRole.THINKING if self.context is None else ChunkRole.CARRYOVER

    @property
    def prompt_ids(self) -> TokenIds:
        """x_l, what the policy sees when the next chunk starts; after the end, what it last saw."""
        if self.context is None or (ask := self.spec.ask) is None:
            return self._after_query(self.carried)
        return self._after_query(self.context) + ask.prompt_ids

    def _after_query(self, thinking: TokenIds) -> TokenIds:
        """The query in the form that costs least to put before these ids, and they."""
        return (self._query_block if is_block(thinking) else self.query_ids) + thinking

    @cached_property
    def _query_block(self) -> TokenIds:
        """The same in every state of a trace: made of thousands of numbers only once."""
        return token_array(self.query_ids)

    @property
    def max_new_tokens(self) -> int:
        """How many tokens the next chunk may have: C, later C - (tokens carried).

        A head outside is not counted as carried, nor what a policy carries beyond m. Never more
        than is left of the budget, which only matters where a chunk ended early; 0 after the end.
        """
        if self.stop is not None:
            return 0
        if self.context is not None:
            return self.spec.max_written
        inside = len(self.tail) if self.spec.effective_carryover.head_outside else self.num_carried
        room = self.spec.context_size - min(inside, self.spec.carryover_size)
        return min(room, self._thinking_left)

    @property
    def budget_left(self) -> int:
        """The most tokens that may still be sampled; 0 after the end."""
        if self.stop is not None:
            return 0
        boundaries = self.spec.max_chunks - 1 - self.num_chunks
        if self.context is not None:
            boundaries += 1  # the one at hand
        return self._thinking_left + boundaries * self.spec.max_written

    @property
    def _thinking_left(self) -> int:
        return self.spec.thinking_budget - (self.num_sampled - self.num_written)

    def boundary_after(self, output_ids: TokenIds) -> bool:
        """Whether a boundary falls after these first tokens of a chunk before the chunk is full."""
        boundary, room = self._boundary, self.max_new_tokens - len(output_ids)
        if boundary is None or not 0 < room <= boundary.within:
            return False
        return bool(boundary.ends(output_ids, room))

    @property
    def _boundary(self) -> Boundary | None:
        """What may end the chunk at hand early: nothing where no next chunk of thinking follows."""
        last = self.num_chunks == self.spec.max_chunks - 1
        return None if last or self.context is not None else self.spec.boundary

    def cut(self, output_ids: Sequence[int], stop: StopReason) -> tuple[TokenIds, StopReason]:
        """A chunk up to its boundary, and why it ends there.

        A predicate that places boundaries early sees the tokens so far and no others, so what a
        policy sampled beyond one was never part of the trace, exactly as if it had stopped there.

        Args:
            output_ids: the tokens sampled from ``prompt_ids``.
            stop: why sampling ended.
        """
        output_ids = as_token_ids(output_ids)
        if self._boundary is None:
            return output_ids, stop
        first = max(1, self.max_new_tokens - self._boundary.within)
        for count in range(first, len(output_ids)):
            if self.boundary_after(output_ids[:count]):
                return output_ids[:count], StopReason.LENGTH
        return output_ids, stop

    def check(self, output_ids: TokenIds, stop: StopReason) -> None:
        """Refuses a chunk that cannot have been sampled from this state.

        Raises:
            PolicyError: more tokens than allowed or tokens beyond a boundary, none at all where
            some     are needed, an unknown stop reason, or a chunk after the end of the trace.
        """
        stop = _known(stop)
        if self.stop is not None:
            raise PolicyError(f"the trace has ended ({self.stop.value}); it takes no more chunks")
        count = len(output_ids)
        if count > self.max_new_tokens:
            raise PolicyError(
                f"the policy returned {count} tokens for a chunk of at most {self.max_new_tokens}"
            )
        if not count and stop in (StopReason.EOS, StopReason.LENGTH):
            raise PolicyError(f"the policy returned no token and the stop reason {stop.value!r}")
        if self._boundary is not None and len(self.cut(output_ids, stop)[0]) < count:
            raise PolicyError("the chunk goes on beyond a boundary; cut() tells where it ends")

    def advance(
        self, output_ids: Sequence[int], stop: StopReason, *, checked: bool = False
    ) -> ThinkingState:
        """The state after a chunk.

        Args:
            output_ids: the tokens sampled from ``prompt_ids``, EOS included, up to a boundary.
            stop: why the chunk ended; only ``LENGTH`` leads to a next chunk of thinking. A chunk
                that is not full may end so too: that is an early boundary. A chunk that writes what
                is carried may end with EOS, too.
            checked: ``check`` has been asked about this chunk.

        Raises:
            PolicyError: see ``check``.
            CarryoverError: the carryover policy broke its promise.
        """
        output_ids, stop = as_token_ids(output_ids), _known(stop)
        if not checked:
            self.check(output_ids, stop)
        count = len(output_ids)
        if self.context is not None:
            return self._after_writing(output_ids, stop, count)
        num_chunks, num_sampled = self.num_chunks + 1, self.num_sampled + count
        changes: dict[str, Any] = {"num_chunks": num_chunks, "num_sampled": num_sampled}
        if stop is not StopReason.LENGTH:
            changes["stop"] = _TRACE_STOP[stop]
        elif num_chunks == self.spec.max_chunks or self._thinking_left == count:
            changes["stop"] = TraceStop.BUDGET
        elif self.spec.ask is not None:
            changes["context"] = self.carried + output_ids
        else:
            window = self.tail + output_ids
            changes["head"], changes["tail"] = self.spec.carry(self.head, window)
        return self._with(changes)

    def _after_writing(self, output_ids: TokenIds, stop: StopReason, count: int) -> ThinkingState:
        changes: dict[str, Any] = {
            "num_sampled": self.num_sampled + count,
            "num_written": self.num_written + count,
        }
        if stop in (StopReason.ABORT, StopReason.ERROR):
            changes["stop"] = _TRACE_STOP[stop]
        else:
            written = output_ids[:-1] if stop is StopReason.EOS else output_ids
            changes["head"], changes["tail"] = self.spec.carry(self.head, written)
            changes["context"] = None
        return self._with(changes)

    def _with(self, changes: dict[str, Any]) -> ThinkingState:
        """This state but for some fields; ``dataclasses.replace`` would look at each one anew."""
        after = object.__new__(ThinkingState)
        own = after.__dict__
        own.update(self.__dict__)
        own.update(changes)
        return after


_TRACE_STOP = {
    StopReason.EOS: TraceStop.COMPLETED,
    StopReason.ABORT: TraceStop.ABORTED,
    StopReason.ERROR: TraceStop.ERROR,
}


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} must be a whole number, got {value!r}") from None


def _known(stop: StopReason | str) -> StopReason:
    """An engine that forgot to translate its own word must not think on past the end."""
    if type(stop) is StopReason:
        return stop
    try:
        return StopReason(stop)
    except ValueError:
        allowed = ", ".join(reason.value for reason in StopReason)
        raise PolicyError(f"unknown stop reason {stop!r}; allowed: {allowed}") from None


def start(
    spec: ChunkSpec, query_ids: Sequence[int], max_model_tokens: int | None = None
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
    query_ids = as_token_ids(query_ids)
    _check_bound(spec)
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


def _check_bound(spec: ChunkSpec) -> None:
    """Refuse a policy that reads text and has no tokenizer, before a trace begins."""
    for policy in (spec.effective_carryover, spec.boundary):
        if policy is not None and policy.unbound and not spec.is_longcot:
            raise ConfigError(
                f"{name_of(policy)!r} works on text: give the spec a tokenizer with "
                "spec.bind(tokenizer)"
            )
