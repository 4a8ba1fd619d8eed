"""Immutable sequences of 64-bit numbers for token ids and log-probs.

A tuple of 8,000 ids is 8,000 Python objects. ``TokenArray`` and ``LogprobArray`` hold the same
numbers in one ``array.array``, so slices, sums and transfers copy memory. Both compare, hash and
add like the tuple of the same numbers, and NumPy reads them without visiting each number. JSON
needs a list: ``as_list(ids)``.
"""

from __future__ import annotations

import math
import operator
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, overload

Number = TypeVar("Number", int, float)

_ITEM_BYTES = 8


class _NumberArray(Sequence[Number], Generic[Number]):
    """Immutable sequence of 64-bit numbers."""

    __slots__ = ("_numbers",)
    _numbers: array[Number]
    typecode: ClassVar[Literal["q", "d"]]
    formats: ClassVar[str]  # buffer formats of the same numbers

    def __init__(self, numbers: array[Number]) -> None:
        """Wrap ``numbers``. The caller must not change the array afterwards."""
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Number: ...

    @overload
    def __getitem__(self, index: slice) -> Self: ...

    def __getitem__(self, index: int | slice) -> Number | Self:
        if isinstance(index, slice):
            return type(self)(self._numbers[index])
        return self._numbers[operator.index(index)]

    def __iter__(self) -> Iterator[Number]:
        return iter(self._numbers)

    def __add__(self, other: Self | tuple[Number, ...]) -> Self:
        if not isinstance(other, (tuple, type(self))):
            return NotImplemented
        return type(self)(self._numbers + self.to_array(other))

    def __radd__(self, other: tuple[Number, ...]) -> Self:
        if not isinstance(other, tuple):
            return NotImplemented
        return type(self)(self.to_array(other) + self._numbers)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, type(self)):
            return self._numbers == other._numbers
        return tuple(self) == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._numbers,)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """Return a NumPy array of the numbers, which NumPy's conversions call."""
        import numpy as np  # imported here because the core loads without NumPy

        view = np.frombuffer(self._numbers, self.typecode)
        view.flags.writeable = False
        return view.astype(view.dtype if dtype is None else dtype, copy=bool(copy))

    def tolist(self) -> list[Number]:
        """Return the numbers as a list."""
        return self._numbers.tolist()

    @classmethod
    def to_array(cls, values: Any) -> array[Number]:
        """Return ``values`` as an ``array.array`` of this class's type.

        Args:
            values: a sequence of numbers, or an array of any library.

        Raises:
            TypeError: a value has another type, or an array has more than one dimension.
        """
        if isinstance(values, cls):
            return values._numbers
        if isinstance(values, (list, tuple)):
            return array(cls.typecode, values)
        try:
            view = memoryview(values)
        except TypeError:
            return array(cls.typecode, iter(values))
        if view.format in cls.formats and view.itemsize == _ITEM_BYTES and view.ndim == 1:
            return array(cls.typecode, view.tobytes())
        return array(cls.typecode, iter(values))  # `iter` converts other types number by number


class TokenArray(_NumberArray[int]):
    """Immutable sequence of token ids."""

    __slots__ = ()
    typecode = "q"
    formats = "ql"


class LogprobArray(_NumberArray[float]):
    """Immutable sequence of log-probs. As in a tuple, 0.0 equals -0.0 and NaN equals nothing."""

    __slots__ = ()
    typecode = "d"
    formats = "d"


TokenIds = tuple[int, ...] | TokenArray
Logprobs = tuple[float, ...] | LogprobArray


def token_array(ids: Any) -> TokenArray:
    """Return ``ids`` as a ``TokenArray``; see ``TokenArray.to_array`` for the accepted types."""
    return ids if isinstance(ids, TokenArray) else TokenArray(TokenArray.to_array(ids))


def logprob_array(logprobs: Any) -> LogprobArray:
    """Return ``logprobs`` as a ``LogprobArray``; see ``to_array`` for the accepted types."""
    if isinstance(logprobs, LogprobArray):
        return logprobs
    return LogprobArray(LogprobArray.to_array(logprobs))


def as_token_ids(ids: Sequence[int]) -> TokenIds:
    """Return ``ids`` unchanged if they are immutable, else as a tuple."""
    return ids if isinstance(ids, (tuple, TokenArray)) else tuple(ids)


def as_logprobs(logprobs: Sequence[float]) -> Logprobs:
    """Return ``logprobs`` unchanged if they are immutable, else as a tuple."""
    return logprobs if isinstance(logprobs, (tuple, LogprobArray)) else tuple(logprobs)


def as_list(ids: Sequence[int]) -> list[int]:
    """Return ``ids`` as a list of ints, for tokenizers and JSON."""
    return ids.tolist() if isinstance(ids, TokenArray) else list(ids)


def joined(parts: Iterable[TokenIds]) -> TokenArray:
    """Concatenate token ids."""
    numbers: array[int] = array("q")
    for part in parts:
        numbers.extend(TokenArray.to_array(part))
    return TokenArray(numbers)


def all_finite(logprobs: Logprobs) -> bool:
    """Return whether every log-prob is finite."""
    if not isinstance(logprobs, LogprobArray):
        return all(map(math.isfinite, logprobs))
    import numpy as np  # imported here because the core loads without NumPy

    return bool(np.isfinite(np.asarray(logprobs)).all())
