"""Streams of text: whole characters, nothing lost, nothing repeated; loops are found."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("transformers")

from hypothesis import given
from hypothesis import strategies as st
from made_up_reasoner import TOKENIZER

from delethink import ConfigError
from delethink.engines.loading import load_tokenizer
from delethink.serve.loops import LoopDetector, LoopRule
from delethink.serve.text import TextStream, first_match, length_held_back
from delethink.tokenization import reward_text

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=80)


def pieces_of(ids: list[int], sizes: list[int], tokenizer: object = TOKENIZER) -> list[str]:
    stream = TextStream(lambda some: reward_text(tokenizer, some))  # type: ignore[arg-type]
    pieces, start, turn = [], 0, 0
    while start < len(ids):
        size = sizes[turn % len(sizes)]
        pieces.append(stream.push(ids[start : start + size]))
        start, turn = start + size, turn + 1
    return [*pieces, stream.flush()]


@given(TEXTS, st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_pieces_are_the_text_in_whole_characters(text: str, sizes: list[int]) -> None:
    pieces = pieces_of(TOKENIZER(text)["input_ids"], sizes)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


@given(st.lists(st.integers(0, 255), max_size=120), st.lists(st.integers(1, 9), min_size=1))
def test_bytes_that_are_no_text_lose_nothing_around_them(ids: list[int], sizes: list[int]) -> None:
    pieces = "".join(pieces_of(ids, sizes)).replace("\ufffd", "")
    assert pieces == reward_text(TOKENIZER, ids).replace("\ufffd", "")


def test_the_shipped_tokenizer_streams_what_it_decodes() -> None:
    tokenizer, rng = load_tokenizer("toy"), random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(len(tokenizer)) for _ in range(200)]
        streamed = "".join(pieces_of(ids, [rng.randint(1, 30)], tokenizer))
        assert streamed == reward_text(tokenizer, ids)


def test_a_copy_goes_on_alone() -> None:
    ids = TOKENIZER("a\u00e9b")["input_ids"]
    stream = TextStream(lambda some: reward_text(TOKENIZER, some))
    assert stream.push(ids[:2]) == "a"
    other = stream.copy()
    assert stream.push(ids[2:]) == other.push(ids[2:]) == "\u00e9b"


@pytest.mark.parametrize(
    ("text", "held"), [("", 0), ("a", 0), ("<", 1), ("x</thi", 5), ("</think>", 0), ("<</", 2)]
)
def test_what_may_become_a_mark_is_held_back(text: str, held: int) -> None:
    assert length_held_back(text, ("</think>",)) == held


def test_the_needle_that_ends_first_is_found() -> None:
    assert first_match("xabcd", ("abcd", "bc")) == (2, "bc")
    assert first_match("abab", ("ab",)) == (0, "ab")
    assert first_match("x", ()) is None


def first_loop(ids: list[int], rule: LoopRule) -> int | None:
    """The number of tokens up to the first loop, by its definition."""
    for end in range(1, len(ids) + 1):
        for size in range(rule.min_pattern_size, rule.max_pattern_size + 1):
            tail = ids[max(0, end - size * rule.min_count) : end]
            if len(tail) == size * rule.min_count and tail == tail[:size] * rule.min_count:
                return end
    return None


@given(
    st.lists(st.integers(0, 1), max_size=60),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(2, 4),
)
def test_loops_are_found_where_they_end(ids: list[int], least: int, more: int, count: int) -> None:
    rule = LoopRule(least + more, least, count)
    detector = LoopDetector(rule)
    found = next((i for i, token in enumerate(ids, start=1) if detector.push(token)), None)
    assert found == first_loop(ids, rule)


@pytest.mark.parametrize("sizes", [(0, 0, 8), (4, 5, 8), (4, 1, 1), (10**9, 1, 8)])
def test_a_loop_of_impossible_sizes_is_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="a loop needs"):
        LoopRule(*sizes)
