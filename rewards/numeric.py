"""Reward for numbers within a tolerance."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from delethink.rewards.gold import reads_gold
from delethink.rewards.units import are_different, is_symbol, is_unit_text, unit_of
from delethink.scoring.answer import extract_answer
from delethink.scoring.reward import light
from delethink.types import END_OF_THINKING

_MAX_NUMBER_CHARACTERS = 200
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+"
_WHOLE = r"\d{1,15}"
_TIMES_POWER = r"(?: ?[*x] ?10\^ ?(?P<power>[-+]?\d{1,3})|[eE](?P<exponent>[-+]?\d{1,3}))"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?) ?(?:"
    rf"(?P<whole>{_WHOLE}) (?P<part>{_WHOLE}) ?/ ?(?P<parts>{_WHOLE})"  # a mixed number
    rf"|(?P<base>{_DIGITS})\^(?P<raised>[-+]?\d{{1,3}})"
    rf"|(?P<top>{_DIGITS}) ?/ ?(?P<bottom>{_DIGITS})"
    rf"|(?P<number>{_DIGITS})"
    rf"){_TIMES_POWER}?(?P<percent> ?%| percent)?(?P<unit>.*)"
)
_UNIT = re.compile(
    r"(?P<space> *)(?P<name>[A-Za-z][A-Za-z/*^ \d-]*|\u00b0[CFK]?|\^\\circ ?[CFK]?)\Z"
)
_FRACTION = re.compile(r"(?P<whole>\d ?)?\\[dtc]?frac\{([^{}]*)\}\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"(?P<whole>\d ?)?\\[dtc]?frac ?(\d) ?(\d)(?!\d)")
_NARROW = {r"\times": "x", r"\cdot": "*", r"\%": "%", r"\$": "", "{,}": ",", r"\ ": " ", "~": " "}
_TEXT = re.compile(r"\\(?:text|textrm|mathrm|mbox|rm)\s*\{([^{}]*)\}")
_SUPERSCRIPT = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u207b]+")
_VULGAR = re.compile(r"(?P<whole>\d ?)?(?P<part>[\u00bc-\u00be\u2150-\u215e])")


def can_read_number(answer: str, _: Mapping[str, Any]) -> bool:
    """Return whether a gold answer is a number."""
    return parse_number(extract_answer(answer, None) or answer) is not None


@reads_gold(can_read_number)
@light
def numeric(
    text: str,
    answer: str,
    relative: float = 1e-6,
    absolute: float = 0.0,
    end: str | None = END_OF_THINKING,
) -> float | None:
    """Return 1.0 if the final answer of ``text`` is a number near ``answer``, else 0.0.

    The tolerance is the larger of ``absolute`` and ``relative`` times the gold number. A known unit
    after the number is ignored, unless the gold answer has another one. If the gold answer is no
    number, the reward is ``None``.

    Args:
        text: the trace.
        answer: the gold number.
        relative: tolerance as a share of the gold number.
        absolute: tolerance in the unit of the gold number.
        end: the end of thinking.
    """
    gold_text, said = extract_answer(answer, None) or answer, extract_answer(text, end) or ""
    gold = parse_number(gold_text)
    if gold is None:
        return None
    found = parse_number(said)
    if found is None or are_different(_unit_after(gold_text), _unit_after(said)):
        return 0.0
    return float(abs(found - gold) <= max(absolute, relative * abs(gold)))


def parse_number(text: str) -> float | None:
    r"""Return the number of a text like ``1,234.5``, ``3/4``, ``1 1/2``, ``10^{-3}``, ``5%``.

    The result is ``None`` for other texts and for numbers too large for a float. Letters after the
    number must be a known unit: ``2x`` is no number. A unit of one letter needs a space before it.

    >>> parse_number(r"-\\frac{1}{4}"), parse_number(r"6.02 \\times 10^{23}"), parse_number("2x")
    (-0.25, 6.02e+23, None)
    """
    if len(text) > _MAX_NUMBER_CHARACTERS:
        return None
    parts = _NUMBER.fullmatch(_narrow(text))
    if parts is None or not _is_unit(parts["unit"]):
        return None
    try:
        value = _value(parts)
    except (ZeroDivisionError, OverflowError):
        return None
    value *= (-1 if parts["sign"] == "-" else 1) * (0.01 if parts["percent"] else 1)
    return value if math.isfinite(value) else None


def _unit_after(number: str) -> str:
    parts = _NUMBER.fullmatch(_narrow(number))
    return unit_of(parts["unit"].strip()) if parts else ""


def _narrow(text: str) -> str:
    """Return a text with one notation for fractions, powers, signs and spaces."""
    text = _SUPERSCRIPT.sub(lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text)
    text = _VULGAR.sub(_space_vulgar, text)
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").replace("\u00d7", "x")
    text = (
        text.replace("\u2044", "/")
        .replace("\u00b7", "*")
        .strip()
        .strip("$\u20ac\u00a3\u00a5")
        .strip()
    )
    text = _TEXT.sub(_unwrap, text.replace("\\,", " ").replace("\\!", "").replace("\\;", " "))
    text = _FRACTION.sub(_space_fraction, text)
    text = _SHORT_FRACTION.sub(_space_fraction, text)
    for wide, narrow in _NARROW.items():
        text = text.replace(wide, narrow)
    text = re.sub(r"\^ ?\{([^{}]*)\}", r"^\1", text).strip("$ ")
    return " ".join(text.removeprefix("=").split()).rstrip(".")


def _unwrap(found: re.Match[str]) -> str:
    r"""Return the words of a ``\text{...}``, unless they change the meaning of the number."""
    said = found[1].strip()
    is_percent = said in ("percent", "%")
    return (
        f" {said}"
        if is_percent or re.fullmatch(r"[\d.,/ -]*", said) or _is_unit(f" {said}")
        else found[0]
    )


def _space_fraction(found: re.Match[str]) -> str:
    whole = (found["whole"] or "").strip()
    return f"{whole} {found[2]}/{found[3]}" if whole else f"{found[2]}/{found[3]}"


def _space_vulgar(found: re.Match[str]) -> str:
    part = unicodedata.normalize("NFKC", found["part"])
    return f"{found['whole'].strip()} {part}" if found["whole"] else part


def _value(parts: re.Match[str]) -> float:
    """Return the number without its sign and percent sign."""
    if parts["whole"]:
        value = float(parts["whole"]) + float(parts["part"]) / float(parts["parts"])
    elif parts["base"]:
        value = float(_plain(parts["base"])) ** int(parts["raised"])
    else:
        value = float(_plain(parts["number"] or parts["top"])) / float(
            _plain(parts["bottom"] or "1")
        )
    return float(value * 10.0 ** int(parts["power"] or parts["exponent"] or 0))


def _plain(digits: str) -> str:
    return digits.replace(",", "").replace(" ", "")


def _is_unit(text: str) -> bool:
    """Return whether what follows a number is nothing or a unit."""
    if not text.strip():
        return True
    found = _UNIT.match(text)
    if found is None:
        return False
    names = [re.sub(r"\^ ?-?\d\Z", "", name) for name in re.split(r"[/*]", found["name"])]
    if all(is_symbol(name.strip()) or not name[0].isalpha() for name in names if name):
        return bool(found["space"]) or len(names) > 1 or len(names[0]) > 1 or not names[0].isalpha()
    words = found["name"].split()
    return bool(found["space"]) and min(map(len, words)) > 2 and is_unit_text(found["name"])
