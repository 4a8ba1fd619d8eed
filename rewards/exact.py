"""Rewards for exact and normalised matches of the final answer."""

from __future__ import annotations

import re
import unicodedata

from delethink.scoring.answer import extract_answer, final_answer
from delethink.scoring.reward import light
from delethink.types import END_OF_THINKING

_MAX_CHARACTERS = 100_000


@light
def exact_match(text: str, answer: str) -> float:
    """Return 1.0 if the final answer of ``text`` is ``answer`` without outer spaces, else 0.0.

    A trace without end of thinking has no answer and scores 0.0.
    """
    return float(final_answer(text) == answer.strip())


@light
def normalized_match(text: str, answer: str, end: str | None = END_OF_THINKING) -> float:
    """Return 1.0 if the extracted answer equals ``answer`` after ``normalize``, else 0.0.

    Without a box or an announced answer, all text after the end of thinking is the answer.
    """
    final = extract_answer(text, end) or final_answer(text, end)
    return float(final is not None and normalize(final) == normalize(answer))


def normalize(text: str) -> str:
    """Apply NFKC and case folding, merge white space, and strip outer punctuation."""
    text = unicodedata.normalize("NFKC", text[:_MAX_CHARACTERS]).replace("\u2212", "-").casefold()
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    return " ".join(text.split()).strip(" \t\"'`*_.,;:!$")
