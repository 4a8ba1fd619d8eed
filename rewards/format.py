"""Rewards for the format of a trace: one end of thinking, one boxed answer, one script.

They follow the format and language rewards of DeepSeek-R1 (arXiv 2501.12948, sections 2.2.2 and
2.3.2), for chat templates that may open the thinking.
"""

from __future__ import annotations

import re
import unicodedata

from delethink.errors import ConfigError, did_you_mean
from delethink.scoring.answer import final_answer, last_box
from delethink.scoring.reward import light
from delethink.types import END_OF_THINKING, START_OF_THINKING

_BOX = re.compile(r"\\(?:boxed|fbox)\b")
_SCRIPTS = {
    "arabic": ("ARABIC",),
    "chinese": ("CJK",),
    "cyrillic": ("CYRILLIC",),
    "devanagari": ("DEVANAGARI",),
    "greek": ("GREEK",),
    "hangul": ("HANGUL",),
    "hebrew": ("HEBREW",),
    "japanese": ("CJK", "HIRAGANA", "KATAKANA"),
    "latin": ("LATIN",),
    "thai": ("THAI",),
}
_MAX_CHARACTERS = 200_000


@light
def well_formed(
    text: str, start: str | None = START_OF_THINKING, end: str | None = END_OF_THINKING
) -> float:
    """Return 1.0 for one end of thinking and one complete box after it, else 0.0.

    The text may open the thinking once, at its start, or not at all if the template opens it.
    Without a mark of the end, only the box counts.

    Args:
        text: the trace.
        start: mark that opens the thinking; null for none.
        end: the end of thinking.
    """
    closed = end is None or text.count(end) == 1
    opened = text.count(start) if start else 0
    begins = opened == 0 or (opened == 1 and text.lstrip().startswith(str(start)))
    answer = final_answer(text, end) or ""
    boxed = len(_BOX.findall(answer)) == 1 and bool((last_box(answer) or "").strip())
    return float(closed and begins and boxed)


@light
def closes_thinking(text: str, end: str | None = END_OF_THINKING) -> float:
    """Return 1.0 if text follows an end of thinking, else 0.0."""
    return float(bool(final_answer(text, end)))


@light
def language(text: str, script: str = "latin") -> float | None:
    """Return the share of letters in ``script``; ``None`` without letters.

    The reward separates Chinese from English, but not English from French.

    Args:
        text: the trace.
        script: script of the wanted letters: arabic, chinese, cyrillic, devanagari, greek, hangul,
            hebrew, japanese, latin or thai.
    """
    if script not in _SCRIPTS:
        raise ConfigError(f"unknown script {script!r}.{did_you_mean(script, _SCRIPTS)}")
    letters = [c for c in text[:_MAX_CHARACTERS] if c.isalpha()]
    if not letters:
        return None
    wanted = _SCRIPTS[script]
    kept = sum(unicodedata.name(c, "").startswith(wanted) for c in letters)
    return kept / len(letters)
