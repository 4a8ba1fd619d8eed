"""Reward for numbers within a tolerance."""

from __future__ import annotations

import math
import re
import unicodedata

from delethink.scoring.answer import extract_answer
from delethink.scoring.reward import light
from delethink.types import END_OF_THINKING

_MAX_NUMBER_CHARACTERS = 200
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_UNIT_NAME = r"[a-zA-Z]{1,12}(?:\^-?\d)?"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<top>{_DIGITS})/(?P<bottom>{_DIGITS})|(?P<number>{_DIGITS}))"
    rf"(?:(?:e|\*10\^|x10\^)(?P<power>[-+]?\d{{1,3}}))?(?P<percent>%?)"
    rf"(?:{_UNIT_NAME}(?:[/*]{_UNIT_NAME}){{0,3}})?"
)
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_NARROW = {r"\times": "x", r"\cdot": "x", r"\%": "%", r"\$": "", "{,}": ","}
_UNIT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}")


@light
def numeric(
    text: str,
    answer: str,
    relative: float = 1e-6,
    absolute: float = 1e-9,
    end: str | None = END_OF_THINKING,
) -> float | None:
    """Return 1.0 if the final answer of ``text`` is a number near ``answer``, else 0.0.

    The tolerance is the larger of ``absolute`` and ``relative`` times the gold number. A unit after
    the number is ignored. If the gold answer is no number, the reward is ``None``.
    """
    gold = parse_number(extract_answer(answer, None) or answer)
    if gold is None:
        return None
    found = parse_number(extract_answer(text, end) or "")
    return float(found is not None and abs(found - gold) <= max(absolute, relative * abs(gold)))


def parse_number(text: str) -> float | None:
    r"""Return the number of a text like ``1,234.5``, ``3/4``, ``\\frac{3}{4}``, ``2e-3``, ``5%``.

    The result is ``None`` for other texts and for numbers too large for a float.

    >>> parse_number(r"-\\frac{1}{4}"), parse_number(r"6.02 \\times 10^{23}"), parse_number("abc")
    (-0.25, 6.02e+23, None)
    """
    if len(text) > _MAX_NUMBER_CHARACTERS:
        return None
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").replace("\u00d7", "x")
    text = _FRACTION.sub(r"\1/\2", _UNIT.sub(r"\1", text))
    for wide, narrow in _NARROW.items():
        text = text.replace(wide, narrow)
    text = re.sub(r"\^\{([^{}]*)\}", r"^\1", text).strip("$ ").replace("\\,", "")
    text = text.removeprefix("=").strip()
    parts = _NUMBER.fullmatch("".join(text.split()).rstrip("."))
    if parts is None:
        return None
    try:
        value = float((parts["number"] or parts["top"]).replace(",", ""))
        value /= float((parts["bottom"] or "1").replace(",", ""))
        value *= 10.0 ** int(parts["power"] or 0)
    except (ZeroDivisionError, OverflowError):
        return None
    value *= (-1 if parts["sign"] == "-" else 1) * (0.01 if parts["percent"] else 1)
    return value if math.isfinite(value) else None
