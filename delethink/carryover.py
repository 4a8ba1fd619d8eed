"""Carryover policies and early boundaries: pure functions over token ids.

A carryover policy selects the thinking tokens for the start of the next context. It is pure: equal
arguments give equal results, regardless of earlier calls. Chunking enforces its bound at every
boundary. All policies but ``full`` are bounded by the carryover size m, so the state of a trace is
bounded (The Markovian Thinker, arXiv 2510.06557, section 4). A boundary policy ends a chunk early.

To add a policy, subclass ``Carryover`` or ``Boundary``; ``ChunkSpec`` accepts nothing else. A
recipe names the class as ``module:Class``. ``delethink.registry`` gives it a shorter name (groups
``delethink.carryovers`` and ``delethink.boundaries``). ``check_carryover`` and ``check_boundary``
of ``delethink.testing`` test it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, Self

from delethink.errors import ConfigError
from delethink.tokenization import Tokenizer, encode
from delethink.tokens import as_list
from delethink.types import TokenIds

HeadAndTail = tuple[TokenIds, TokenIds]


class Ask(NamedTuple):
    """Request for a carryover written by the model, sampled in an extra chunk at a boundary."""

    prompt_ids: TokenIds  # appended to the query and the thinking of the context
    max_new_tokens: int  # EOS included


class CarriedLength(NamedTuple):
    """Number of tokens carried over every boundary."""

    total: int  # head and tail together
    fixed: int = 0  # leading tokens equal at every boundary; a prefix cache holds them


class _ChunkPolicy:
    """Common part of carryover and boundary policies."""

    name: ClassVar[str] = ""  # the registered name; by default the name of the class

    def bind(self, tokenizer: Tokenizer) -> Self:
        """Return the policy with a tokenizer, if it reads or writes text."""
        return self

    @property
    def unbound(self) -> bool:
        """Return whether the policy still needs a tokenizer (``bind``)."""
        return False


@dataclass(frozen=True)
class _ReadsText(_ChunkPolicy):
    """Common part of policies that decode tokens."""

    tokenizer: Tokenizer | None = field(default=None, kw_only=True, repr=False, compare=False)

    def bind(self, tokenizer: Tokenizer) -> Self:
        return replace(self, tokenizer=tokenizer)

    @property
    def unbound(self) -> bool:
        return self.tokenizer is None

    def _decode(self, ids: TokenIds) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(as_list(ids)))


class Carryover(_ChunkPolicy):
    """Base class of carryover policies.

    Subclasses override ``carry``, and

    - ``bound``, if it is not m;
    - ``check``, for limits of m and C;
    - ``carried_length``, if the length is constant: else `delethink cost` refuses the policy.

    Example: ``HeadTail(head_size=1)`` with m=3. The first chunk is ``a b c d e f``. The second
    chunk starts from the query and ``a e f``, and samples ``g h i``:

        carry(None, "abcdef", 3) -> ("a", "ef")    no head yet; the window is the whole chunk
        carry("a", "efghi", 3)   -> ("a", "hi")    the window is the old tail and the new tokens
    """

    head_outside: bool = False  # whether the head does not count towards the context size C

    def carry(self, head: TokenIds | None, window: TokenIds, size: int) -> HeadAndTail:
        """Select the tokens for the start of the next context.

        Args:
            head: the head returned at the last boundary; ``None`` at the first boundary.
            window: the other thinking tokens of the context: the last tail, then the new tokens. If
                ``ask`` made the model write a carryover, that text instead, without EOS.
            size: the carryover size m.

        Returns:
            The head, which the next call receives unchanged, and the tail, with which the next
            window starts. The next context starts with the query, the head and the tail.
        """
        raise NotImplementedError

    def bound(self, size: int) -> int | None:
        """Return the maximum number of carried tokens for m=``size``; ``None`` for no bound."""
        return size

    def carried_length(self, size: int) -> CarriedLength | None:
        """Return the number of tokens carried over every boundary between full chunks.

        Cost estimates (``delethink.cost``) need a constant length; ``None``, the default, makes
        them refuse the policy.
        """
        return None

    def ask(self, size: int) -> Ask | None:
        """Return the request for a carryover written by the model; ``None`` if it writes none."""
        return None

    def check(self, size: int, context_size: int) -> None:
        """Raise a ``ConfigError`` if the policy cannot work with these m and C."""


def name_of(policy: object) -> str:
    """Return the name of a carryover or boundary policy for error texts."""
    return getattr(policy, "name", "") or type(policy).__name__


def last(ids: TokenIds, count: int) -> TokenIds:
    """Return the last ``count`` ids, or all if there are fewer. ``ids[-0:]`` would return all."""
    return ids[max(0, len(ids) - count) :]


@dataclass(frozen=True)
class Tail(Carryover):
    """Carry the last m tokens."""

    name: ClassVar[str] = "tail"

    def carry(self, head: TokenIds | None, window: TokenIds, size: int) -> HeadAndTail:
        """See ``Carryover``."""
        return window[:0], last(window, size)

    def carried_length(self, size: int) -> CarriedLength | None:
        """See ``Carryover``."""
        return CarriedLength(size)


@dataclass(frozen=True)
class HeadTail(Carryover):
    """Carry the first h tokens of the trace, which may hold a plan, and the last m - h tokens."""

    name: ClassVar[str] = "head_tail"
    head_size: int = 100  # h (footnote 2 of the paper); a shorter first chunk has a shorter head
    # carry the head in addition to m, as in the paper's listing. By default the bound is exactly m,
    # as in the code that trained the published models.
    head_outside: bool = False

    def __post_init__(self) -> None:
        if self.head_size < 0:
            raise ConfigError(f"head_size must be at least 0, got {self.head_size}")

    def carry(self, head: TokenIds | None, window: TokenIds, size: int) -> HeadAndTail:
        """See ``Carryover``."""
        if head is None:
            head, window = window[: self.head_size], window[self.head_size :]
        return head, last(window, size if self.head_outside else size - len(head))

    def bound(self, size: int) -> int:
        """See ``Carryover``."""
        return size + (self.head_size if self.head_outside else 0)

    def carried_length(self, size: int) -> CarriedLength | None:
        """See ``Carryover``."""
        return CarriedLength(self.bound(size), self.head_size)

    def check(self, size: int, context_size: int) -> None:
        """See ``Carryover``."""
        bound = "context_size" if self.head_outside else "carryover_size"
        most = context_size if self.head_outside else size
        if self.head_size > most:
            raise ConfigError(f"head_size must be at most {bound}={most}, got {self.head_size}")


@dataclass(frozen=True)
class Nothing(Carryover):
    """Carry no token: each chunk starts from the query alone."""

    name: ClassVar[str] = "none"

    def carry(self, head: TokenIds | None, window: TokenIds, size: int) -> HeadAndTail:
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
    """Carry every token, so that the context grows without bound.

    This is long chain of thought with the chunks, calls and budget of Markovian thinking, for
    comparisons. ``ChunkSpec.longcot`` is the same thinking in one call.
    """

    name: ClassVar[str] = "full"

    def carry(self, head: TokenIds | None, window: TokenIds, size: int) -> HeadAndTail:
        """See ``Carryover``."""
        return window[:0], window

    def bound(self, size: int) -> int | None:
        """See ``Carryover``."""
        return None


@dataclass(frozen=True)
class SinkWindow(Carryover):
    """Carry the first tokens of the trace as attention sinks, and a window of the latest tokens.

    This imitates streaming attention (Xiao et al., arXiv 2309.17453) in text. Streaming attention
    keeps keys and values and slides at every token; here tokens are encoded again at boundaries.
    Unlike the head of ``head_tail``, the sinks grow to ``num_sinks`` after a short first chunk.
    """

    name: ClassVar[str] = "sink_window"
    num_sinks: int = 4  # within m (4 in that paper)

    def carry(self, head: TokenIds | None, window: TokenIds, size: int) -> HeadAndTail:
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
                "num_sinks of the carryover 'sink_window' must be at least 0 and at most "
                f"carryover_size={size}, got {self.num_sinks}"
            )


@dataclass(frozen=True)
class StateBlock(_ReadsText, Carryover):
    """Carry the last block between two tags, tags included.

    Before the first block, the last m tokens are carried. A block longer than m is shortened to its
    last m tokens. A carried block is part of the window, so it stays until the next block.
    """

    name: ClassVar[str] = "state_block"
    opening: str = "<state>"  # the tag before a block
    closing: str = "</state>"  # the tag after a block

    def __post_init__(self) -> None:
        if not self.opening or not self.closing:
            raise ConfigError("the tags of the carryover 'state_block' must not be empty")

    def carry(self, head: TokenIds | None, window: TokenIds, size: int) -> HeadAndTail:
        """See ``Carryover``."""
        return window[:0], last(self._block(window) or window, size)

    def _block(self, window: TokenIds) -> TokenIds | None:
        """Return the tokens of the last complete block. The outer tokens may hold more text."""
        text = self._decode(window)
        start = text.rfind(self.opening, 0, max(0, text.rfind(self.closing)))
        if start < 0:
            return None
        end = text.find(self.closing, start + len(self.opening))
        # A tag may share a token with its neighbours. So the tags are searched in the text, and
        # token indices follow from the text length of each prefix of the window.
        counts = range(len(window) + 1)

        def text_length(count: int) -> int:
            return len(self._decode(window[:count]))

        first = bisect_right(counts, start, key=text_length) - 1
        stop = bisect_left(counts, end + len(self.closing), key=text_length)
        return window[first:stop]


@dataclass(frozen=True)
class Summary(Carryover):
    """Carry a summary written by the model at the boundary, as in InftyThink (arXiv 2503.06692).

    The summary is sampled after the query, the thinking of the context and the instruction. It is a
    chunk of the trace with its own log-probs and is trained like any other chunk. EOS ends the
    summary, never the trace.
    """

    name: ClassVar[str] = "summary"
    instruction: str = "\n\nLet me sum up the reasoning so far in a few sentences:\n"
    before: str = "Summary of the reasoning so far:\n"  # in the next context; counts towards m
    after: str = "\n\n"  # after the summary in the next context; counts towards m
    max_tokens: int | None = None  # of a summary; by default m without ``before`` and ``after``
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

    def carry(self, head: TokenIds | None, window: TokenIds, size: int) -> HeadAndTail:
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
                f"carryover_size={size} leaves no room for a summary: the texts before and after "
                f"it have {around} tokens; raise carryover_size or shorten these texts"
            )

    def _room(self, size: int) -> int:
        _, before, after = self._texts()
        room = size - len(before) - len(after)
        return room if self.max_tokens is None else min(room, self.max_tokens)

    def _texts(self) -> tuple[TokenIds, TokenIds, TokenIds]:
        if self.texts is None:
            raise ConfigError(
                "the carryover 'summary' needs a tokenizer before its sizes are known: call "
                "spec.bind(tokenizer)"
            )
        return self.texts


class Boundary(_ChunkPolicy):
    """Base class of policies that end a chunk early. Subclasses set ``within``, override ``ends``.

    The last chunk of a trace has no early boundary.
    """

    within: int  # a chunk may end early once at most this many tokens of its room are left

    def ends(self, output_ids: TokenIds, room: int) -> bool:
        """Return whether the chunk ends after ``output_ids``, its tokens so far.

        Args:
            output_ids: at least one token, without EOS.
            room: number of further tokens allowed in the chunk, 1 to ``within``.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class LineBreak(_ReadsText, Boundary):
    """End a chunk at the first line break among its last tokens."""

    name: ClassVar[str] = "line_break"
    within: int = 256  # maximum number of tokens by which a chunk is shortened
    text: str = "\n"  # the line break
    _breaks: dict[int, bool] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.within < 1 or not self.text:
            raise ConfigError(
                "the boundary 'line_break' needs within of at least 1 and a text, got "
                f"within={self.within} and text={self.text!r}"
            )

    def ends(self, output_ids: TokenIds, room: int) -> bool:
        """See ``Boundary``."""
        token = output_ids[-1]
        if token not in self._breaks:
            self._breaks[token] = self.text in self._decode((token,))
        return self._breaks[token]
