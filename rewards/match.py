"""Rewards that compare the final answer as text: exact, normalised, a choice, crossword words."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from delethink.rewards.gold import reads_gold
from delethink.scoring.answer import extract_answer, final_answer
from delethink.scoring.reward import light
from delethink.types import END_OF_THINKING

_MAX_NORMALIZED_CHARACTERS = 100_000
_MAX_CHOICE_CHARACTERS = 2000
_MAX_CROSSWORD_CHARACTERS = 50_000
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|bf|rm)\b\s*|[{}$*`~]")
_LETTER = re.compile(r"(?:option|choice)?\s*\(?([A-Z])\)?(?:\s*[.:)](?:\s.*)?)?", re.DOTALL | re.I)
_ENTRY = re.compile(r"\b(across|down)\W{0,5}(\d{1,3})\W{1,8}([^\W\d_]{1,50})", re.IGNORECASE)


@light
def exact_match(text: str, answer: str, end: str | None = END_OF_THINKING) -> float:
    """Return 1.0 if the final answer of ``text`` is ``answer`` without outer spaces, else 0.0.

    A trace without end of thinking has no answer and scores 0.0.
    """
    return float(final_answer(text, end) == answer.strip())


@light
def normalized_match(text: str, answer: str, end: str | None = END_OF_THINKING) -> float:
    """Return 1.0 if the extracted answer equals ``answer`` after ``normalize``, else 0.0.

    Without a box or an announced answer, all text after the end of thinking is the answer.
    """
    final = extract_answer(text, end) or final_answer(text, end)
    return float(final is not None and normalize(final) == normalize(answer))


def normalize(text: str) -> str:
    """Apply NFKC and case folding, merge white space, and strip outer punctuation."""
    text = unicodedata.normalize("NFKC", text[:_MAX_NORMALIZED_CHARACTERS])
    text = text.replace("\u2212", "-").casefold()
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    return " ".join(text.split()).strip(" \t\"'`*_.,;:!$")


def can_read_choice(answer: str, metadata: Mapping[str, Any]) -> bool:
    """Return whether a gold answer names a choice."""
    letter = choice_letter(answer)
    num_choices = len(metadata.get("choices", ())) or 26
    return letter is not None and ord(letter) - ord("A") < num_choices


@reads_gold(can_read_choice)
@light
def multiple_choice(
    text: str,
    answer: str,
    metadata: Mapping[str, Any] | None = None,
    end: str | None = END_OF_THINKING,
) -> float:
    """Return 1.0 if the final answer of ``text`` is the letter ``answer`` only, else 0.0.

    Accepted forms, also of ``answer``: ``B``, ``b``, ``(B)``, ``B.``, ``B) its text`` and
    ``option B``; and the text of choice B from ``metadata["choices"]``. Two letters are no answer.
    """
    said = extract_answer(text, end)
    if said is None or len(said) > _MAX_CHOICE_CHARACTERS:
        return 0.0
    letter = choice_letter(said)
    choices = [normalize(str(choice)) for choice in (metadata or {}).get("choices", ())]
    if choices.count(normalize(said)) == 1:
        letter = chr(ord("A") + choices.index(normalize(said)))
    return float(letter == (choice_letter(answer) or answer.strip().upper()))


def choice_letter(text: str) -> str | None:
    """Return the letter that a text such as ``(B)``, ``B) its text`` or ``option B`` names."""
    text = extract_answer(text, None) or text
    if len(text) > _MAX_CHOICE_CHARACTERS:
        return None
    named = _LETTER.fullmatch(" ".join(_WRAPPED.sub(" ", text).split()).rstrip("."))
    return named[1].upper() if named else None


def can_read_crossword(answer: str, _: Mapping[str, Any]) -> bool:
    """Return whether a gold answer holds the words of a crossword puzzle."""
    try:
        return bool(_crossword_key(answer))
    except (ValueError, AttributeError, RecursionError):
        return False


@reads_gold(can_read_crossword)
@light
def crossword(
    text: str, answer: str, partial: bool = False, end: str | None = END_OF_THINKING
) -> float:
    """Score the words of a crossword puzzle (CrossWordBench, arXiv 2504.00043).

    The final answer has an entry ``Across 1: WORD`` for each word, and ``answer`` is a JSON object
    with the same entries. The last entry for a word counts. Other words are ignored.

    Args:
        text: the trace.
        answer: the words, as a JSON object.
        partial: return the share of right words.
        end: the end of thinking.

    Returns:
        1.0 if all words are right, else 0.0; with ``partial`` the share of right words.
    """
    key = _crossword_key(answer)
    final = (final_answer(text, end) or "")[-_MAX_CROSSWORD_CHARACTERS:]
    given = {f"{m[1]} {int(m[2])}".lower(): m[3].lower() for m in _ENTRY.finditer(final)}
    right = sum(given.get(name) == word for name, word in key.items())
    return right / len(key) if partial else float(right == len(key))


def _crossword_key(answer: str) -> dict[str, str]:
    return {name.lower(): word.lower() for name, word in json.loads(answer).items()}
