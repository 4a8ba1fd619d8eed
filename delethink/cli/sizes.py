"""Numbers of tokens on the command line."""

from __future__ import annotations

import math
import re

from delethink.errors import ConfigError

_SIZES = {"": 1, "k": 1024, "m": 1024**2}


def size(text: str, option: str, minimum: int = 1) -> int:
    """Return the number of tokens of a text: 8,192 for ``8k``.

    Args:
        text: value of the option.
        option: name of the option, for the error.
        minimum: smallest allowed number.

    Raises:
        ConfigError: not a whole number of tokens, or below the minimum.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([km]?)\s*", text.lower())
    value = float(found[1]) * _SIZES[found[2]] if found else math.nan
    if not value >= minimum or value != int(value):
        raise ConfigError(
            f"{option}: a whole number of tokens, at least {minimum}, like 24576, 24k or 1M, is "
            f"needed: got {text!r}"
        )
    return int(value)


def sizes(text: str, option: str, minimum: int = 1) -> list[int]:
    """Return the numbers of a list: [8192, 16384] for ``8k,16k``."""
    return [size(part, option, minimum) for part in text.split(",")]
