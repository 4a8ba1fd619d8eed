"""Reward for crossword puzzles (CrossWordBench, arXiv 2504.00043)."""

from __future__ import annotations

import json
import re

from delethink.scoring.answer import final_answer
from delethink.scoring.reward import light
from delethink.types import END_OF_THINKING

_ENTRY = re.compile(r"\b(across|down)\W{0,5}(\d{1,3})\W{1,8}([^\W\d_]{1,50})", re.IGNORECASE)
_MAX_ANSWER_CHARACTERS = 50_000


@light
def crossword(
    text: str, answer: str, partial: bool = False, end: str | None = END_OF_THINKING
) -> float:
    """Return 1.0 if all words are right, else 0.0; with ``partial`` the share of right words.

    The final answer has an entry ``Across 1: WORD`` for each word, and ``answer`` is a JSON object
    with the same entries. The last entry for a word counts. Other words are ignored.
    """
    key = {name.lower(): word.lower() for name, word in json.loads(answer).items()}
    final = (final_answer(text, end) or "")[-_MAX_ANSWER_CHARACTERS:]
    given = {f"{m[1]} {int(m[2])}".lower(): m[3].lower() for m in _ENTRY.finditer(final)}
    right = sum(given.get(name) == word for name, word in key.items())
    return right / len(key) if partial else float(right == len(key))
