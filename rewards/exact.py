"""Exact and normalised match of the final answer."""

from __future__ import annotations

import re
import unicodedata

from delethink.scoring.answer import extract_answer, final_answer
from delethink.scoring.reward import light
from delethink.types import END_OF_THINKING


@light
def exact_match(text: str, answer: str) -> float:
    """1.0 if the final answer of ``text`` is ``answer``, up to white space around it, else 0.0.

    A trace that never ends its thinking has no answer and scores 0.0.
    """
    return float(final_answer(text) == answer.strip())


@light
def normalized_match(text: str, answer: str, end: str | None = END_OF_THINKING) -> float:
    """1.0 if the extracted answer is ``answer`` but for case, spaces and marks around it.

    Where nothing is boxed or announced, all that follows the end of thinking is the answer.
    """
    said = extract_answer(text, end) or final_answer(text, end)
    return float(said is not None and normalize(said) == normalize(answer))


def normalize(text: str) -> str:
    """Compatible characters made one (NFKC), case folded, spaces single, outer marks off."""
    text = unicodedata.normalize("NFKC", text[:_LONGEST]).replace("\u2212", "-").casefold()
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    return " ".join(text.split()).strip(" \t\"'`*_.,;:!$")


_LONGEST = 100_000  # characters that are compared
