"""Values of command-line arguments: numbers of tokens, KEY=VALUE pairs, carryover policies."""

from __future__ import annotations

import ast
import math
import re
from typing import Any

from delethink.carryover import Boundary, Carryover
from delethink.errors import ConfigError
from delethink.redaction import register_settings
from delethink.registry import make
from delethink.yaml_io import parse_scalar

_SIZES = {"": 1, "k": 1024, "m": 1024**2}


def size(text: str, option: str, minimum: int = 1) -> int:
    """Return the number of tokens of a text: 8,192 for ``8k``, 100,000 for ``1e5``.

    Raises:
        ConfigError: not a whole number of tokens, or below the minimum; it names the option.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\+?\d{1,2})?)\s*([km]?)\s*", text.lower())
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


def check_model_name(model: str) -> None:
    """Refuse a number as the name of a model: -m is no carryover size.

    Raises:
        ConfigError: the name is a number of tokens.
    """
    if re.fullmatch(r"[\d.,]+[kKmM]?", model):
        raise ConfigError(
            f"-m is the model, got the number {model!r}: write --carryover-size {model} for the "
            "carryover size"
        )


def parse_head_size(text: str | None) -> Any:
    """Return the size of the head; ``None`` lets ``ChunkSpec`` choose."""
    return None if text is None else size(text, "--head-size", 0)


def parse_carryover(text: str | None) -> Carryover | None:
    """Return the carryover policy of ``NAME[:KEY=VALUE,...]``; ``None`` for the head and tail.

    Raises:
        UserError: a size instead of a name, or an unknown name or argument.
    """
    if text is None or text == "head_tail":
        return None
    if text[:1].isdigit():
        raise ConfigError(
            f"--carryover is the name of a carryover policy, got the size {text!r}: write "
            f"--carryover-size {text}"
        )
    made: Carryover = make("delethink.carryovers", _parse_policy(text, "--carryover"))
    return made


def parse_boundary(text: str | None) -> Boundary | None:
    """Return the boundary policy of ``NAME[:KEY=VALUE,...]``.

    Raises:
        UserError: an unknown name or argument.
    """
    if text is None:
        return None
    made: Boundary = make("delethink.boundaries", _parse_policy(text, "--boundary"))
    return made


def _parse_policy(text: str, option: str) -> dict[str, Any]:
    found = re.fullmatch(r"(.+?)(?::(\w+=.*))?", text)
    if found is None:
        raise ConfigError(f"{option} must be NAME[:KEY=VALUE,...], got {text!r}")
    pairs = re.split(r",(?=\w+=)", found[2]) if found[2] else []
    return {"name": found[1], "args": parse_pairs(pairs, option)}


def parse_pairs(pairs: list[str], option: str) -> dict[str, Any]:
    """Return ``KEY=VALUE`` texts as a mapping.

    Values are Python literals, numbers and constants as in a recipe, or plain text.

    Raises:
        ConfigError: a text of another form.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"{option} must be KEY=VALUE, got {pair!r}")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = parse_scalar(value)
    register_settings(found)
    return found
