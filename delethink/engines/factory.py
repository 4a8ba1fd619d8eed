"""Makes engines from the section ``engine:`` of a recipe.

The group ``delethink.engines`` of the registry maps names to classes: a further engine is a class
with ``Engine.create`` and one row there.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from delethink.config import EngineConfig
from delethink.engines.base import Engine
from delethink.errors import MissingExtraError
from delethink.registry import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PACKAGES = {"vllm": ("vllm", "ray")}  # needed by an engine, beside transformers


def choose_engine(name: str) -> str:
    """Return the name of the engine: "auto" becomes "vllm" if vLLM and Ray are installed.

    Raises:
        MissingExtraError: a package of the engine is not installed.
    """
    missing = [package for package in _PACKAGES["vllm"] if not _is_installed(package)]
    if name == "auto":
        return "transformers" if missing else "vllm"
    for package in _PACKAGES.get(name, ()):
        if package in missing:
            raise MissingExtraError(package, package)
    return name


def make_engine(
    config: EngineConfig,
    model_path: str,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trust_remote_code: bool = False,
    seed: int = 0,
    is_trained: bool = True,
) -> Engine:
    """Make an engine with the weights of a model; see ``Engine.create``."""
    engine_class: type[Engine] = resolve("delethink.engines", choose_engine(config.name))
    return engine_class.create(
        config,
        model_path,
        model,
        tokenizer,
        trust_remote_code=trust_remote_code,
        seed=seed,
        is_trained=is_trained,
    )


def make_evaluation_engine(
    config: EngineConfig,
    model_path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trust_remote_code: bool = False,
    max_batch_size: int = 256,
    seed: int = 0,
) -> Engine:
    """Make an engine for a model without a trainer; only the engine loads the weights.

    Args:
        config: settings of the engine.
        model_path: folder, Hugging Face id, or ``"toy"``.
        tokenizer: tokenizer of the model.
        trust_remote_code: run code from the model's repository.
        max_batch_size: chunks decoded at once by an engine in this process, unless ``config`` says.
        seed: seed of requests without a seed of their own.
    """
    if choose_engine(config.name) == "transformers" and config.max_batch_size is None:
        config = config.model_copy(update={"max_batch_size": max_batch_size})
    return make_engine(
        config,
        model_path,
        None,
        tokenizer,
        trust_remote_code=trust_remote_code,
        seed=seed,
        is_trained=False,
    )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
