"""Exact match: 1 when the answer after the end of thinking is the gold answer, else 0."""

from __future__ import annotations

from delethink.types import END_OF_THINKING


def final_answer(text: str, end: str = END_OF_THINKING) -> str | None:
    """What follows the first end of thinking, stripped; ``None`` where thinking never ends.

    ``text`` is the whole sampled trace, stitched over its chunks, so that it does not matter
    whether the mark or the answer lies across a border.
    """
    _, mark, answer = text.partition(end)
    return answer.strip() if mark else None


def exact_match(text: str, answer: str) -> float:
    """1.0 if the final answer of ``text`` is ``answer``, up to white space around it, else 0.0.

    A trace that never ends its thinking has no answer and scores 0.0.
    """
    return float(final_answer(text) == answer.strip())
