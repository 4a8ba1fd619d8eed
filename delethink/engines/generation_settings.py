"""Generation settings of a checkpoint, in a form that transformers can write back.

Nothing here samples by them, but every model carries them, and its checkpoints hold them again.
transformers refuses to load some (``num_return_sequences`` without sampling or beams), and to save
more (a ``temperature`` without ``do_sample``). What it refuses is left out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from delethink.errors import ModelError

if TYPE_CHECKING:
    from transformers import GenerationConfig

# Settings read here, and metadata: the last ones to leave out.
_KEPT = ("eos_token_id", "bos_token_id", "pad_token_id", "transformers_version")
_OWN = ("_commit_hash", "_from_model_config", "_original_object_hash", "transformers_version")


def savable_settings(
    values: Mapping[str, Any], origin: str
) -> tuple[GenerationConfig, tuple[str, ...]]:
    """Return generation settings without those that cannot be saved, and the names of these.

    Args:
        values: content of ``generation_config.json``; unknown keys are kept.
        origin: the file, for the error text.

    Raises:
        ModelError: the end-of-sequence tokens are no token ids.
    """
    _check_ends(values, origin)
    kept, left_out = savable_values(values)
    with _quietly():
        settings = _make(kept)
    unread = {key for key in kept.keys() - settings.to_dict().keys() if key not in _OWN}
    return settings, tuple(sorted({*left_out, *unread}))


def savable_values(values: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return generation settings without those that cannot be saved, and the names of these."""
    kept, left_out = dict(values), list[str]()
    with _quietly():
        while (reason := _fault(kept)) is not None and (names := _culprits(kept, reason)):
            kept = {key: value for key, value in kept.items() if key not in names}
            left_out += names
    return kept, tuple(sorted(left_out))


def settings_of_config(
    config: Mapping[str, Any],
) -> tuple[GenerationConfig | None, tuple[str, ...]]:
    """Return generation settings that stand in a model's ``config.json``, as of old releases.

    Returns:
        The settings and the names left out; ``None`` if transformers reads them without a fault.
    """
    from transformers import GenerationConfig

    known = GenerationConfig().to_dict().keys() - set(_OWN)
    text = config.get("text_config")
    every = {**(text if isinstance(text, dict) else {}), **config}
    stated = {key: value for key, value in every.items() if key in known and value is not None}
    kept, left_out = savable_values(stated)
    if not left_out:
        return None, ()
    with _quietly():
        return _make({**kept, "_from_model_config": True}), left_out


def _check_ends(values: Mapping[str, Any], origin: str) -> None:
    ends = values.get("eos_token_id")
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and (not isinstance(end, int) or isinstance(end, bool)):
            raise ModelError(
                f"{origin}: eos_token_id must be a token id or a list of them, got {ends!r:.80}"
            )


def _culprits(values: Mapping[str, Any], reason: str) -> list[str]:
    """Return the names of the settings to leave out because of an error of ``_fault``."""
    listed = [name for name in re.findall(r"^- `(\w+)`:", reason, re.MULTILINE) if name in values]
    if removable := [name for name in listed if name not in _KEPT]:
        return removable
    # An error may name settings that it compares with; the first one that matters is left out.
    every = sorted(values, key=lambda name: (name in _KEPT, _place(name, reason)))
    for name in every:
        if _fault({key: value for key, value in values.items() if key != name}) != reason:
            return [name]
    return every


def _place(name: str, reason: str) -> int:
    """Return the place of a name in an error text; names that it lacks come last."""
    place = reason.find(f"`{name}`")
    return place if place >= 0 else len(reason)


def _make(values: Mapping[str, Any]) -> GenerationConfig:
    from transformers import GenerationConfig

    return GenerationConfig.from_dict(dict(values))


def _fault(values: Mapping[str, Any]) -> str | None:
    """Return the reason for which settings cannot be loaded, saved and loaded again."""
    try:
        settings = _make(values)
        settings.validate(strict=True)
        again = json.loads(settings.to_json_string(keys_to_pop=["compile_config"]))
        _make(again).validate(strict=True)
        hash(settings)  # transformers takes one while it loads
        if settings.compile_config is not None:
            return "`compile_config` is never saved"
    except Exception as error:  # a file may hold anything, and each setting fails in its own way
        return str(error) or repr(error)
    return None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep transformers from warnings about settings that are left out with a note of ours."""
    logger = logging.getLogger("transformers.generation.configuration_utils")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)
