"""Spaces of token ids and of Unicode text: what is inside, what is drawn, what is shared."""

from __future__ import annotations

import copy
import multiprocessing
import pickle

import numpy as np
import pytest
from gymnasium.vector.utils import (
    batch_space,
    create_shared_memory,
    read_from_shared_memory,
    write_to_shared_memory,
)
from hypothesis import given
from hypothesis import strategies as st

from delethink.envs.spaces import TokenSequence, UnicodeText

PIECES = ("<eos>", "<", "a", "aa", "b\n")


@given(st.integers(0, 2**31), st.integers(0, 3), st.integers(0, 20), st.booleans())
def test_what_is_drawn_is_inside(seed: int, least: int, more: int, of_pieces: bool) -> None:
    text = UnicodeText(least + more + 6, least, PIECES if of_pieces else None, seed)
    ids = TokenSequence(7, least + more, least, seed)
    for _ in range(5):
        assert text.sample() in text
        assert ids.sample() in ids
        assert len(ids.sample(mask=least)) == least
        assert ids.sample(probability=np.eye(7)[3]).tolist().count(3) >= least


@given(st.text())
def test_any_text_of_unicode_is_inside(text: str) -> None:
    assert text in UnicodeText(len(text))
    assert text not in UnicodeText(len(text) + 5, min_length=len(text) + 1)


@pytest.mark.parametrize("wrong", ["\ud800", "abcd", 7, None, b"abc", ["a"]])
def test_what_is_no_text_or_too_long_is_outside(wrong: object) -> None:
    assert wrong not in UnicodeText(3)


@pytest.mark.parametrize(
    ("text", "inside"),
    [("", True), ("aab\n", True), ("<eos><", True), ("b", False), ("<eo", False), ("x", False)],
)
def test_text_of_pieces(text: str, inside: bool) -> None:
    assert (text in UnicodeText(9, pieces=PIECES)) is inside


def test_pieces_that_overlap_are_told_apart_in_no_time() -> None:
    """A pattern that tries every way to split would take for ever here."""
    assert "a" * 5000 + "!" not in UnicodeText(9000, pieces=["a", "aa", "aaa"])


def test_equal_spaces_are_equal_whatever_they_draw() -> None:
    assert UnicodeText(3, pieces="ab", seed=1) == UnicodeText(3, pieces="ab", seed=2)
    assert UnicodeText(3) != UnicodeText(4)
    assert UnicodeText(3) != UnicodeText(3, pieces="ab")
    assert TokenSequence(3, 4, sample_length=2) == TokenSequence(3, 4)
    for space in (UnicodeText(3, pieces="ab"), TokenSequence(3, 4)):
        assert pickle.loads(pickle.dumps(space)) == space == copy.deepcopy(space)


def test_token_ids_go_through_json() -> None:
    space = TokenSequence(9, 4)
    plain = space.to_jsonable([np.array([1, 2]), (3,)])  # type: ignore[list-item]
    assert plain == [[1, 2], [3]]
    assert [ids.tolist() for ids in space.from_jsonable(plain)] == plain


def test_shared_memory_is_read_anew_each_time() -> None:
    text, ids = UnicodeText(5), TokenSequence(9, 5)
    for space, first, second in ((text, "é🙂", "abc"), (ids, [1, 2, 3], [4])):
        memory = create_shared_memory(space, n=2, ctx=multiprocessing)
        rows = read_from_shared_memory(space, memory, n=2)
        write_to_shared_memory(space, 0, first, memory)
        write_to_shared_memory(space, 1, second, memory)
        assert [list(row) for row in rows] == [list(first), list(second)]
        kept = copy.deepcopy(rows)
        write_to_shared_memory(space, 0, second, memory)
        assert list(rows[0]) == list(second)
        assert list(kept[0]) == list(first), "a copy is no view"
        assert kept in batch_space(space, 2)
        assert [list(row) for row in rows[:1]] == [list(second)]
