"""Where a border falls before a chunk is full.

By default a chunk ends when it has all the tokens that it may have. A border policy may end it
earlier, by a predicate on the tokens so far. A predicate never sees what comes later: a border that
was moved back once the chunk is full would depend on tokens that it then throws away, and the
gradient of a policy that never sees them counted would be biased.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from delethink.errors import ConfigError
from delethink.query import Tokenizer
from delethink.types import TokenIds


class Border:
    """Base of the border policies; a new one overrides ``ends``."""

    name: ClassVar[str] = ""  # what errors call it; by default the class's own name
    within: int  # a border may fall where at most so many tokens of the chunk's room are left

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
class LineBreak(Border):
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
                f"the border 'line_break' wants within of at least 1 and a text, got "
                f"within={self.within} and text={self.text!r}"
            )

    def bind(self, tokenizer: Tokenizer) -> LineBreak:
        """See ``Border``."""
        return replace(self, tokenizer=tokenizer)

    @property
    def unbound(self) -> bool:
        """See ``Border``."""
        return self.tokenizer is None

    def ends(self, output_ids: TokenIds, room: int) -> bool:
        """See ``Border``."""
        token = output_ids[-1]
        if token not in self._known:
            assert self.tokenizer is not None
            self._known[token] = self.text in str(self.tokenizer.decode([token]))
        return self._known[token]
