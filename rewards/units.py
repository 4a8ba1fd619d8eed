r"""Units and words behind a number: what may be left out of an answer, and what may not.

A unit in ``\text{...}`` or ``\mathrm{...}``, or a bare word such as ``meters``, may be left out. A
bare abbreviation (``cm``) is a unit only if it belongs to the answer and the gold answer is a plain
number, because it could be a product of variables. A single bare letter is never a unit here.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_KINDS = {
    "m": "meter metre",
    "cm": "centimeter centimetre",
    "mm": "millimeter millimetre",
    "km": "kilometer kilometre",
    "in": "inch inche",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "g": "gram gm",
    "kg": "kilogram",
    "mg": "milligram",
    "lb": "pound lbs",
    "oz": "ounce",
    "l": "liter litre",
    "ml": "milliliter millilitre",
    "gal": "gallon",
    "s": "second sec",
    "ms": "millisecond",
    "min": "minute",
    "h": "hour hr",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "year": "yr years",
    "mph": "mile per hour",
    "deg": "degree",
    "rad": "radian",
    "dollar": "dollars usd",
    "cent": "cents",
    "euro": "euros",
    "acre": "acres",
    "unit": "units",
    "hz": "hertz",
    "khz": "kilohertz",
    "mhz": "megahertz",
    "n": "newton",
    "j": "joule",
    "kj": "kilojoule",
    "w": "watt",
    "kw": "kilowatt",
    "v": "volt",
    "a": "ampere amp",
    "pa": "pascal",
    "kpa": "kilopascal",
    "k": "kelvin",
    "c": "celsius",
    "mol": "mole",
    "ev": "electronvolt",
}
_NAMES = {name: unit for unit, names in _KINDS.items() for name in (unit, *names.split())}
_WORDS = frozenset(name for name in _NAMES if len(name) > 3 or name in ("day", "sec"))
_ABBREVIATION_LIST = (
    "cm mm km kg mg ft lb lbs oz ml mph hr yr sec min deg hz khz mhz kj kw kpa pa mol ev"
)
_SYMBOL_LIST = "m g s h l L N J W V A K C"
# Words that change what the number before them means.
_QUALIFIER_LIST = (
    "or and not no if when where for with without than at least most more less fewer greater "
    "except only is are was does mod modulo each any all above below between to from about "
    "million billion thousand hundred dozen percent half times squared cubed base"
)
_ABBREVIATIONS = frozenset(_ABBREVIATION_LIST.split())
_SYMBOLS = _ABBREVIATIONS | frozenset(_SYMBOL_LIST.split())
_QUALIFIERS = frozenset(_QUALIFIER_LIST.split())
_POWER = r"(?:\s*\^\s*\{?\s*(?P<power>-?\d)\s*\}?)?"
_IN_COMMAND = re.compile(
    r"(?:\\[ ,;:~]|~|\s)*\\(?:text|textrm|mathrm|mbox|operatorname|rm)\s*"
    r"\{(?P<name>[^{}]*)\}" + _POWER + r"\s*\.?\s*\Z"
)
_BARE = re.compile(
    r"(?<=[\d}) ])\s*(?P<name>[A-Za-z]{2,20}(?: [a-z]{3,12}){0,3})" + _POWER + r"\s*\Z"
)
_CONSTANTS = ("i", "e", "j", "d", "pi")


class Quantity(NamedTuple):
    """An answer without its unit."""

    body: str
    unit: str = ""  # normalised, with its power; empty without a unit
    is_certain: bool = True  # the unit cannot be a product of variables


def split_unit(answer: str) -> Quantity:
    r"""Split a unit from the end of an answer.

    >>> split_unit(r"5\text{ cm}^2"), split_unit("2t").body, split_unit(r"2 \text{ or more}").unit
    (Quantity(body='5', unit='cm^2', is_certain=True), '2t', '')
    """
    found = _IN_COMMAND.search(answer)
    if found and answer[: found.start()].strip() and is_unit_text(found["name"]):
        return Quantity(answer[: found.start()].strip(), unit_of(found["name"], found["power"]))
    found = _BARE.search(answer)
    if found and answer[: found.start()].strip():
        words = found["name"].lower().split()
        if all(word in _WORDS or word.removesuffix("s") in _WORDS for word in words):
            return Quantity(answer[: found.start()].strip(), unit_of(found["name"], found["power"]))
        if len(words) == 1 and found["name"] in _ABBREVIATIONS:
            unit = unit_of(found["name"], found["power"])
            return Quantity(answer[: found.start()].strip(), unit, False)
    return Quantity(answer)


def is_unit_text(text: str) -> bool:
    """Return whether the words of a text may stand for a unit or for what is counted."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    return (
        bool(words)
        and text.strip() not in _CONSTANTS
        and not _QUALIFIERS & set(words)
        and not re.search(r"[\d\\=<>$]", re.sub(r"\^\s*-?\d", "", text))
    )


def is_symbol(text: str) -> bool:
    """Return whether a text is the symbol or the name of a known unit."""
    name = text.lower()
    return text in _SYMBOLS or name in _ABBREVIATIONS or bool({name, name[:-1]} & _WORDS)


def are_different(one: str, other: str) -> bool:
    """Return whether two units, as in ``Quantity``, are known and differ."""
    known = [unit.partition("^")[0] in _KINDS for unit in (one, other)]
    return all(known) and one != other


def unit_of(name: str, power: str | None = None) -> str:
    """Return the symbol of a unit with its power, as in ``cm^2``; another name in lower case."""
    if power is None and (found := re.fullmatch(r"(.*?)\s*\^\s*(-?\d)", name)):
        name, power = found[1], found[2]
    name = re.sub(r"\^\s*-?\d", "", " ".join(name.lower().split()).strip(" ."))
    unit = _NAMES.get(name) or _NAMES.get(name.removesuffix("s")) or name
    return unit if power in (None, "1") else f"{unit}^{power}"
