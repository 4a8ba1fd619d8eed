"""Makes engines from the section ``engine:`` of a recipe.

The group ``delethink.engines`` of the registry maps names to classes: a further engine is a class
with ``Engine.create`` and one row there.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from delethink.config import EngineConfig
from delethink.engines.base import Engine
from delethink.errors import ConfigError, MissingExtraError
from delethink.registry import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def choose_engine(name: str) -> str:
    """Return the name of the engine: "auto" becomes "vllm" if vLLM and Ray are installed.

    Raises:
        MissingExtraError: a package of the engine is not installed.
    """
    missing = [package for package in ("vllm", "ray") if not _is_installed(package)]
    if name == "auto":
        return "transformers" if missing else "vllm"
    if name == "vllm" and missing:
        raise MissingExtraError(missing[0], missing[0])
    return name


def engine_class(name: str) -> type[Engine]:
    """Return the class of an engine.

    Raises:
        ConfigError: the name is unknown, or its object is no engine.
        MissingExtraError: a package of the engine is not installed.
    """
    found: type[Engine] = resolve("delethink.engines", choose_engine(name))
    if not hasattr(found, "create"):
        raise ConfigError(
            f"the engine {name!r} must be a class with a method create, as Engine in "
            f"delethink.engines.base has; it is a {type(found).__name__}"
        )
    return found


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
    return engine_class(config.name).create(
        config,
        model_path,
        model,
        tokenizer,
        trust_remote_code=trust_remote_code,
        seed=seed,
        is_trained=is_trained,
    )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
