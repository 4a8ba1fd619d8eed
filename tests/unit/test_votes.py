"""Votes: the answers of traces for majority votes."""

from __future__ import annotations

import pytest

from delethink.scoring.answer import vote


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("thinking</think>42", "42"),
        ("thinking</think>\n so \\boxed{ \\frac{1}{2} } is it", "\\frac{1}{2}"),
        ("</think>first \\boxed{1}, no: \\boxed{2}", "2"),
        ("\\boxed{9} is a guess</think>7", "7"),
        ("a</think>x </think> y", "x </think> y"),  # the first end counts
        ("never ends \\boxed{3}", None),
        ("</think>  \n", None),
        ("</think>\\boxed{}", None),
        ("</think>cut short \\boxed{1", None),
    ],
)
def test_the_last_box_after_thinking_or_all_of_it(text: str, expected: str | None) -> None:
    assert vote(text) == expected


def test_a_long_answer_is_kept_as_a_digest() -> None:
    long = "</think>" + "word " * 1000
    assert vote(long) == vote(long + " ")
    assert vote(long) != vote(long + "more")
    assert len(vote(long) or "") < 60
