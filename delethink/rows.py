"""Values of a row of a data set: nested columns, conversations, accepted answers.

Rows are read as other trainers keep them: conversations of verl, TRL and ShareGPT, and answers as
texts, numbers and lists inside other columns.
"""

from __future__ import annotations

import ast
import datetime
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import zip_longest
from typing import Any

from delethink.errors import ConfigError
from delethink.json_io import parse_json, shorten

MISSING: Any = object()
"""The value of a column that a row does not have."""

Message = Mapping[str, str]

_ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT
_MAX_LISTED_CHARACTERS = 10_000  # of a list of answers written as text
_GSM8K_ANSWER = re.compile(r"(?:^|\n)####[ \t]*(\S[^\n]*)\s*$")


@dataclass(frozen=True)
class Question:
    """The last message of the user, and the messages before it."""

    prompt: str
    before: tuple[Message, ...] | None = None  # None: a text, not a conversation


def value_at(value: Any, key: str) -> Any:
    """Return the value of a column, or of a dotted key inside it, or ``MISSING``.

    A column may have dots in its name. Lists have the keys 0, 1, ...; a text with JSON is read.
    """
    if value is None:
        return None  # a column that the row leaves empty
    if isinstance(value, str):
        value = _json_of(value)
    if isinstance(value, Mapping):
        if key in value:
            return value[key]
        for dot in (match.start() for match in re.finditer(r"\.", key)):
            if key[:dot] in value:
                found = value_at(value[key[:dot]], key[dot + 1 :])
                if found is not MISSING:
                    return found
    if isinstance(value, (list, tuple)):
        first, _, rest = key.partition(".")
        if first.isdecimal() and len(first) < 10 and int(first) < len(value):
            return value_at(value[int(first)], rest) if rest else value[int(first)]
    return MISSING


def names_of(row: Mapping[str, Any]) -> Iterable[str]:
    """Yield the names of the columns, and the dotted keys one level below."""
    for name, value in row.items():
        yield name
        if isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in value)


def has_picture(row: Mapping[str, Any]) -> bool:
    """Return whether a row has a picture, in the columns that models for pictures read."""
    pictures = (row.get(name) for name in ("image", "images"))
    return any(bool(picture) and not is_missing(picture) for picture in pictures)


def is_missing(value: Any) -> bool:
    """Return whether a value is null or not a number: that is a missing number in Parquet."""
    return value is None or bool(value != value)


def read_question(value: Any) -> Question | None:
    """Return the question in a column: a text or a conversation; ``None`` if it is empty.

    Raises:
        ValueError: neither a text nor a conversation that ends with the user's message.
    """
    messages = _conversation_of(value)
    if messages is not None:
        if not messages:
            return None
        *before, last = map(_message, messages)
        if last["role"] != "user":
            raise ValueError(
                f"a conversation must end with the user's message, got {last['role']!r} last"
            )
        return Question(last["content"], tuple(before)) if last["content"].strip() else None
    if isinstance(value, (Mapping, list, tuple)):
        keys = f" with the keys {', '.join(map(str, value))}" if isinstance(value, Mapping) else ""
        raise ValueError(
            f"the problem must be a text or a list of messages, got a {type(value).__name__}{keys}"
            "; name a text inside it as problem_key=COLUMN.KEY"
        )
    if isinstance(value, str) and re.match(r"\s*\[\s*\{\s*'(?:role|content|from|value)'", value):
        raise ValueError(
            "the problem is a conversation as Python prints it; save the rows as JSON or Parquet"
        )
    text = _text(value)
    return Question(text) if text else None


def accepted_answers(value: Any, as_mathematics: bool) -> tuple[str, ...]:
    """Return the accepted answers in a column, without repeats; empty if there is none.

    Args:
        value: a text, a number, a list of them, or a mapping with one of these.
        as_mathematics: the answer is a formula. So a text with a list of texts (``["24"]``) is that
            list, and of a solution as in GSM8K the part after ``####`` counts.

    Raises:
        ValueError: a value of another kind.
    """
    if isinstance(value, Mapping):
        if len(value) != 1:
            raise ValueError(
                f"the answer must be a text, a number or a list, got a mapping with the keys "
                f"{', '.join(map(str, value))}; name one as answer_key=COLUMN.KEY"
            )
        return accepted_answers(next(iter(value.values())), as_mathematics)
    if as_mathematics and isinstance(value, str):
        value = _list_of(value) or value
        if isinstance(value, str) and (found := _GSM8K_ANSWER.search(value)):
            value = found[1]
    listed = value if isinstance(value, (list, tuple)) else [value]
    return tuple(dict.fromkeys(text for text in map(_text, listed) if text))


def read_date(value: Any, name: str) -> datetime.date:
    """Return the day of a text, date or time; ``name`` locates it in the error text.

    Raises:
        ConfigError: no date.
    """
    try:
        return datetime.date.fromisoformat(str(value)[:10])
    except ValueError:
        raise ConfigError(
            f"{name} must be a date such as 2024-08-01, got {shorten(value)}"
        ) from None


def _text(value: Any) -> str:
    """Return a scalar as people write it, without outer space; empty for a missing one."""
    if isinstance(value, (Mapping, list, tuple)):
        raise ValueError(f"a text or a number is needed, got a {type(value).__name__} inside")
    if is_missing(value):
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8").strip()
    if isinstance(value, (float, Decimal)) and math.isfinite(value):
        if not value:
            return "0"  # also for -0.0
        # Columns with a gap turn 70 into 70.0, and graders do not read 1e-07.
        text = f"{Decimal(repr(value) if isinstance(value, float) else value):f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return str(value).strip()


def _conversation_of(value: Any) -> list[Any] | None:
    """Return the messages in a value, which may be JSON; ``None`` if it has none."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        value = _json_of(value)
    if isinstance(value, Mapping):  # one message, or a list of each field, as `datasets` gives
        fields = dict(value)
        if all(isinstance(column, (list, tuple)) for column in fields.values()):
            rows = zip_longest(*fields.values())
            value = [dict(zip(fields, row, strict=True)) for row in rows]
        else:
            value = [fields]
    if not isinstance(value, (list, tuple)) or not all(isinstance(m, Mapping) for m in value):
        return None
    known = all(("role" in m and "content" in m) or ("from" in m and "value" in m) for m in value)
    return list(value) if known else None


def _message(message: Mapping[str, Any]) -> Message:
    role = message["role"] if message.get("role") is not None else message.get("from")
    content = message["content"] if message.get("content") is not None else message.get("value")
    if isinstance(content, (list, tuple)):  # parts, as for models that see pictures
        kinds = [part.get("type") if isinstance(part, Mapping) else None for part in content]
        others = [kind for kind in kinds if kind != "text"]
        if others:
            raise ValueError(f"only parts of type 'text' can be used, got {others[0]!r}")
        content = "".join(str(part.get("text") or "") for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"a message needs a role and a text, got {shorten(dict(message))}")
    return {"role": _ROLES.get(role, role), "content": content}


def _json_of(text: str) -> Any:
    """Return the list or mapping in a JSON text, or ``MISSING``."""
    if not text.lstrip().startswith(("{", "[")):
        return MISSING
    try:
        return parse_json(text, "the text", ConfigError)
    except ConfigError:
        return MISSING


def _list_of(text: str) -> list[str] | None:
    """Return the texts of a list that is written as JSON or as Python prints it."""
    if not re.match(r"\s*\[\s*[\"']", text) or len(text) > _MAX_LISTED_CHARACTERS:
        return None
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError):
        try:
            listed = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    if isinstance(listed, list) and all(isinstance(one, str) for one in listed):
        return listed
    return None
