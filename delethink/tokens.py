"""Token ids in one block of memory, for who handles thousands of them at a time.

Everywhere in the library token ids are tuples of ints. A tuple of 8,000 of them is 8,000 objects,
and taking one apart costs more than a step of an environment may. ``token_array`` gives the same
sequence as plain 64-bit numbers: slices and sums copy memory, and it equals, hashes and adds like
the tuple that it stands for.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from delethink.types import TokenIds


class _TokenArray(Sequence[int]):
    """An unchangeable sequence of ints; ``numbers`` is not to be changed by anybody."""

    __slots__ = ("numbers",)

    def __init__(self, numbers: array[int]) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        found = self.numbers[index]
        return _TokenArray(found) if isinstance(index, slice) else found

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)

    def __add__(self, other: object) -> _TokenArray:
        return _TokenArray(self.numbers + _numbers(other)) if _is_ids(other) else NotImplemented

    def __radd__(self, other: object) -> _TokenArray:
        return _TokenArray(_numbers(other) + self.numbers) if _is_ids(other) else NotImplemented

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _TokenArray):
            return self.numbers == other.numbers
        return tuple(self.numbers) == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.numbers))

    def __repr__(self) -> str:
        return repr(tuple(self.numbers))

    def __reduce__(self) -> tuple[Any, ...]:
        return _TokenArray, (self.numbers,)


def token_array(ids: Any) -> TokenIds:
    """The same ids in one block of memory, as a sequence that behaves like their tuple.

    Args:
        ids: a sequence of ints, or what holds 64-bit ones in memory, as a NumPy array of ``int64``.
    """
    if isinstance(ids, _TokenArray):
        return cast("TokenIds", ids)
    return cast("TokenIds", _TokenArray(_numbers(ids)))


def joined(parts: Iterable[TokenIds]) -> TokenIds:
    """All parts in one block of memory, in order."""
    whole = array("q")
    for part in parts:
        whole.extend(_numbers(part))
    return token_array(_TokenArray(whole))


def as_list(ids: Sequence[int]) -> list[int]:
    """The ids as a list of ints, which other libraries' tokenizers take."""
    return ids.numbers.tolist() if isinstance(ids, _TokenArray) else list(ids)


def memory_of(ids: TokenIds) -> array[int]:
    """The 64-bit numbers of ``ids``, to be read through the buffer protocol and not changed."""
    return _numbers(ids)


def as_token_ids(ids: Sequence[int]) -> TokenIds:
    """``ids`` as a tuple, or as they are where they behave like one."""
    return cast("TokenIds", ids) if isinstance(ids, tuple | _TokenArray) else tuple(ids)


def _is_ids(value: object) -> bool:
    return isinstance(value, tuple | _TokenArray)


def _numbers(ids: Any) -> array[int]:
    if isinstance(ids, _TokenArray):
        return ids.numbers
    numbers = array("q")
    if isinstance(ids, tuple):
        numbers.extend(ids)
        return numbers
    try:
        view = memoryview(ids)
    except TypeError:
        numbers.extend(ids)
    else:
        numbers.frombytes(view.cast("B") if view.c_contiguous else view.tobytes())
    return numbers
