"""Numbers of tokens as people write them."""

from __future__ import annotations

import math
import re

from delethink.errors import ConfigError

_SIZES = {"": 1, "k": 1024, "m": 1024**2}


def size(text: str, option: str, least: int = 1) -> int:
    """``8k`` -> 8,192.

    Raises:
        ConfigError: no whole number of tokens, or less than ``least``.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([km]?)\s*", text.lower())
    value = float(found[1]) * _SIZES[found[2]] if found else math.nan
    if not value >= least or value != int(value):
        raise ConfigError(
            f"{option}: a whole number of tokens, at least {least}, like 24576, 24k or 1M: "
            f"got {text!r}"
        )
    return int(value)


def sizes(text: str, option: str, least: int = 1) -> list[int]:
    """``8k,16k`` -> [8,192, 16,384]."""
    return [size(part, option, least) for part in text.split(",")]
