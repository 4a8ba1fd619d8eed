"""Token ids and log-probs in one block of memory, for who handles thousands of them at a time.

A tuple of 8,000 numbers is 8,000 objects, four times the memory, and taking one apart costs more
than a step of an environment or a chunk of the driver may. ``token_array`` and ``logprob_array``
give the same sequence as plain 64-bit numbers: slices and sums copy memory, and it equals, hashes
and adds like the tuple that it stands for. Wherever the library has one, it may have the other;
what knows lists and tuples alone, JSON for one, is given ``list(ids)``.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self, cast

from delethink.types import TokenIds


class _Block(Sequence[Any]):
    """An unchangeable sequence of numbers; ``numbers`` is not to be changed by anybody.

    Types are compared with ``is`` here: an abstract class answers ``isinstance`` slowly.
    """

    __slots__ = ("numbers",)
    typecode: ClassVar[str]
    formats: ClassVar[str]  # of the same numbers in the buffer protocol

    def __init__(self, numbers: array[Any]) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        found = self.numbers[index]
        return type(self)(found) if isinstance(index, slice) else found

    def __iter__(self) -> Iterator[Any]:
        return iter(self.numbers)

    def __add__(self, other: object) -> Self:
        return type(self)(self.numbers + self._of(other)) if self._adds(other) else NotImplemented

    def __radd__(self, other: object) -> Self:
        return type(self)(self._of(other) + self.numbers) if self._adds(other) else NotImplemented

    def __eq__(self, other: object) -> bool:
        if type(other) is type(self):
            return self.numbers == other.numbers
        return tuple(self.numbers) == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.numbers))

    def __repr__(self) -> str:
        return repr(tuple(self.numbers))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.numbers,)

    def _adds(self, other: object) -> bool:
        return isinstance(other, tuple) or type(other) is type(self)

    @classmethod
    def _of(cls, values: Any) -> array[Any]:
        if type(values) is cls:
            return values.numbers
        if isinstance(values, tuple | bytes):  # of a tuple, much faster than to extend an empty one
            return array(cls.typecode, values)
        numbers: array[Any] = array(cls.typecode)
        try:
            view = memoryview(values)
        except TypeError:
            numbers.extend(values)
            return numbers
        if view.format in cls.formats and view.itemsize == numbers.itemsize and view.ndim == 1:
            numbers.frombytes(view.cast("B") if view.c_contiguous else view.tobytes())
        else:
            numbers.extend(iter(values))  # of an array of another kind, too
        return numbers


class _TokenArray(_Block):
    __slots__ = ()
    typecode = "q"
    formats = "ql"


class _LogprobArray(_Block):
    __slots__ = ()
    typecode = "d"
    formats = "d"


def token_array(ids: Any) -> TokenIds:
    """The same ids in one block of memory, as a sequence that behaves like their tuple.

    Args:
        ids: a sequence of ints; of bytes, each eight are one. An array of 64-bit ones is copied as
            it lies in memory, any other number by number.
    """
    if type(ids) is _TokenArray:
        return cast("TokenIds", ids)
    return cast("TokenIds", _TokenArray(_TokenArray._of(ids)))


def logprob_array(logprobs: Any) -> tuple[float, ...]:
    """The same log-probs in one block of memory, as a sequence that behaves like their tuple.

    Args:
        logprobs: a sequence of floats, as ``token_array`` takes ints.
    """
    if type(logprobs) is _LogprobArray:
        return cast("tuple[float, ...]", logprobs)
    return cast("tuple[float, ...]", _LogprobArray(_LogprobArray._of(logprobs)))


def joined(parts: Iterable[TokenIds]) -> TokenIds:
    """All parts in one block of memory, in order."""
    whole = array("q")
    for part in parts:
        whole.extend(memory_of(part))
    return cast("TokenIds", _TokenArray(whole))


def as_list(ids: Sequence[int]) -> list[int]:
    """The ids as a list of ints, which other libraries' tokenizers take."""
    return ids.numbers.tolist() if type(ids) is _TokenArray else list(ids)


def memory_of(ids: TokenIds) -> array[int]:
    """The 64-bit numbers of ``ids``, to be read through the buffer protocol and not changed."""
    return _TokenArray._of(ids)


def memory_of_logprobs(logprobs: tuple[float, ...]) -> array[float]:
    """The same of log-probs."""
    return _LogprobArray._of(logprobs)


def as_token_ids(ids: Sequence[int]) -> TokenIds:
    """``ids`` as a tuple, or as they are where they behave like one."""
    if isinstance(ids, tuple) or type(ids) is _TokenArray:
        return cast("TokenIds", ids)
    return tuple(ids)


def as_logprobs(logprobs: Sequence[float]) -> tuple[float, ...]:
    """``logprobs`` as a tuple, or as they are where they behave like one."""
    if isinstance(logprobs, tuple) or type(logprobs) is _LogprobArray:
        return cast("tuple[float, ...]", logprobs)
    return tuple(logprobs)


def all_finite(logprobs: Sequence[float]) -> bool:
    """Whether each is a finite number."""
    if type(logprobs) is not _LogprobArray:
        return math.isfinite(sum(logprobs))  # one that is not makes the sum so, too
    import numpy as np  # not with this module, of which the core is made

    return not logprobs or bool(np.isfinite(np.frombuffer(logprobs.numbers)).all())
