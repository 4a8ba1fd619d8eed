"""Text of a stream of tokens: whole characters only, and no part of a text that is searched for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

_REPLACEMENT = "\ufffd"  # decoders write it for bytes that are no whole character
_LONGEST_WINDOW = 24  # tokens that are decoded again with the next ones
_KEPT_WINDOW = 8  # tokens whose text the next ones may depend on, such as bytes of a character


class TextStream:
    """Decodes tokens piece by piece. All pieces together are the text of all tokens.

    Args:
        decode: returns the text of token ids.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: tuple[int, ...] = ()
        self._given = 0  # characters of the window's text that were returned

    def push(self, token_ids: Iterable[int]) -> str:
        """Return the new text, without characters whose bytes are not all there yet."""
        self._window += tuple(token_ids)
        text = self._decode(self._window)
        end = len(text.rstrip(_REPLACEMENT))
        piece, self._given = text[self._given : end], max(self._given, end)
        if end == len(text) and len(self._window) > _LONGEST_WINDOW:
            self._shrink()
        return piece

    def _shrink(self) -> None:
        """Forget old tokens, if the text of the others alone ends alike."""
        kept = self._window[-_KEPT_WINDOW:]
        text = self._decode(kept)
        if not text.endswith(_REPLACEMENT):
            self._window, self._given = kept, len(text)

    def flush(self) -> str:
        """Return what was held back; the stream ends here."""
        text = self._decode(self._window)[self._given :]
        self._window, self._given = (), 0
        return text

    def copy(self) -> TextStream:
        """Return a stream with the same tokens so far."""
        other = TextStream(self._decode)
        other._window, other._given = self._window, self._given
        return other


def first_match(text: str, needles: Sequence[str]) -> tuple[int, str] | None:
    """Return the place and the text of the needle that ends first; ``None`` without a match."""
    found = [(at + len(needle), at, needle) for needle in needles if (at := text.find(needle)) >= 0]
    if not found:
        return None
    _, at, needle = min(found)
    return at, needle


def length_held_back(text: str, needles: Sequence[str]) -> int:
    """Return the number of characters at the end of a text with which a needle may begin."""
    longest = max(map(len, needles), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(needle.startswith(text[-length:]) for needle in needles):
            return length
    return 0
