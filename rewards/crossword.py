"""Crossword puzzles: words against the key (CrossWordBench, arXiv 2504.00043)."""

from __future__ import annotations

import json
import re

from delethink.scoring.answer import final_answer
from delethink.scoring.reward import light
from delethink.types import END_OF_THINKING

_ENTRY = re.compile(r"\b(across|down)\W{0,5}(\d{1,3})\W{1,8}([^\W\d_]{1,50})", re.IGNORECASE)
_LOOKED_AT = 50_000  # characters of an answer


@light
def crossword(
    text: str, answer: str, partial: bool = False, end: str | None = END_OF_THINKING
) -> float:
    """1.0 if every word is right, else 0.0; with ``partial`` the share of right words.

    The answer has an entry ``Across 1: WORD`` for each word; ``answer`` is a JSON object of the
    same entries. A word given twice counts as it was given last, and words that the puzzle does not
    ask for are not looked at.
    """
    key = {name.lower(): word.lower() for name, word in json.loads(answer).items()}
    said = (final_answer(text, end) or "")[-_LOOKED_AT:]
    given = {f"{m[1]} {int(m[2])}".lower(): m[3].lower() for m in _ENTRY.finditer(said)}
    right = sum(given.get(name) == word for name, word in key.items())
    return right / len(key) if partial else float(right == len(key))
