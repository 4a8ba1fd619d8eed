"""What goes over a boundary: carryover policies, pure functions over token ids.

A policy is handed the thinking of the context that ends and says which tokens the next one starts
with. It is pure (the same tokens give the same answer, whatever was asked before) and states a
bound, which the rule checks at every boundary. All but ``full`` are bounded by the carryover size
m, so that the state of a trace is bounded (The Markovian Thinker, arXiv 2510.06557, section 4).

Policies are chosen by name (``delethink.registry``, group ``delethink.carryovers``); anybody's
class with these methods is one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, Self

from delethink.errors import ConfigError
from delethink.tokenization import Tokenizer, encode
from delethink.tokens import as_list
from delethink.types import TokenIds


class Ask(NamedTuple):
    """An extra call of the model at a boundary, in which it writes what is carried."""

    prompt_ids: TokenIds  # put after the query and the thinking of the context
    max_new_tokens: int  # the most tokens of the answer, EOS included


class CarriedLength(NamedTuple):
    """Number of tokens that a policy carries over every boundary."""

    total: int  # head and tail together
    fixed: int = 0  # leading tokens that never change, so that a prefix cache holds them


class Carryover:
    """Base of the policies; a new one overrides ``carry``, and ``bound`` where it is not m."""

    name: ClassVar[str] = ""  # what errors call it; by default the class's own name
    head_outside: bool = False  # whether the head is left out where the context is counted

    def carry(
        self, head: TokenIds | None, window: TokenIds, size: int
    ) -> tuple[TokenIds, TokenIds]:
        """What goes over a boundary.

        Args:
            head: what this policy returned as head at the boundary before; ``None`` at the first.
            window: the other thinking tokens of the context, carried ones first. Where the model
                was asked, its answer instead, EOS left out.
            size: the carryover size m.

        Returns:
            A head, which is handed back at the next boundary, and a tail, which becomes part of the
            window there. The next context starts with both in this order.
        """
        raise NotImplementedError

    def bound(self, size: int) -> int | None:
        """The most tokens that ``carry`` ever returns, head and tail together; ``None`` for any."""
        return size

    def carried_length(self, size: int) -> CarriedLength | None:
        """Return the number of tokens carried over every boundary between full chunks.

        Cost estimates (``delethink.cost``) need a constant length; ``None``, the default, makes
        them refuse the policy.
        """
        return None

    def ask(self, size: int) -> Ask | None:
        """What the model is asked at a boundary, if it writes the carryover itself."""
        return None

    def check(self, size: int, context_size: int) -> None:
        """Raises a ``ConfigError`` where the policy cannot work with such sizes, m and C."""

    def bind(self, tokenizer: Tokenizer) -> Self:
        """The policy, able to read and write text; itself where it has no need to."""
        return self

    @property
    def unbound(self) -> bool:
        """Whether it has to be bound to a tokenizer first."""
        return False


def name_of(policy: object) -> str:
    """What an error calls a policy or a boundary."""
    return getattr(policy, "name", "") or type(policy).__name__


def last(ids: TokenIds, count: int) -> TokenIds:
    """The last ``count`` ids, or all where there are fewer; unlike ``ids[-count:]`` also for 0."""
    return ids[max(0, len(ids) - count) :]


@dataclass(frozen=True)
class Tail(Carryover):
    """The last m tokens."""

    name: ClassVar[str] = "tail"

    def carry(
        self, head: TokenIds | None, window: TokenIds, size: int
    ) -> tuple[TokenIds, TokenIds]:
        """See ``Carryover``."""
        return window[:0], last(window, size)

    def carried_length(self, size: int) -> CarriedLength | None:
        """See ``Carryover``."""
        return CarriedLength(size)


@dataclass(frozen=True)
class HeadTail(Carryover):
    """The first h tokens of the trace, which may hold a plan, and the last m - h: the paper's runs.

    Args:
        head_size: h (footnote 2 of the paper: 100). A first chunk that is shorter has a shorter
        head. head_outside: the head comes on top of m, as in the paper's listing, so that a context
            holds up to h more tokens. Off, the bound is exactly m, as in the code that trained the
            published models.
    """

    name: ClassVar[str] = "head_tail"
    head_size: int = 100
    head_outside: bool = False

    def __post_init__(self) -> None:
        if self.head_size < 0:
            raise ConfigError(f"head_size must be at least 0, got {self.head_size}")

    def carry(
        self, head: TokenIds | None, window: TokenIds, size: int
    ) -> tuple[TokenIds, TokenIds]:
        """See ``Carryover``."""
        if head is None:
            head, window = window[: self.head_size], window[self.head_size :]
        return head, last(window, size if self.head_outside else size - len(head))

    def bound(self, size: int) -> int | None:
        """See ``Carryover``."""
        return size + (self.head_size if self.head_outside else 0)

    def carried_length(self, size: int) -> CarriedLength | None:
        """See ``Carryover``."""
        return CarriedLength(size + (self.head_size if self.head_outside else 0), self.head_size)

    def check(self, size: int, context_size: int) -> None:
        """See ``Carryover``."""
        bound = "context_size" if self.head_outside else "carryover_size"
        most = context_size if self.head_outside else size
        if self.head_size > most:
            raise ConfigError(f"head_size must be at most {bound}={most}, got {self.head_size}")


@dataclass(frozen=True)
class Nothing(Carryover):
    """No token at all: each chunk starts from the query alone."""

    name: ClassVar[str] = "none"

    def carry(
        self, head: TokenIds | None, window: TokenIds, size: int
    ) -> tuple[TokenIds, TokenIds]:
        """See ``Carryover``."""
        return window[:0], window[:0]

    def bound(self, size: int) -> int | None:
        """See ``Carryover``."""
        return 0

    def carried_length(self, size: int) -> CarriedLength | None:
        """See ``Carryover``."""
        return CarriedLength(0)


@dataclass(frozen=True)
class Full(Carryover):
    """Every token: nothing is ever forgotten, and the context grows without bound, on purpose.

    Long chain of thought with the chunks, the calls and the budget of the rule that it is held
    against; ``ChunkSpec.longcot`` is the same thinking in one call.
    """

    name: ClassVar[str] = "full"

    def carry(
        self, head: TokenIds | None, window: TokenIds, size: int
    ) -> tuple[TokenIds, TokenIds]:
        """See ``Carryover``."""
        return window[:0], window

    def bound(self, size: int) -> int | None:
        """See ``Carryover``."""
        return None


@dataclass(frozen=True)
class SinkWindow(Carryover):
    """The first tokens of the trace as attention sinks, and a window of the latest ones.

    A stand-in in text for streaming attention (Xiao et al., arXiv 2309.17453), which keeps the keys
    and values of such tokens and slides at every token: here they are encoded anew, at boundaries.
    Unlike the head of ``head_tail``, the sinks are the first tokens however early a boundary fell.

    Args:
        num_sinks: how many, within m (4 in that paper).
    """

    name: ClassVar[str] = "sink_window"
    num_sinks: int = 4

    def carry(
        self, head: TokenIds | None, window: TokenIds, size: int
    ) -> tuple[TokenIds, TokenIds]:
        """See ``Carryover``."""
        sinks = window[:0] if head is None else head
        missing = self.num_sinks - len(sinks)
        sinks, window = sinks + window[:missing], window[missing:]
        return sinks, last(window, size - len(sinks))

    def carried_length(self, size: int) -> CarriedLength | None:
        """See ``Carryover``."""
        return CarriedLength(size, self.num_sinks)

    def check(self, size: int, context_size: int) -> None:
        """See ``Carryover``."""
        if not 0 <= self.num_sinks <= size:
            raise ConfigError(
                f"num_sinks of the carryover 'sink_window' must be at least 0 and at most "
                f"carryover_size={size}, got {self.num_sinks}"
            )


@dataclass(frozen=True)
class StateBlock(Carryover):
    """What the model last wrote between two tags, tags included; the last m tokens until it does.

    A block longer than m is cut to its last m tokens. A block that was carried counts as written,
    so a state stays until the model writes another.

    Args:
        opening: the tag before a state.
        closing: the tag after it.
    """

    name: ClassVar[str] = "state_block"
    opening: str = "<state>"
    closing: str = "</state>"
    tokenizer: Tokenizer | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.opening or not self.closing:
            raise ConfigError("the tags of the carryover 'state_block' must not be empty")

    def bind(self, tokenizer: Tokenizer) -> StateBlock:
        """See ``Carryover``."""
        return replace(self, tokenizer=tokenizer)

    @property
    def unbound(self) -> bool:
        """See ``Carryover``."""
        return self.tokenizer is None

    def carry(
        self, head: TokenIds | None, window: TokenIds, size: int
    ) -> tuple[TokenIds, TokenIds]:
        """See ``Carryover``."""
        return window[:0], last(self._block(window) or window, size)

    def _block(self, window: TokenIds) -> TokenIds | None:
        """The tokens of the last whole block; those at its ends may hold a little more than it."""
        text = self._decode(window)
        start, end = text.rfind(self.opening), -1
        while start >= 0:
            end = text.find(self.closing, start + len(self.opening))
            if end >= 0:
                break
            start = text.rfind(self.opening, 0, start)
        if start < 0:
            return None
        # Tags may share a token with what is beside them, so they are found in the text, and the
        # tokens by how much text they reach.
        places, reach = range(len(window) + 1), self._reach(window)
        first = bisect_right(places, start, key=reach) - 1
        stop = bisect_left(places, end + len(self.closing), key=reach)
        return window[first:stop]

    def _reach(self, window: TokenIds) -> Callable[[int], int]:
        return lambda count: len(self._decode(window[:count]))

    def _decode(self, ids: TokenIds) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(as_list(ids)))


@dataclass(frozen=True)
class Summary(Carryover):
    """What the model writes when it is asked for a summary at the boundary.

    In the manner of InftyThink (arXiv 2503.06692). The answer is sampled after the query, the
    thinking of the context and the instruction; it is a chunk of the trace with its own log-probs
    and is trained like any other. EOS ends the summary there, never the trace.

    Args:
        instruction: put after the thinking; the model goes on from it.
        before: put before the summary in the next context; it counts within m.
        after: put after it; it counts within m.
        max_tokens: of a summary; by default what m leaves beside ``before`` and ``after``.
    """

    name: ClassVar[str] = "summary"
    instruction: str = "\n\nLet me sum up the reasoning so far in a few sentences:\n"
    before: str = "Summary of the reasoning so far:\n"
    after: str = "\n\n"
    max_tokens: int | None = None
    texts: tuple[TokenIds, TokenIds, TokenIds] | None = field(default=None, repr=False)

    def bind(self, tokenizer: Tokenizer) -> Summary:
        """See ``Carryover``."""
        parts = (self.instruction, self.before, self.after)
        ids = [encode(tokenizer, part) if part else () for part in parts]
        return replace(self, texts=(ids[0], ids[1], ids[2]))

    @property
    def unbound(self) -> bool:
        """See ``Carryover``."""
        return self.texts is None

    def ask(self, size: int) -> Ask | None:
        """See ``Carryover``."""
        instruction, _, _ = self._texts()
        return Ask(instruction, self._room(size))

    def carry(
        self, head: TokenIds | None, window: TokenIds, size: int
    ) -> tuple[TokenIds, TokenIds]:
        """See ``Carryover``."""
        _, before, after = self._texts()
        return window[:0], before + window[: self._room(size)] + after

    def check(self, size: int, context_size: int) -> None:
        """See ``Carryover``."""
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(
                f"max_tokens of the carryover 'summary' must be at least 1, got {self.max_tokens}"
            )
        if self.texts is not None and self._room(size) < 1:
            around = sum(map(len, self.texts[1:]))
            raise ConfigError(
                f"carryover_size={size} leaves no room for a summary: what is put around it has "
                f"{around} tokens; raise carryover_size or shorten before and after"
            )

    def _room(self, size: int) -> int:
        _, before, after = self._texts()
        room = size - len(before) - len(after)
        return room if self.max_tokens is None else min(room, self.max_tokens)

    def _texts(self) -> tuple[TokenIds, TokenIds, TokenIds]:
        if self.texts is None:
            raise ConfigError(
                "the carryover 'summary' has no sizes before it is bound to a tokenizer: "
                "spec.bind(tokenizer)"
            )
        return self.texts


class Boundary:
    """Base of the boundary policies; a new one overrides ``ends``."""

    name: ClassVar[str] = ""  # what errors call it; by default the class's own name
    within: int  # a boundary may fall where at most so many tokens of the chunk's room are left

    def ends(self, output_ids: TokenIds, room: int) -> bool:
        """Whether the chunk ends after ``output_ids``, its tokens so far.

        Args:
            output_ids: at least one token, EOS not among them.
            room: how many more it may have, 1 to ``within``.
        """
        raise NotImplementedError

    def bind(self, tokenizer: Tokenizer) -> Self:
        """The policy, able to read text; itself where it has no need to."""
        return self

    @property
    def unbound(self) -> bool:
        """Whether it has to be bound to a tokenizer first."""
        return False


@dataclass(frozen=True)
class LineBreak(Boundary):
    """At a line break within the last tokens of a chunk: the first one there ends it.

    Args:
        within: how many last tokens of a chunk may be given up for it.
        text: what counts as a line break.
    """

    name: ClassVar[str] = "line_break"
    within: int = 256
    text: str = "\n"
    tokenizer: Tokenizer | None = field(default=None, repr=False, compare=False)
    _known: dict[int, bool] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.within < 1 or not self.text:
            raise ConfigError(
                f"the boundary 'line_break' wants within of at least 1 and a text, got "
                f"within={self.within} and text={self.text!r}"
            )

    def bind(self, tokenizer: Tokenizer) -> LineBreak:
        """See ``Boundary``."""
        return replace(self, tokenizer=tokenizer)

    @property
    def unbound(self) -> bool:
        """See ``Boundary``."""
        return self.tokenizer is None

    def ends(self, output_ids: TokenIds, room: int) -> bool:
        """See ``Boundary``."""
        token = output_ids[-1]
        if token not in self._known:
            assert self.tokenizer is not None
            self._known[token] = self.text in str(self.tokenizer.decode([token]))
        return self._known[token]
