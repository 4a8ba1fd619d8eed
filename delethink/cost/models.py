"""Model configurations: from a ``config.json``, the bundled table or figures on the command line.

Only architectures with known layers are supported. Any other one is an error, never a guess.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path

from delethink.cost import gemma, recurrent
from delethink.cost.config_reader import Config, ConfigReader
from delethink.cost.families import SOFTMAX, softmax_shape
from delethink.cost.mixtures import MIXTURES
from delethink.cost.shape import ModelShape
from delethink.errors import MissingExtraError, ModelError
from delethink.json_io import parse_json, read_json

_FAMILIES: dict[str, Callable[[ConfigReader], ModelShape]] = {
    **dict.fromkeys(SOFTMAX, softmax_shape),
    **{model_type: routing.shape for model_type, routing in MIXTURES.items()},
    **dict.fromkeys(("gemma3n", "gemma3n_text"), gemma.gemma3n),
    **dict.fromkeys(
        ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), gemma.gemma4
    ),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text"), recurrent.qwen3_5),
    **dict.fromkeys(("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"), recurrent.qwen3_next),
    "granitemoehybrid": recurrent.granite_hybrid,
    "kimi_linear": recurrent.kimi_linear,
    "lfm2": recurrent.lfm2,
    "lfm2_moe": recurrent.lfm2_moe,
    "minimax": recurrent.minimax,
    "nemotron_h": recurrent.nemotron_h,
    "olmo_hybrid": recurrent.olmo_hybrid,
}


def model_shape(model: str) -> ModelShape:
    """Return the shape of a model.

    Args:
        model: a name from the bundled table, or ``"toy"`` for the shipped reasoner. Also a folder
            or file with a ``config.json``, a model id on the Hugging Face Hub, or figures under
            the keys of a config (``"hidden_size=1536,num_hidden_layers=28,…"``).

    Raises:
        ModelError: the model is unknown, or its architecture or figures cannot be used.
        MissingExtraError: the model is on the Hub, and ``huggingface_hub`` is not installed.
    """
    name, config = _find(model)
    return shape_of_config(config, name)


def config_of(model: str) -> Config:
    """Return the config of a model; see ``model_shape``."""
    return _find(model)[1]


def _find(model: str) -> tuple[str, Config]:
    """Return the name and the config of a model."""
    if "=" in model:
        return "model by hand", _parse_figures(model)
    if model == "toy":
        toy = str(files("delethink").joinpath("assets/toy_reasoner/config.json"))
        return "the shipped toy reasoner", _read(Path(toy))
    bundled = _bundled()
    if model.lower() in bundled:
        return bundled[model.lower()]
    path = Path(model)
    if os.path.exists(path):  # false for a text longer than a path may be
        return path.name, _read(path / "config.json" if path.is_dir() else path)
    return model, _download(model)


def known_models() -> list[str]:
    """Return the names in the bundled table."""
    return [name for name, _ in _bundled().values()]


def shape_of_config(config: Config, name: str) -> ModelShape:
    """Return the shape of the model with this Hugging Face config.

    Raises:
        ModelError: the architecture is not supported, or a figure is missing or impossible.
    """
    outer_type = config.get("model_type")
    if isinstance(config.get("text_config"), dict):  # a multimodal model
        tied = {k: config[k] for k in ("tie_word_embeddings",) if k in config}
        inner = {"model_type": outer_type} if outer_type else {}
        config = {**inner, **config["text_config"], **tied}
    reader = ConfigReader(config, name)
    if reader.model_type not in _FAMILIES:
        raise ModelError(_unknown_type(reader.model_type, name))
    return _FAMILIES[reader.model_type](reader)


def known_model_types() -> list[str]:
    """Return the values of ``model_type`` whose layers are known."""
    return sorted(_FAMILIES)


def _unknown_type(model_type: str, name: str) -> str:
    """Return the text of the error: the nearest known type, and the way to use its layers."""
    near = get_close_matches(model_type[:80].lower(), known_model_types(), n=1, cutoff=0)[0]
    return (
        f"{name}: model_type {model_type!r:.80} is not supported, and the nearest known type is "
        f"{near!r}: if the layers are the same, give the figures as --model model_type={near},…, "
        "otherwise see the table of model types in docs/guide/cost.md"
    )


@cache
def _bundled() -> dict[str, tuple[str, Config]]:
    """Return name and config by lower-case name. ``like`` names an entry to inherit from."""
    text = files("delethink").joinpath("assets/models.json").read_text(encoding="utf-8")
    table: dict[str, Config] = json.loads(text)

    def resolved(name: str) -> Config:
        config = dict(table[name])
        like = config.pop("like", None)
        return {**(resolved(like) if like else {}), **config}

    return {name.lower(): (name, resolved(name)) for name in table}


def _parse_figures(text: str) -> Config:
    config: Config = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals or not key:
            raise ModelError(f"the figures of a model are key=value,key=value: got {part!r}")
        try:
            config[key] = parse_json(value, "a figure", ModelError)
        except ModelError:
            config[key] = value
    return config


def _read(path: Path) -> Config:
    config = read_json(path, ModelError)
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no config: expected a JSON object")
    return config


def _download(model: str) -> Config:
    name, _, revision = model.partition("@")
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise ModelError(
            f"{model!r:.100} is neither a file nor a known model (see `delethink cost --models`), "
            "and models on the Hugging Face Hub are named owner/name"
        )
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise MissingExtraError("huggingface_hub", "eval") from None
    try:
        return _read(Path(hf_hub_download(name, "config.json", revision=revision or None)))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        near = get_close_matches(model.lower(), _bundled(), n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "`delethink cost --models` lists them."
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{model!r} is not a known model, and its config.json could not be downloaded from the "
            f"Hugging Face Hub ({reason}). {hint}"
        ) from None
