"""Makes the engine that a recipe asks for."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

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

EngineName = Literal["auto", "transformers", "vllm"]


def choose_engine(name: EngineName) -> Literal["transformers", "vllm"]:
    """What ``"auto"`` stands for here: vLLM in Ray workers where both can be imported.

    Raises:
        MissingExtraError: vLLM is asked for and cannot be imported.
    """
    if name == "transformers":
        return name
    for package in ("vllm", "ray"):
        if importlib.util.find_spec(package) is None:
            if name == "auto":
                return "transformers"
            raise MissingExtraError(package, package)
    return "vllm"


def make_engine(
    name: EngineName,
    model_path: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_workers: int = 1,
    gpus_per_worker: float = 0.0,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    weight_sync_timeout: float = 60.0,
    seed: int = 0,
    rollout: Mapping[str, Any] | None = None,
    is_trained: bool = True,
) -> Engine:
    """The engine called ``name``, serving the weights of ``model``.

    ``"transformers"`` samples from ``model`` itself, which a trainer may change if ``is_trained``;
    ``"vllm"`` loads ``model_path`` in each of ``num_workers`` Ray workers, which ``rollout`` says
    how to treat: a recipe's section of that name, as a mapping.
    """
    ends = eos_ids(model, tokenizer)
    if choose_engine(name) == "transformers":
        from delethink.engines.transformers import TransformersEngine

        pad = int(tokenizer.pad_token_id)
        return TransformersEngine(model, ends, pad, seed=seed, is_trained=is_trained)
    from delethink.engines.ray import RayPool

    return RayPool(
        locate(model_path),
        num_workers=num_workers,
        gpus_per_worker=gpus_per_worker,
        max_model_tokens=longest_sequence(model),
        dtype=dtype,
        eos_ids=ends,
        seed=seed,
        trust_remote_code=trust_remote_code,
        weight_sync_timeout_s=weight_sync_timeout,
        **pool_options(rollout or {}),
    )


def pool_options(rollout: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``RayPool`` that a recipe's ``rollout`` section says something of."""
    from delethink.engines.pool_settings import PoolSettings

    rest = {name: value for name, value in rollout.items() if name != "step_timeout"}
    known = [f.name for f in dataclasses.fields(PoolSettings) if f.name in rest]
    settings = PoolSettings(**{name: rest.pop(name) for name in known})
    for short, long in (("startup_timeout", "startup_timeout_s"), ("sleep", "can_sleep")):
        if short in rest:
            rest[long] = rest.pop(short)
    return {"settings": settings, **rest}


def make_evaluation_engine(
    name: EngineName,
    model_path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_workers: int = 1,
    gpus_per_worker: float = 0.0,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    max_batch_size: int = 256,
    seed: int = 0,
) -> Engine:
    """The engine called ``name`` for a model that nobody trains; only the engine loads weights.

    Args:
        name: of the engine.
        model_path: folder, hub id, or ``"toy"``.
        tokenizer: of the model.
        num_workers: vLLM engines.
        gpus_per_worker: of vLLM; 0 runs it on the CPU.
        dtype: ``None`` for bfloat16 on GPUs and float32 elsewhere.
        trust_remote_code: run code from the model's repository.
        max_batch_size: chunks decoded side by side, in this process.
        seed: of requests without a seed of their own.
    """
    if choose_engine(name) == "transformers":
        import torch

        from delethink.engines.transformers import TransformersEngine

        device = "cuda" if torch.cuda.is_available() else "cpu"
        used = dtype or ("bfloat16" if device == "cuda" else "float32")
        model: Any = load_model(model_path, used, trust_remote_code)
        model.to(device)
        ends = eos_ids(model, tokenizer)
        pad = int(tokenizer.pad_token_id)
        return TransformersEngine(model, ends, pad, max_batch_size, seed)
    return make_engine(
        "vllm",
        model_path,
        load_shell(model_path, trust_remote_code),
        tokenizer,
        num_workers=num_workers,
        gpus_per_worker=gpus_per_worker,
        dtype=dtype or ("bfloat16" if gpus_per_worker else "float32"),
        trust_remote_code=trust_remote_code,
        seed=seed,
    )
