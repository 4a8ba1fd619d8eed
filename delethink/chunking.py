"""Chunking: the carryover at each boundary, the size of each chunk, and the end of a trace.

This module is the only implementation of the chunk rule. It works on token ids, without torch, an
engine or a tokenizer. Letters in parentheses follow The Markovian Thinker (arXiv 2510.06557,
section 4.1 and algorithm 1). ``delethink.carryover`` has the policies for the carried tokens and
for early boundaries.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from delethink.carryover import Ask, Boundary, Carryover, HeadAndTail, HeadTail, name_of
from delethink.errors import CarryoverError, ConfigError, PolicyError, QueryTooLongError
from delethink.tokenization import Tokenizer
from delethink.tokens import as_token_ids
from delethink.types import ChunkRole, StopReason, TokenIds, TraceStop

_MAX_DEFAULT_HEAD = 100  # footnote 2 of the paper


@dataclass(frozen=True)
class ChunkSpec:
    """Sizes and policies for splitting thinking into chunks.

    Args:
        context_size: maximum thinking tokens in a context, carried and new ones together (C).
        carryover_size: maximum thinking tokens carried over a boundary (m), less than C.
        max_chunks: maximum number of chunks in a trace (I).
        head_size: number of carried tokens from the start of the trace, which may hold a plan. The
            other carried tokens are the latest ones. By default min(100, m // 4); the paper uses
            100 (footnote 2).
        head_outside: carry the head in addition to ``carryover_size``, as in the paper's listing. A
            context then holds up to ``head_size`` more tokens. By default the bound is exactly
            |q| + C, as in the code that trained the published models.
        carryover: policy instead of the head and tail; ``head_size`` does not apply to it.
        boundary: policy for ending chunks before they are full; by default none.

    Raises:
        ConfigError: the sizes leave no room for new tokens, or settings contradict each other.

    Example: ``ChunkSpec(8192, 4096, 5)`` has a budget of 24,576 tokens.
    """

    context_size: int
    carryover_size: int
    max_chunks: int
    head_size: int = None  # type: ignore[assignment]  # resolved to an int in __post_init__
    head_outside: bool = False
    carryover: Carryover | None = None
    boundary: Boundary | None = None

    def __post_init__(self) -> None:
        for name in ("context_size", "carryover_size", "max_chunks"):
            self._set(name, _to_int(name, getattr(self, name)))
        self._resolve_carryover()
        if self.context_size < 1 or self.max_chunks < 1:
            raise ConfigError(
                "context_size and max_chunks must be at least 1, "
                f"got {self.context_size} and {self.max_chunks}"
            )
        if not 0 <= self.carryover_size < self.context_size:
            raise ConfigError(
                "carryover_size must be at least 0 and less than context_size, so that a chunk "
                f"has room for new tokens: got carryover_size={self.carryover_size} "
                f"and context_size={self.context_size}"
            )
        if not self.is_longcot:
            self.effective_carryover.check(self.carryover_size, self.context_size)

    def _resolve_carryover(self) -> None:
        """Store a ``HeadTail`` in ``head_size`` and ``head_outside``, the form used by equality."""
        for name, base in (("carryover", Carryover), ("boundary", Boundary)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, base):
                raise ConfigError(
                    f"{name} must be an instance of a subclass of delethink.{base.__name__}, got "
                    f"{value!r:.200}; delethink.registry.make creates one from its name"
                )
        default = max(0, min(_MAX_DEFAULT_HEAD, self.carryover_size // 4))
        head = default if self.head_size is None else _to_int("head_size", self.head_size)
        # `dataclasses.replace` passes the resolved default on, so the default is no conflict.
        if self.carryover is not None and (self.head_outside or head not in (0, default)):
            raise ConfigError(
                "head_size and head_outside belong to the carryover 'head_tail': got them with "
                f"{name_of(self.carryover)!r}; remove them, or give them to the policy"
            )
        self._set("head_size", head if self.carryover is None else 0)
        if isinstance(self.carryover, HeadTail):
            self._set("head_size", self.carryover.head_size)
            self._set("head_outside", self.carryover.head_outside)
            self._set("carryover", None)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the only way in a frozen dataclass

    @classmethod
    def longcot(cls, budget: int) -> ChunkSpec:
        """Return the spec of ordinary chain of thought: one chunk (I = 1, C = the budget)."""
        return cls(context_size=budget, carryover_size=0, max_chunks=1, head_size=0)

    @property
    def is_longcot(self) -> bool:
        """Return whether a trace has one chunk, so that nothing is carried."""
        return self.max_chunks == 1

    @property
    def effective_carryover(self) -> Carryover:
        """Return ``carryover``, or the head and tail of ``head_size`` by default."""
        return self.carryover or HeadTail(self.head_size, self.head_outside)

    @property
    def budget(self) -> int:
        """Return the maximum number of sampled tokens: n = C + (I - 1)(C - m).

        A carryover written by the model adds its own tokens.
        """
        return self.thinking_budget + (self.max_chunks - 1) * self.max_written

    @property
    def thinking_budget(self) -> int:
        """Return the maximum number of thinking tokens: n without carryovers by the model."""
        return self.context_size + (self.max_chunks - 1) * (self.context_size - self.carryover_size)

    @property
    def ask(self) -> Ask | None:
        """Return the request for a carryover written by the model, or ``None``."""
        return None if self.is_longcot else self.effective_carryover.ask(self.carryover_size)

    @property
    def max_written(self) -> int:
        """Return the maximum number of tokens in a carryover written by the model."""
        return self.ask.max_new_tokens if self.ask else 0

    @property
    def max_carried(self) -> int | None:
        """Return the maximum number of carried tokens; ``None`` for a policy without a bound."""
        return 0 if self.is_longcot else self.effective_carryover.bound(self.carryover_size)

    @property
    def max_thinking_context(self) -> int:
        """Return the maximum number of tokens in a context besides the query.

        The result is C plus a head outside. A policy without a bound may hold all thinking. A
        carryover written by the model also needs room for the instruction and the text.
        """
        if self.is_longcot:
            return self.context_size
        carried = self.max_carried
        if carried is None:
            longest = self.thinking_budget
        else:
            longest = self.context_size + max(0, carried - self.carryover_size)
        return longest + (len(self.ask.prompt_ids) + self.max_written if self.ask else 0)

    def carry(self, head: TokenIds | None, window: TokenIds) -> HeadAndTail:
        """Return the head and tail selected by the carryover policy at a boundary.

        Args:
            head: the head of the trace, or ``None`` at the first boundary.
            window: the other thinking tokens of the context, carried ones first; or the carryover
                written by the model.

        Raises:
            CarryoverError: the policy returned more tokens than its bound, or no token ids.
        """
        policy = self.effective_carryover
        returned = policy.carry(head, window, self.carryover_size)
        try:
            head, tail = map(as_token_ids, returned)
        except (TypeError, ValueError):
            raise CarryoverError(
                f"the carryover {name_of(policy)!r} must return a head and a tail, each a sequence "
                f"of token ids; it returned {returned!r:.200}"
            ) from None
        bound, count = self.max_carried, len(head) + len(tail)
        if bound is not None and count > bound:
            raise CarryoverError(
                f"the carryover {name_of(policy)!r} returned {count} tokens; its bound is {bound}"
            )
        return head, tail

    def bind(self, tokenizer: Tokenizer) -> ChunkSpec:
        """Return the spec with a tokenizer for policies working on text."""
        carryover = self.carryover and self.carryover.bind(tokenizer)
        boundary = self.boundary and self.boundary.bind(tokenizer)
        if carryover is self.carryover and boundary is self.boundary:
            return self
        return replace(self, carryover=carryover, boundary=boundary)


@dataclass(frozen=True)
class ThinkingState:
    """Position of a trace: all inputs of the next prompt and its room.

    A boundary discards the context: the next prompt is ``query_ids + carried``. If the model writes
    the carryover, an extra chunk at the boundary samples it first.
    """

    spec: ChunkSpec
    query_ids: TokenIds
    head: TokenIds | None = None  # None before the first boundary
    tail: TokenIds = ()
    num_chunks: int = 0  # finished chunks of thinking
    num_sampled: int = 0  # sampled tokens, written carryovers included
    num_written: int = 0  # sampled tokens of written carryovers
    context: TokenIds | None = None  # finished thinking, while the model writes its carryover
    stop: TraceStop | None = None  # None until the trace ends

    @property
    def carried(self) -> TokenIds:
        """Return the thinking tokens at the start of the context."""
        return self.head + self.tail if self.head else self.tail

    @property
    def num_carried(self) -> int:
        """Return the number of carried tokens."""
        return len(self.tail) + (0 if self.head is None else len(self.head))

    @property
    def role(self) -> ChunkRole:
        """Return the purpose of the next chunk."""
        return ChunkRole.THINKING if self.context is None else ChunkRole.CARRYOVER

    @property
    def prompt_ids(self) -> TokenIds:
        """Return x_l, the prompt of the next chunk; after the end, the last prompt."""
        if self.context is None or (ask := self.spec.ask) is None:
            return self.query_ids + self.carried
        return self.query_ids + self.context + ask.prompt_ids

    @property
    def max_new_tokens(self) -> int:
        """Return the room of the next chunk: C, later C - (carried tokens); 0 after the end.

        A head outside and tokens carried beyond m do not reduce the room. The remaining budget
        limits it, which matters only after a chunk that ended early.
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
        """Return the maximum number of tokens still to sample; 0 after the end."""
        if self.stop is not None:
            return 0
        boundaries = self.spec.max_chunks - 1 - self.num_chunks
        if self.context is not None:
            boundaries += 1  # the carryover of the current boundary is not written yet
        return self._thinking_left + boundaries * self.spec.max_written

    @property
    def _thinking_left(self) -> int:
        return self.spec.thinking_budget - (self.num_sampled - self.num_written)

    def boundary_after(self, output_ids: TokenIds) -> bool:
        """Return whether an early boundary follows these first tokens of the next chunk."""
        boundary, room = self._boundary, self.max_new_tokens - len(output_ids)
        if boundary is None or not 0 < room <= boundary.within:
            return False
        return bool(boundary.ends(output_ids, room))

    @property
    def _boundary(self) -> Boundary | None:
        """Return the boundary policy of the next chunk; the last chunk of a trace has none."""
        is_last = self.num_chunks == self.spec.max_chunks - 1
        return None if is_last or self.context is not None else self.spec.boundary

    def truncate(self, output_ids: Sequence[int], stop: StopReason) -> tuple[TokenIds, StopReason]:
        """Return a chunk up to its early boundary, if any, and its stop reason.

        A boundary policy sees earlier tokens only. Tokens sampled beyond the boundary are therefore
        dropped without bias, as if the policy had stopped there.
        """
        output_ids = as_token_ids(output_ids)
        if self._boundary is None:
            return output_ids, stop
        first = max(1, self.max_new_tokens - self._boundary.within)
        for count in range(first, len(output_ids)):
            if self.boundary_after(output_ids[:count]):
                return output_ids[:count], StopReason.LENGTH
        return output_ids, stop

    def read_chunk(
        self, token_ids: Sequence[int], eos_ids: Collection[int]
    ) -> tuple[TokenIds, StopReason]:
        """Return the chunk at the start of a client's tokens, and its stop reason.

        It ends with the first token of ``eos_ids``, or at an early boundary; later tokens are
        dropped. Without either it leads to a boundary, also where the chunk is not full.
        """
        ids = as_token_ids(token_ids)
        end = next((i for i, token in enumerate(ids) if token in eos_ids), None)
        if end is None:
            return self.truncate(ids, StopReason.LENGTH)
        return self.truncate(ids[: end + 1], StopReason.EOS)

    def check(self, output_ids: TokenIds, stop: StopReason) -> None:
        """Check whether a chunk can have been sampled from this state.

        Raises:
            PolicyError: the trace has ended, the stop reason is unknown, or the chunk is empty, too
                long, or longer than its early boundary allows.
        """
        stop = _to_stop_reason(stop)
        if self.stop is not None:
            raise PolicyError(f"the trace has ended ({self.stop.value}) and accepts no more chunks")
        count = len(output_ids)
        if count > self.max_new_tokens:
            raise PolicyError(
                f"the policy returned {count} tokens for a chunk of at most {self.max_new_tokens}"
            )
        if not count and stop in (StopReason.EOS, StopReason.LENGTH):
            raise PolicyError(f"the policy returned no token and the stop reason {stop.value!r}")
        if self._boundary is not None and len(self.truncate(output_ids, stop)[0]) < count:
            raise PolicyError("the chunk continues beyond a boundary; shorten it with truncate()")

    def advance(self, output_ids: Sequence[int], stop: StopReason) -> ThinkingState:
        """Return the state after a chunk.

        Args:
            output_ids: the tokens sampled from ``prompt_ids``, EOS included, up to a boundary.
            stop: the reason the chunk ended. Only ``LENGTH`` leads to another chunk of thinking,
                also where the chunk is not full: an early boundary. A written carryover may also
                end with EOS.

        Raises:
            PolicyError: see ``check``.
            CarryoverError: the carryover policy broke its contract.
        """
        output_ids, stop = as_token_ids(output_ids), _to_stop_reason(stop)
        self.check(output_ids, stop)
        count = len(output_ids)
        if self.context is not None:  # the model wrote the carryover
            sampled, written = self.num_sampled + count, self.num_written + count
            state = replace(self, num_sampled=sampled, num_written=written)
            if stop in (StopReason.ABORT, StopReason.ERROR):
                return replace(state, stop=_TRACE_STOP[stop])
            text_ids = output_ids[:-1] if stop is StopReason.EOS else output_ids
            head, tail = self.spec.carry(self.head, text_ids)
            return replace(state, head=head, tail=tail, context=None)
        state = replace(self, num_chunks=self.num_chunks + 1, num_sampled=self.num_sampled + count)
        if stop is not StopReason.LENGTH:
            return replace(state, stop=_TRACE_STOP[stop])
        if state.num_chunks == self.spec.max_chunks or self._thinking_left == count:
            return replace(state, stop=TraceStop.BUDGET)
        if self.spec.ask is not None:
            return replace(state, context=self.carried + output_ids)
        head, tail = self.spec.carry(self.head, self.tail + output_ids)
        return replace(state, head=head, tail=tail)


_TRACE_STOP = {
    StopReason.EOS: TraceStop.COMPLETED,
    StopReason.ABORT: TraceStop.ABORTED,
    StopReason.ERROR: TraceStop.ERROR,
}


def start(
    spec: ChunkSpec, query_ids: Sequence[int], max_model_tokens: int | None = None
) -> ThinkingState:
    """Return the state of a trace before its first chunk.

    Args:
        spec: sizes and policies of the chunks.
        query_ids: q, the templated prompt.
        max_model_tokens: the longest sequence of the model, if known.

    Raises:
        QueryTooLongError: the query is empty, or the query and a full context exceed
            ``max_model_tokens``.
        ConfigError: a full context alone exceeds ``max_model_tokens``, or a policy reads text and
            has no tokenizer.
    """
    query_ids = as_token_ids(query_ids)
    for policy in (spec.effective_carryover, spec.boundary):
        if policy is not None and policy.unbound and not spec.is_longcot:
            raise ConfigError(
                f"{name_of(policy)!r} works on text: give the spec a tokenizer with "
                "spec.bind(tokenizer)"
            )
    room = None if max_model_tokens is None else max_model_tokens - spec.max_thinking_context
    if room is not None and room < 1:
        raise ConfigError(
            f"a context has up to {spec.max_thinking_context} thinking tokens and the model takes "
            f"{max_model_tokens}, so there is no room for a query; lower context_size"
        )
    if not query_ids:
        raise QueryTooLongError("the query is empty: it needs at least one token")
    if room is not None and len(query_ids) > room:
        raise QueryTooLongError(
            f"the query has {len(query_ids)} tokens and may have at most {room}: the model takes "
            f"{max_model_tokens} and a context has up to {spec.max_thinking_context} thinking "
            "tokens; shorten the query or lower context_size"
        )
    return ThinkingState(spec, query_ids)


def _to_int(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} must be a whole number, got {value!r}") from None


def _to_stop_reason(stop: StopReason | str) -> StopReason:
    """Convert a stop reason. An engine's own word must not continue a trace past its end."""
    try:
        return StopReason(stop)
    except ValueError:
        allowed = ", ".join(reason.value for reason in StopReason)
        raise PolicyError(f"unknown stop reason {stop!r}; allowed: {allowed}") from None
