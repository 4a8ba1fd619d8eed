"""Reward for multiple choice: the letter or the text of the choice."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from delethink.rewards.exact import normalize
from delethink.scoring.answer import extract_answer
from delethink.scoring.reward import light
from delethink.types import END_OF_THINKING

_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|bf|rm)\b\s*|[{}$*`~]")
_LETTER = re.compile(r"(?:option|choice)?\s*\(?([A-Z])\)?(?:\s*[.:)](?:\s.*)?)?", re.DOTALL | re.I)
_MAX_ANSWER_CHARACTERS = 2000


@light
def multiple_choice(
    text: str,
    answer: str,
    metadata: Mapping[str, Any] | None = None,
    end: str | None = END_OF_THINKING,
) -> float:
    """Return 1.0 if the final answer of ``text`` is the letter ``answer`` only, else 0.0.

    Accepted forms: ``B``, ``b``, ``(B)``, ``B.``, ``B) its text``, ``option B``, and the text of
    choice B from ``metadata["choices"]``. Two letters are no answer.
    """
    said = extract_answer(text, end)
    if said is None or len(said) > _MAX_ANSWER_CHARACTERS:
        return 0.0
    return float(chosen_letter(said, (metadata or {}).get("choices", ())) == answer.strip().upper())


def chosen_letter(said: str, choices: Any = ()) -> str | None:
    """Return the letter of an answer, or ``None``."""
    texts = [normalize(str(choice)) for choice in choices]
    if texts.count(normalize(said)) == 1:
        return chr(ord("A") + texts.index(normalize(said)))
    bare = " ".join(_WRAPPED.sub(" ", said).split()).rstrip(".")
    named = _LETTER.fullmatch(bare)
    return named.group(1).upper() if named else None
