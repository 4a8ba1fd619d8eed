"""Makes the engine that a recipe asks for."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Literal

from delethink.errors import MissingExtraError
from delethink.serving.checkpoint import eos_ids, locate, longest_sequence
from delethink.serving.engine import Engine

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
) -> Engine:
    """The engine called ``name``, serving the weights of ``model``.

    ``"transformers"`` samples from ``model`` itself; ``"vllm"`` loads ``model_path`` in each of
    ``num_workers`` Ray workers.
    """
    ends = eos_ids(model, tokenizer)
    if choose_engine(name) == "transformers":
        from delethink.serving.transformers_engine import TransformersEngine

        return TransformersEngine(model, ends, int(tokenizer.pad_token_id), seed=seed)
    from delethink.serving.ray_pool import RayPool

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
    )
