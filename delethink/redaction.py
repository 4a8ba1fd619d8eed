"""Redaction of secrets: API keys, tokens and passwords are replaced where text leaves the process.

Known secrets are the values of environment variables with a telling name (``OPENAI_API_KEY``,
``HF_TOKEN``, ``WANDB_API_KEY``), of settings with one (``api_key``), and those that were
registered. Token ids are numbers and stay as they are.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlsplit

_Value = TypeVar("_Value")

HIDDEN = "***"
# Shorter values occur in ordinary text, and replacing them would tell more than it hides.
MIN_SECRET_CHARACTERS = 8
_VARIABLE = re.compile(
    r"(?:.*_)?(?:API_?KEY|ACCESS_?KEY(?:_ID)?|SECRET_?KEY|PRIVATE_?KEY|TOKEN|SECRET|PASSWORD"
    r"|PASSWD|AUTHORIZATION)",
    re.IGNORECASE,
)
# "token" alone is no secret here: it names a token of the vocabulary.
_SETTING = re.compile(
    r"(?:.*_)?(?:api_?key|access_?key|secret_?key|private_?key|secret|password|passwd"
    r"|authorization)|(?:api|auth|access|bearer|hf|hub|wandb|session)_?token",
    re.IGNORECASE,
)
# Values with blanks or brackets are text, such as a token of a chat template.
_VARIABLE_VALUE = re.compile(rf"[^\s<>]{{{MIN_SECRET_CHARACTERS},}}")
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_URL_PASSWORD = re.compile(r"(?<=://)[^\s/@\"'<>?#]+@")

_registered: set[str] = set()


def register_secret(value: str | None) -> None:
    """Add a secret of this process to those that are redacted; short values are ignored."""
    if value and len(value) >= MIN_SECRET_CHARACTERS:
        _registered.add(value)


def register_url(url: str) -> None:
    """Register what authenticates in a URL: a user's name and password, or a key in its query."""
    try:
        parts = urlsplit(url)
    except ValueError:  # no URL
        return
    if "@" in parts.netloc:
        user, _, password = parts.netloc.rpartition("@")[0].partition(":")
        user, password = unquote(user), unquote(password)
        register_secret(password or user)
        register_secret(base64.b64encode(f"{user}:{password}".encode()).decode())  # basic auth
    for name, value in parse_qsl(parts.query):
        if is_secret_name(name):
            register_secret(value)


def is_secret_name(name: str) -> bool:
    """Return whether the value of a setting is a secret, by the setting's name."""
    return _SETTING.fullmatch(name.replace("-", "_")) is not None


def register_settings(values: Any) -> None:
    """Register the secrets in nested settings, found by their names or in URLs."""
    for name, value in _texts(values):
        if _is_secret(name):
            register_secret(value)
        else:
            register_url(value)


def hide_settings(values: Any, name: str = "") -> Any:
    """Return a copy of nested settings with ``HIDDEN`` in place of each secret."""
    if isinstance(values, Mapping):
        return {key: hide_settings(value, f"{name}.{key}") for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [hide_settings(value, name) for value in values]
    if not isinstance(values, str) or not values:
        return values
    return HIDDEN if _is_secret(name) else redact_error(values)


def hidden_settings(values: Any) -> list[str]:
    """Return the dotted names of settings that ``hide_settings`` has changed."""
    return [
        name
        for name, value in _texts(values)
        if (_is_secret(name) and value == HIDDEN) or f"://{HIDDEN}@" in value
    ]


def _texts(values: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the text of each leaf of nested settings."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _texts(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _texts(value, name)
    elif isinstance(values, str):
        yield name, values


def _is_secret(dotted: str) -> bool:
    return is_secret_name(dotted.rpartition(".")[2])


def redacted(value: _Value) -> _Value:
    """Return plain values for JSON without secrets."""
    text = json.dumps(value)
    if redact(text) == text:
        return value
    without: _Value = json.loads(json_text(value))
    return without


def redact(text: str) -> str:
    """Return the text with ``HIDDEN`` in place of each known secret."""
    secrets = _registered | {
        value
        for name, value in os.environ.items()
        if _is_telling(name) and _VARIABLE_VALUE.fullmatch(value) and not value.isdigit()
    }
    # A search for one plain part of each is fast enough for the traces of a whole step.
    present = frozenset(secret for secret in secrets if _core(secret) in text)
    return _pattern(present).sub(HIDDEN, text) if present else text


def redact_error(text: str) -> str:
    """Return a message for people without secrets, and without what stands before @ in a URL."""
    return _URL_PASSWORD.sub(f"{HIDDEN}@", redact(text))


@lru_cache(maxsize=1024)
def _is_telling(variable: str) -> bool:
    return _VARIABLE.fullmatch(variable) is not None


@lru_cache(maxsize=64)
def _core(secret: str) -> str:
    """Return the longest part that JSON, Python and URLs leave as it is."""
    parts: list[str] = re.findall(r"[A-Za-z0-9_.~-]*", secret)
    return max(parts, key=len)


@lru_cache(maxsize=8)
def _pattern(secrets: frozenset[str]) -> re.Pattern[str]:
    """Return a pattern of the secrets, also as written in JSON, in Python and in a URL."""
    forms = set(secrets)
    for secret in secrets:
        once = json.dumps(secret)[1:-1]
        forms |= {once, json.dumps(once)[1:-1], repr(secret)[1:-1]}
        forms |= {quote(secret), quote(secret, safe="")}
    longest_first = sorted(forms, key=lambda form: (-len(form), form))
    return re.compile("|".join(map(re.escape, longest_first)))


def json_text(value: Any, **options: Any) -> str:
    """Return JSON in ASCII without secrets; ``options`` are those of ``json.dumps``.

    Only strings change, so numbers such as token ids stay exact.
    """
    text = json.dumps(value, **options)
    if redact(text) == text:
        return text
    return _JSON_STRING.sub(lambda found: json.dumps(redact(json.loads(found[0]))), text)
