"""The form of a trace: thinking is closed once, one answer is boxed, the language is kept.

After the format and language rewards of DeepSeek-R1 (arXiv 2501.12948, sections 2.2.2 and 2.3.2),
for traces in which the chat template may have opened the thinking already.
"""

from __future__ import annotations

import re
import unicodedata

from delethink.errors import ConfigError, did_you_mean
from delethink.scoring.answer import final_answer, last_box
from delethink.scoring.reward import light
from delethink.types import END_OF_THINKING

_START_OF_THINKING = "<think>"
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
_LOOKED_AT = 200_000  # characters whose script is looked up


@light
def well_formed(text: str) -> float:
    """1.0 if thinking is closed exactly once and exactly one complete box follows, else 0.0.

    Thinking may be opened once, as the first thing, or not at all: then the template did it.
    """
    closed = text.count(END_OF_THINKING) == 1
    opened = text.count(_START_OF_THINKING)
    begins = opened == 0 or (opened == 1 and text.lstrip().startswith(_START_OF_THINKING))
    answer = final_answer(text) or ""
    boxed = len(_BOX.findall(answer)) == 1 and bool((last_box(answer) or "").strip())
    return float(closed and begins and boxed)


@light
def closes_thinking(text: str) -> float:
    """1.0 if the end of thinking is there and something follows it, else 0.0."""
    return float(bool(final_answer(text)))


@light
def language(text: str, script: str = "latin") -> float | None:
    """The share of letters that are of ``script``; ``None`` where there is no letter.

    It tells Chinese from English, and not English from French.
    """
    if script not in _SCRIPTS:
        raise ConfigError(f"unknown script {script!r}.{did_you_mean(script, _SCRIPTS)}")
    letters = [c for c in text[:_LOOKED_AT] if c.isalpha()]
    if not letters:
        return None
    wanted = _SCRIPTS[script]
    kept = sum(unicodedata.name(c, "").startswith(wanted) for c in letters)
    return kept / len(letters)
