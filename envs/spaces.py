"""Gymnasium spaces for token sequences and Unicode text, and a character tokenizer.

Gymnasium's ``Sequence`` has no maximum length, and its ``Text`` allows English letters and digits.
Both spaces also work in ``AsyncVectorEnv`` with shared memory, its default.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import gymnasium
import numpy as np
from gymnasium.vector.utils import (
    create_shared_memory,
    read_from_shared_memory,
    write_to_shared_memory,
)
from numpy.typing import NDArray

from delethink.errors import ConfigError
from delethink.types import END_OF_THINKING

Ids = NDArray[np.int64]
Sample = TypeVar("Sample")

_SURROGATES = range(0xD800, 0xE000)  # halves of characters, invalid in text
_SCRIPTS = (
    range(0x20, 0x7F),  # English
    range(0x09, 0x0B),  # tab and line break
    range(0xA1, 0x530),  # other Latin, Greek and Cyrillic
    range(0x590, 0xE00),  # Hebrew, Arabic and Indic
    range(0x2000, 0x2400),  # punctuation, and invisible marks
    range(0x4E00, 0xA000),  # Chinese
    range(0x1F300, 0x1FAFF),  # emoji
    range(0x1, 0x110000),  # any
)


class _BoundedSpace(gymnasium.Space[Sample]):
    """Base of spaces with samples of ``min_length`` to ``max_length`` entries."""

    def __init__(
        self, dtype: Any, max_length: int, min_length: int, seed: int | None, sample: int | None
    ) -> None:
        super().__init__(shape=None, dtype=dtype, seed=seed)
        self.min_length, self.max_length = min_length, max_length
        self.sample_length = max_length if sample is None else sample

    def _draw_length(self, mask: Any) -> int:
        longest = self.sample_length if mask is None else min(int(mask), self.max_length)
        return int(self.np_random.integers(self.min_length, max(longest, self.min_length) + 1))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and repr(self) == repr(other)


class TokenSequence(_BoundedSpace[Ids]):
    """Sequences of ``min_length`` to ``max_length`` token ids below ``vocabulary``.

    ``sample_length`` is the maximum length of samples without a mask, by default ``max_length``.
    Action spaces use a length legal in every chunk.
    """

    def __init__(
        self,
        vocabulary: int,
        max_length: int,
        min_length: int = 0,
        seed: int | None = None,
        sample_length: int | None = None,
    ) -> None:
        super().__init__(np.int64, max_length, min_length, seed, sample_length)
        self.vocabulary = vocabulary

    def sample(self, mask: Any = None, probability: Any = None) -> Ids:
        """Return a sequence of random length and tokens.

        Args:
            mask: maximum length instead of ``sample_length``, such as ``info["max_new_tokens"]``.
            probability: probability of each token [vocabulary]; by default uniform.
        """
        length = self._draw_length(mask)
        if probability is not None:
            return self.np_random.choice(self.vocabulary, length, p=probability)
        return self.np_random.integers(0, self.vocabulary, length)

    def contains(self, x: Any) -> bool:
        """Return whether ``x`` is a one-dimensional sequence of ids of allowed length and range."""
        try:
            ids = np.asarray(x)
        except (TypeError, ValueError, RuntimeError):  # ragged, or a tensor on another device
            return False
        if ids.ndim != 1 or not self.min_length <= len(ids) <= self.max_length:
            return False
        if len(ids) == 0:
            return True
        if ids.dtype == np.int64:  # a negative id is too large when read as unsigned
            return bool(ids.view(np.uint64).max() < self.vocabulary)
        whole = np.issubdtype(ids.dtype, np.integer)
        return bool(whole and 0 <= ids.min() and ids.max() < self.vocabulary)

    def to_jsonable(self, sample_n: Iterable[Ids]) -> list[Any]:
        """Return lists of numbers."""
        return [np.asarray(ids).tolist() for ids in sample_n]

    def from_jsonable(self, sample_n: list[Any]) -> list[Any]:
        """Return the samples given to ``to_jsonable``."""
        return [np.asarray(ids, dtype=np.int64) for ids in sample_n]

    def __repr__(self) -> str:
        return f"TokenSequence({self.vocabulary}, {self.max_length}, {self.min_length})"


class UnicodeText(_BoundedSpace[str]):
    """Text of ``min_length`` to ``max_length`` characters.

    Args:
        pieces: pieces of a text, for a tokenizer with a fixed alphabet; by default all of Unicode.
        sample_length: maximum number of pieces or characters in samples; by default ``max_length``.
    """

    def __init__(
        self,
        max_length: int,
        min_length: int = 0,
        pieces: Iterable[str] | None = None,
        seed: int | None = None,
        sample_length: int | None = None,
    ) -> None:
        super().__init__(str, max_length, min_length, seed, sample_length)
        self.pieces = None if pieces is None else tuple(pieces)
        self._pattern = None if self.pieces is None else piece_pattern(self.pieces, "*+")

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """Return a random text of at most ``mask`` pieces or characters."""
        text = ""
        for piece in [self._draw() for _ in range(self._draw_length(mask))]:
            if len(text) + len(piece) <= self.max_length:
                text += piece
        if len(text) < self.min_length:  # pieces were too long for the rest
            shortest = min(self.pieces or "?", key=len)
            text += shortest * -(-(self.min_length - len(text)) // len(shortest))
        return text

    def _draw(self) -> str:
        if self.pieces is not None:
            return self.pieces[int(self.np_random.integers(len(self.pieces)))]
        script = _SCRIPTS[int(self.np_random.integers(len(_SCRIPTS)))]
        while (code := script[int(self.np_random.integers(len(script)))]) in _SURROGATES:
            continue
        return chr(code)

    def contains(self, x: Any) -> bool:
        """Return whether ``x`` is a text of allowed length and known pieces."""
        if not isinstance(x, str) or not self.min_length <= len(x) <= self.max_length:
            return False
        if self._pattern is not None:
            return self._pattern.fullmatch(x) is not None
        try:
            x.encode()
            return True
        except UnicodeEncodeError:  # a lone surrogate
            return False

    def __repr__(self) -> str:
        return f"UnicodeText({self.max_length}, {self.min_length}, {self.pieces})"


def piece_pattern(pieces: Iterable[str], times: str = "") -> re.Pattern[str]:
    """Return a pattern for pieces, longest first."""
    longest_first = sorted(pieces, key=len, reverse=True)
    return re.compile(f"(?:{'|'.join(map(re.escape, longest_first))}){times}")


class _Rows(Sequence[Any]):
    """Observations of all environments in shared memory, read on access.

    A vector environment reads shared memory once, at its start, and expects the result to follow
    later changes. A copy holds the current observations.
    """

    def __init__(self, space: TokenSequence | UnicodeText, memory: Any, count: int) -> None:
        self._space, self._memory, self._count = space, memory, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self)[index]
        row = _row(self._space, self._memory, range(self._count)[index])
        kept = row[1 : 1 + row[0]].copy()
        return kept if isinstance(self._space, TokenSequence) else _text(kept)

    def __deepcopy__(self, memo: Any) -> tuple[Any, ...]:
        return tuple(self)


def _row(space: TokenSequence | UnicodeText, memory: Any, index: int) -> Any:
    """Return the memory of one environment: a count, then that many numbers."""
    dtype = np.int64 if isinstance(space, TokenSequence) else np.uint32
    width = 1 + space.max_length
    return np.frombuffer(memory.get_obj(), dtype=dtype)[index * width : (index + 1) * width]


def _text(codes: Any) -> str:
    return bytes(codes.astype("<u4").tobytes()).decode("utf-32-le")


@create_shared_memory.register(TokenSequence)
@create_shared_memory.register(UnicodeText)
def _create(space: TokenSequence | UnicodeText, n: int = 1, ctx: Any = None) -> Any:
    kind = "q" if isinstance(space, TokenSequence) else "I"
    return ctx.Array(kind, n * (1 + space.max_length))


@read_from_shared_memory.register(TokenSequence)
@read_from_shared_memory.register(UnicodeText)
def _read(space: TokenSequence | UnicodeText, shared_memory: Any, n: int = 1) -> _Rows:
    return _Rows(space, shared_memory, n)


@write_to_shared_memory.register(TokenSequence)
@write_to_shared_memory.register(UnicodeText)
def _write(space: TokenSequence | UnicodeText, index: int, values: Any, shared_memory: Any) -> None:
    if isinstance(values, str):
        values = np.frombuffer(values.encode("utf-32-le"), dtype="<u4")
    row = _row(space, shared_memory, index)
    row[0] = len(values)
    row[1 : 1 + len(values)] = values


PAD, EOS, THINK = "<pad>", "<eos>", "<think>"
MARKS = (PAD, EOS, THINK, END_OF_THINKING)


class CharacterTokenizer:
    """Tokenizer with one token per special mark and per character of an alphabet.

    Marks have the first ids: 0 is padding, 1 is EOS. The defaults match the toy reasoner shipped
    with the library.

    Args:
        alphabet: the characters, without duplicates.
        before_thinking: text between the prompt and the thinking.
    """

    pad_token_id = MARKS.index(PAD)
    eos_token_id = MARKS.index(EOS)

    def __init__(self, alphabet: str = "\n:0123456789", before_thinking: str = THINK) -> None:
        if not isinstance(alphabet, str) or len(set(alphabet)) < len(alphabet):
            raise ConfigError(
                f"the alphabet must be a text without duplicates, got {alphabet!r:.80}"
            )
        self.pieces = (*MARKS, *alphabet)
        self.chat_template = before_thinking or None
        self._ids = {piece: i for i, piece in enumerate(self.pieces)}
        self._pattern = piece_pattern(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """Return the ids of ``text`` under ``"input_ids"``.

        Raises:
            ConfigError: a character is not in the alphabet.
        """
        found = self._pattern.findall(text)
        if len("".join(found)) < len(text):
            wrong = next((c for c in text if c not in "".join(self.pieces)), "<")
            raise ConfigError(
                f"the character {wrong!r} of {text!r:.80} is not in the alphabet: "
                f"{''.join(self.pieces[len(MARKS) :])!r}"
            )
        return {"input_ids": [self._ids[piece] for piece in found]}

    def apply_chat_template(self, conversation: Any, **options: Any) -> dict[str, list[int]]:
        """Return the ids of the last message and of ``before_thinking``."""
        return self(conversation[-1]["content"] + (self.chat_template or ""))

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        """Return the text of ids. ``skip_special_tokens`` removes padding and EOS.

        Ids without a piece have no text, as in ``transformers``.
        """
        skipped = {self.pad_token_id, self.eos_token_id}
        left_out = skipped if options.get("skip_special_tokens") else set()
        known = range(len(self.pieces))
        return "".join(self.pieces[i] for i in token_ids if i in known and i not in left_out)
