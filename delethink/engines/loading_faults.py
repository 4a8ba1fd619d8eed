"""Reasons why a model folder cannot be loaded: faults of its files, and words for transformers'."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from delethink.errors import ModelError
from delethink.json_io import read_json

CONFIG, TOKENIZER_SETTINGS, TEMPLATE = "config.json", "tokenizer_config.json", "chat_template.jinja"
_TOKENIZER = "tokenizer.json"
# Files of a tokenizer; without any, transformers makes one up that knows a few tokens.
_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json", "*.gguf")
_WITHOUT_FILES = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")
_MAX_DETAIL_CHARACTERS = 300
_AGAIN = "correct it, or download the model again"
_TRUST = (
    "read that code, and allow it with --trust-remote-code, or trust_remote_code: true in a recipe"
)


def check_files(folder: Path, part: str) -> None:
    """Check that the JSON files of a part of a model are mappings, and that a tokenizer is there.

    Raises:
        ModelError: one is not; the text names the file.
    """
    names = (CONFIG, TOKENIZER_SETTINGS, _TOKENIZER) if part == "tokenizer" else (CONFIG,)
    found = {}
    for name in names:
        if (file := folder / name).is_file():
            found[name] = read_json(file, ModelError)
            if not isinstance(found[name], dict):
                raise ModelError(f"{file} must be a mapping of names to values")
    if part != "tokenizer":
        return
    settings = found.get(TOKENIZER_SETTINGS, {})
    has_code = "auto_map" in settings or "auto_map" in found.get(CONFIG, {})
    needs_file = not has_code and settings.get("tokenizer_class") not in _WITHOUT_FILES
    if needs_file and not any(map(any, map(folder.glob, _VOCABULARIES))):
        raise ModelError(
            f"the folder {folder} has no {_TOKENIZER}, so no tokenizer can be loaded; copy it from "
            "the model's source, or save it there with save_pretrained"
        )
    if (template := folder / TEMPLATE).is_file():
        try:
            template.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(
                f"{template} is no UTF-8 text (byte {error.start}); save it as UTF-8"
            ) from None


def check_kind(config: Any, model: str) -> None:
    """Refuse models that do not continue a text: encoders, translators, models of images.

    Raises:
        ModelError: the model is one of these; the text names its type.
    """
    text = config.get_text_config()
    kind = None
    if getattr(config, "is_encoder_decoder", False):
        kind = "reads a text and writes another one"
    elif getattr(text, "vocab_size", None) is None:
        kind = "has no vocabulary of tokens"
    elif _is_encoder(config):
        kind = "is an encoder"
    if kind is not None:
        raise ModelError(
            f"{model} {kind} (model_type {config.model_type!r}), and thinking needs a model that "
            "continues a text: take a causal language model"
        )


def _is_encoder(config: Any) -> bool:
    """Return whether models of a configuration fill gaps in a text."""
    named = getattr(config, "architectures", None) or ()
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named):
        return False  # without the import, which takes seconds
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and not getattr(config, "is_decoder", False)


def load_error(part: str, model: str, error: Exception, config: Mapping[str, Any]) -> ModelError:
    """Return the error for a part that transformers cannot load.

    Args:
        part: "model", "tokenizer", "configuration" or "weights".
        model: folder or id.
        error: raised by transformers.
        config: ``config.json`` as far as it is known.
    """
    detail = " ".join((str(error).strip() or repr(error)).split())
    reason = _reason(detail, error, config, model)
    if reason is None:
        files = f"{CONFIG}, {_TOKENIZER} or {TOKENIZER_SETTINGS}" if part == "tokenizer" else CONFIG
        reason = f"transformers cannot use its {files} ({_shown(detail)}); {_AGAIN}"
    return ModelError(f"cannot load the {part} of {model}: {reason}")


def _reason(detail: str, error: Exception, config: Mapping[str, Any], model: str) -> str | None:
    """Return the reason in our words, or ``None`` for a text of another kind."""
    kind = config.get("model_type")
    if "Should have a `model_type` key" in detail:
        return f"its {CONFIG} names no model_type; {_AGAIN}"
    if "does not recognize this architecture" in detail:
        return (
            f"its {CONFIG} has the model_type {kind!r}, which transformers {_version()} does not "
            "know; correct it, or install a transformers that knows it"
        )
    if "custom code which must be executed" in detail or "`trust_remote_code" in detail:
        return f"it comes with code of its own; {_TRUST}"
    if "Unrecognized configuration class" in detail:
        return f"the model_type {kind!r} is no causal language model in transformers {_version()}"
    if missing := re.search(r"does not appear to have a file named (\S+?)\.? ", detail):
        return f"it names the file {missing[1]}, which is not there; download the model again"
    if missing := re.search(
        r"following packages that were not found.*?: ([\w, .-]+?)\. Run", detail
    ):
        return f"its code needs packages that are not installed: pip install {missing[1]}"
    if isinstance(config.get("quantization_config"), dict) and isinstance(error, ImportError):
        method = config["quantization_config"].get("quant_method")
        return (
            f"its weights are quantized with {method!r}, and a package for that is missing "
            f"({_shown(detail)}); install it, set engine=vllm if it has its own, or take the "
            "model before quantization"
        )
    if isinstance(error, ImportError):
        return f"it needs a package that is not installed ({_shown(detail)})"
    if field := re.search(r"field '(\w+)' expected ([^,]+), got", detail, re.IGNORECASE):
        value = config.get(field[1])
        return f"its {CONFIG} has {field[1]}={value!r:.60}, expected {field[2]}; {_AGAIN}"
    if "alidation error" in detail:
        return f"its {CONFIG} contradicts itself ({_shown(detail.partition(': ')[2])}); {_AGAIN}"
    if isinstance(error, KeyError) and (key := _key_of(config, error.args[0])):
        return f"its {CONFIG} has {key}={error.args[0]!r:.60}, which transformers does not know"
    return None


def _key_of(config: Mapping[str, Any], value: Any) -> str | None:
    """Return the key of a value in a configuration or in its sections."""
    for key, own in config.items():
        if own == value and isinstance(value, str):
            return key
        if isinstance(own, dict) and (inner := _key_of(own, value)):
            return f"{key}.{inner}"
    return None


def _shown(detail: str) -> str:
    return detail[:_MAX_DETAIL_CHARACTERS]


def _version() -> str:
    return version("transformers")
