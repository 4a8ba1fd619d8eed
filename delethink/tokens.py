"""Token ids and log-probs in one block of memory, for who handles thousands of them at a time.

A tuple of 8,000 numbers is 8,000 objects, four times the memory, and taking one apart costs more
than a step of an environment or a chunk of the driver may. ``token_array`` and ``logprob_array``
give the same sequence as plain 64-bit numbers: slices and sums copy memory, and it equals, hashes
and adds like the tuple that it stands for. Wherever the library has one, it may have the other;
what knows lists and tuples alone, JSON for one, is given ``list(ids)``.
"""

from __future__ import annotations

import math
import operator
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self, cast

from delethink.types import TokenIds

_BYTES = 8  # of a number


class _Block(Sequence[Any]):
    """An unchangeable sequence of 64-bit numbers, one after the other in ``memory``.

    Bytes can be sent and received as they are, and Python's garbage collector has one object to
    look at for thousands of numbers. Types are compared with ``is`` here: an abstract class answers
    ``isinstance`` slowly.
    """

    __slots__ = ("memory",)
    typecode: ClassVar[str]
    formats: ClassVar[str]  # of the same numbers in the buffer protocol

    def __init__(self, memory: bytes) -> None:
        self.memory = memory

    def __len__(self) -> int:
        return len(self.memory) // _BYTES

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return self.view()[operator.index(index)]
        start, stop, stride = index.indices(len(self.memory) // _BYTES)
        if stride == 1:
            return type(self)(self.memory[start * _BYTES : stop * _BYTES])
        return type(self)(self.view()[index].tobytes())

    def __iter__(self) -> Iterator[Any]:
        return iter(self.numbers())

    def __add__(self, other: object) -> Self:
        if type(other) is type(self):
            return type(self)(self.memory + other.memory)
        return type(self)(self.memory + self._of(other)) if self._adds(other) else NotImplemented

    def __radd__(self, other: object) -> Self:
        return type(self)(self._of(other) + self.memory) if self._adds(other) else NotImplemented

    def __eq__(self, other: object) -> bool:
        if type(other) is type(self):
            return self._equals(other)
        return tuple(self) == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.memory,)

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __reversed__(self) -> Iterator[Any]:
        yield from reversed(self.numbers())

    def index(self, value: Any, *bounds: int) -> int:
        """See ``tuple.index``."""
        return self.numbers().index(value, *bounds)

    def view(self) -> memoryview:
        """The numbers, without a copy."""
        return memoryview(self.memory).cast(self.typecode)  # type: ignore[call-overload, no-any-return]

    def numbers(self) -> array[Any]:
        """A copy of the numbers."""
        return array(self.typecode, self.memory)

    def _equals(self, other: _Block) -> bool:
        return self.memory == other.memory

    def _adds(self, other: object) -> bool:
        return isinstance(other, tuple) or type(other) is type(self)

    @classmethod
    def _of(cls, values: Any) -> bytes:
        if type(values) is cls:
            return values.memory
        if isinstance(values, bytes):
            if len(values) % _BYTES:
                raise ValueError(f"{len(values)} bytes are no whole number of 64-bit numbers")
            return values
        if isinstance(values, tuple):  # much faster than to extend an empty one
            return array(cls.typecode, values).tobytes()
        if (lies := _bytes_of(values, cls.formats)) is not None:
            return lies
        numbers: array[Any] = array(cls.typecode)
        numbers.extend(iter(values))  # of an array of another kind, too
        return numbers.tobytes()


def _bytes_of(values: Any, formats: str) -> bytes | None:
    """What lies in memory as a row of 64-bit numbers of these formats."""
    try:
        view = memoryview(values)
    except TypeError:
        return None
    fits = view.format in formats and view.itemsize == _BYTES and view.ndim == 1
    return view.tobytes() if fits else None


class _TokenArray(_Block):
    __slots__ = ()
    typecode = "q"
    formats = "ql"


class _LogprobArray(_Block):
    __slots__ = ()
    typecode = "d"
    formats = "d"

    def _equals(self, other: _Block) -> bool:
        return self.view() == other.view()  # 0.0 is -0.0, and no NaN is another


def token_array(ids: Any) -> TokenIds:
    """The same ids in one block of memory, as a sequence that behaves like their tuple.

    Args:
        ids: a sequence of ints; of bytes, each eight are one. An array of 64-bit ones is copied as
            it lies in memory, any other number by number.
    """
    kept: Any = ids if type(ids) is _TokenArray else _TokenArray(_TokenArray._of(ids))
    return kept  # type: ignore[no-any-return]


def logprob_array(logprobs: Any) -> tuple[float, ...]:
    """The same log-probs in one block of memory, as a sequence that behaves like their tuple.

    Args:
        logprobs: a sequence of floats, as ``token_array`` takes ints.
    """
    is_one = type(logprobs) is _LogprobArray
    kept: Any = logprobs if is_one else _LogprobArray(_LogprobArray._of(logprobs))
    return kept  # type: ignore[no-any-return]


def is_block(ids: Any) -> bool:
    """Whether these are ids in one block of memory."""
    return type(ids) is _TokenArray


def joined(parts: Iterable[TokenIds]) -> TokenIds:
    """All parts in one block of memory, in order."""
    return cast("TokenIds", _TokenArray(b"".join(map(memory_of, parts))))


def as_list(ids: Sequence[int]) -> list[int]:
    """The ids as a list of ints, which other libraries' tokenizers take."""
    return ids.numbers().tolist() if type(ids) is _TokenArray else list(ids)


def memory_of(ids: Any) -> bytes:
    """The 64-bit numbers of ``ids``, one after the other."""
    return ids.memory if type(ids) is _TokenArray else _TokenArray._of(ids)


def count_in(memory: bytes) -> int:
    """How many 64-bit numbers lie there."""
    return len(memory) // _BYTES


def memory_of_logprobs(logprobs: tuple[float, ...]) -> bytes:
    """The same of log-probs."""
    return _LogprobArray._of(logprobs)


def as_token_ids(ids: Sequence[int]) -> TokenIds:
    """``ids`` as a tuple, or as they are where they behave like one."""
    kept: Any = ids if type(ids) is _TokenArray or isinstance(ids, tuple) else tuple(ids)
    return kept  # type: ignore[no-any-return]


def as_logprobs(logprobs: Sequence[float]) -> tuple[float, ...]:
    """``logprobs`` as a tuple, or as they are where they behave like one."""
    is_one = type(logprobs) is _LogprobArray or isinstance(logprobs, tuple)
    kept: Any = logprobs if is_one else tuple(logprobs)
    return kept  # type: ignore[no-any-return]


def all_finite(logprobs: Sequence[float]) -> bool:
    """Whether each is a finite number."""
    if type(logprobs) is not _LogprobArray:
        return all(map(math.isfinite, logprobs))
    import numpy as np  # not with this module, of which the core is made

    # A byte for each, as all() takes three times as long for 48, and a third longer for 4,096.
    return b"\0" not in np.isfinite(np.frombuffer(logprobs.memory)).tobytes()
