"""Arguments of environments and of ``reset``: tokenizers by name, numbers, flags and problems."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from delethink.envs.spaces import CharacterTokenizer
from delethink.errors import ConfigError, ModelError, did_you_mean
from delethink.tasks import as_problem
from delethink.tokenization import Tokenizer, end_tokens, query_ids
from delethink.tokens import token_array
from delethink.types import Problem, TokenIds

# Tokenizers in use, by name: many environments share one. A folder that changes is read again.
_TOKENIZERS: WeakValueDictionary[Any, Any] = WeakValueDictionary()

MAX_VOCABULARY = 2**31 - 1  # ids in windows have 32 bits


def make_tokenizer(given: Any, trust_remote_code: bool) -> Any:
    """Return the tokenizer: an object itself, or loaded from a folder or a Hugging Face id.

    Raises:
        ConfigError: the object is no tokenizer.
        ModelError: the tokenizer cannot be loaded.
    """
    if given is None:
        return CharacterTokenizer()
    if isinstance(given, str | os.PathLike):
        return _named_tokenizer(os.fspath(given), trust_remote_code)
    has_decode = callable(getattr(given, "decode", None)) and hasattr(given, "chat_template")
    if not callable(given) or not has_decode or isinstance(given, type):
        raise ConfigError(
            "a tokenizer must be a folder, a Hugging Face id, or an object that is called with a "
            f"text, and has decode(ids) and chat_template; got {given!r:.80}"
        )
    return given


def _named_tokenizer(name: str, trust_remote_code: bool) -> Any:
    folder = Path(name).expanduser()
    files = sorted(folder.glob("*.j*")) if folder.is_dir() else []  # json, and jinja templates
    stamps = tuple((file.name, file.stat().st_mtime_ns) for file in files)
    key = (str(folder.absolute()) if files else name, trust_remote_code, stamps)
    found = _TOKENIZERS.get(key)
    if found is not None:
        return found
    from delethink.engines.loading import load_tokenizer  # the core loads without engines

    try:
        loaded = _TOKENIZERS[key] = load_tokenizer(name, trust_remote_code)
    except ModelError as error:
        if not str(error).startswith("cannot load"):
            raise
        raise ModelError(
            f"{error} A tokenizer is a folder, the Hugging Face id of a model, 'toy', or an object"
        ) from error
    return loaded


def default_eos_ids(
    tokenizer: Any, given: Any, vocabulary: int, trust_remote_code: bool
) -> tuple[int, ...]:
    """Return the tokens below ``vocabulary`` that end an answer.

    ``given`` is the argument of the environment: for a name, the settings of its model count too,
    where there are any.
    """
    model = None
    if isinstance(given, str | os.PathLike):
        from delethink.engines.loading import load_shell

        with suppress(ModelError):  # a folder may hold a tokenizer alone
            model = load_shell(os.fspath(given), trust_remote_code)
    return tuple(token for token in end_tokens(tokenizer, model) if token < vocabulary)


def check_number(name: str, value: Any, largest: int | None = None) -> None:
    """Raise a ``ConfigError`` unless ``value`` is a whole number from 1 to ``largest``."""
    number = _whole(value)
    if number is None:
        raise ConfigError(f"{name} must be a whole number, got {value!r:.80}")
    if number < 1 or (largest is not None and number > largest):
        most = "" if largest is None else f" and at most {largest}"
        raise ConfigError(f"{name} must be at least 1{most}, got {value}")


def check_flag(name: str, value: Any) -> None:
    """Raise a ``ConfigError`` unless ``value`` is a truth value."""
    if not isinstance(value, bool | np.bool_):
        raise ConfigError(f"{name} must be True or False, got {value!r:.80}")


def token_set(name: str, ids: Any) -> frozenset[int]:
    """Return token ids as a set of numbers; raise a ``ConfigError`` for anything else."""
    numbers = None if isinstance(ids, str) or not hasattr(ids, "__iter__") else map(_whole, ids)
    found = None if numbers is None else frozenset(numbers)
    if found is None or None in found:
        raise ConfigError(f"{name} must be a sequence of token ids, got {ids!r:.80}")
    return frozenset(number for number in found if number is not None)


def _whole(value: Any) -> int | None:
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def problem_from(options: Any) -> Problem | None:
    """Return the problem of the options of ``reset``, or ``None``.

    Raises:
        ConfigError: an option is unknown, or the problem is none.
    """
    if options is None:
        return None
    if not isinstance(options, Mapping):
        raise ConfigError(
            f"options must be a mapping such as {{'problem': ...}}, got {options!r:.80}"
        )
    for name in options:
        if name != "problem":
            near = did_you_mean(str(name), ["problem"])
            raise ConfigError(f"reset has no option {name!r:.80}.{near}")
    problem = options.get("problem")
    return None if problem is None else as_problem(problem, "options['problem']")


def query_of(
    tokenizer: Tokenizer,
    problem: Problem,
    vocabulary: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> TokenIds:
    """Return the token ids of the prompt of a problem.

    Raises:
        ConfigError: the tokenizer does not give a list of ids below ``vocabulary``.
        ModelError: the chat template fails.
    """
    try:
        ids = query_ids(tokenizer, problem, chat_template_kwargs)
    except (TypeError, KeyError, IndexError) as error:
        raise ConfigError(
            "the tokenizer must return a mapping with a list of ids under 'input_ids'; encoding "
            f"the prompt {problem.prompt!r:.80} failed: {error!r}"
        ) from error
    wrong = [token for token in ids if (number := _whole(token)) is None or number < 0]
    if wrong:
        raise ConfigError(
            f"the tokenizer must return a list of ids under 'input_ids'; the prompt "
            f"{problem.prompt!r:.80} has {wrong[0]!r:.80} among them"
        )
    if ids and max(ids) >= vocabulary:
        raise ConfigError(
            f"the query has the token {max(ids)}, outside the vocabulary of {vocabulary}"
        )
    return token_array(ids)
