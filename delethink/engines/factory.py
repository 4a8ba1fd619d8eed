"""Makes the engine that a recipe asks for."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import TYPE_CHECKING, Any, Literal

from delethink.config import EngineConfig
from delethink.engines.base import Engine
from delethink.engines.loading import (
    eos_ids,
    load_model,
    load_shell,
    locate,
    longest_sequence,
)
from delethink.errors import MissingExtraError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def choose_engine(name: str) -> Literal["transformers", "vllm"]:
    """What ``"auto"`` stands for here: vLLM in Ray workers where both can be imported.

    Raises:
        MissingExtraError: vLLM is asked for and cannot be imported.
    """
    if name == "transformers":
        return "transformers"
    for package in ("vllm", "ray"):
        if importlib.util.find_spec(package) is None:
            if name == "auto":
                return "transformers"
            raise MissingExtraError(package, package)
    return "vllm"


def make_engine(
    config: EngineConfig,
    model_path: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trust_remote_code: bool = False,
    seed: int = 0,
    is_trained: bool = True,
) -> Engine:
    """Return the engine that the settings name, with the weights of ``model``.

    ``"transformers"`` samples from ``model`` itself, which a trainer may change if ``is_trained``;
    ``"vllm"`` loads ``model_path`` in each of its Ray workers.
    """
    ends = eos_ids(model, tokenizer)
    if choose_engine(config.name) == "transformers":
        from delethink.engines.transformers import TransformersEngine

        pad = int(tokenizer.pad_token_id)
        return TransformersEngine(model, ends, pad, seed=seed, is_trained=is_trained)
    from delethink.engines.ray import RayPool

    return RayPool(
        locate(model_path),
        num_workers=config.num_engines,
        gpus_per_worker=config.gpus_per_engine,
        cpus_per_worker=config.cpus_per_engine,
        max_model_tokens=longest_sequence(model),
        dtype=config.engine_dtype,
        eos_ids=ends,
        seed=seed,
        trust_remote_code=trust_remote_code,
        **pool_options(config),
    )


def pool_options(config: EngineConfig) -> dict[str, Any]:
    """Return the arguments of ``RayPool`` that the settings decide."""
    from delethink.engines.pool_settings import PoolSettings

    renamed = {"chunks_per_worker": "chunks_per_engine", "silence_timeout": "heartbeat_timeout"}
    settings = PoolSettings(
        **{
            field.name: getattr(config, renamed.get(field.name, field.name))
            for field in dataclasses.fields(PoolSettings)
        }
    )
    return {
        "settings": settings,
        "weight_sync_timeout_s": config.weight_sync_timeout,
        "startup_timeout_s": config.startup_timeout,
        "can_sleep": config.sleep,
        "placement": config.node_placement,
        "kv_cache_gib": config.kv_cache_gib,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "max_batch_size": config.max_batch_size,
        "tensor_parallel_size": config.tensor_parallel_size,
        "weight_transfer": config.weight_transfer,
    }


def make_evaluation_engine(
    config: EngineConfig,
    model_path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trust_remote_code: bool = False,
    max_batch_size: int = 256,
    seed: int = 0,
) -> Engine:
    """Return the engine that the settings name, for a model that is not trained.

    Args:
        config: settings of the engine.
        model_path: folder, hub id, or ``"toy"``.
        tokenizer: tokenizer of the model.
        trust_remote_code: run code from the model's repository.
        max_batch_size: chunks decoded at once by ``"transformers"``.
        seed: seed of requests without a seed of their own.
    """
    if choose_engine(config.name) == "transformers":
        import torch

        from delethink.engines.transformers import TransformersEngine

        device = "cuda" if torch.cuda.is_available() else "cpu"
        used = config.dtype or ("bfloat16" if device == "cuda" else "float32")
        model: Any = load_model(model_path, used, trust_remote_code)
        model.to(device)
        ends = eos_ids(model, tokenizer)
        pad = int(tokenizer.pad_token_id)
        return TransformersEngine(model, ends, pad, max_batch_size, seed)
    return make_engine(
        config,
        model_path,
        load_shell(model_path, trust_remote_code),
        tokenizer,
        trust_remote_code=trust_remote_code,
        seed=seed,
    )
