"""Predicted cache sizes against vLLM's for the same configurations."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from installed import need
from tiny_causal import settings_of

from delethink.cost.memory import cache_bytes
from delethink.cost.models import model_shape, shape_of_config

pytestmark = pytest.mark.integration
need("vllm", "torch")

if TYPE_CHECKING:
    from conftest import TinyModel

BLOCK = 16
SPACE = 2**24  # bytes of the engine's cache

# A separate process, because an engine leaves threads and a process group behind.
ASK_ENGINE = f"""
import json, sys
from vllm import LLM
engine = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=256,
             skip_tokenizer_init=True, kv_cache_memory_bytes={SPACE}).llm_engine
cache = engine.vllm_config.cache_config
print(json.dumps([cache.num_gpu_blocks, cache.block_size]))
"""


def test_blocks_of_a_running_engine(tiny_models: tuple[TinyModel, TinyModel]) -> None:
    folder = str(tiny_models[0].folder)
    done = subprocess.run(
        [sys.executable, "-c", ASK_ENGINE, folder],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "TORCH_COMPILE_DISABLE": "1",
        },
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    blocks, size = json.loads(done.stdout.splitlines()[-1])
    assert blocks == SPACE // cache_bytes(model_shape(folder), size, 4, block=size)


def page_bytes(name: str) -> int:
    """Return the bytes of a cache block over all layers, from vLLM's own classes."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

    common: dict[str, Any] = {"block_size": BLOCK, "dtype": torch.bfloat16}

    def full(heads: int, dim: int) -> int:
        return int(FullAttentionSpec(num_kv_heads=heads, head_size=dim, **common).page_size_bytes)

    def sliding(heads: int, dim: int, window: int) -> int:
        spec = SlidingWindowSpec(num_kv_heads=heads, head_size=dim, sliding_window=window, **common)
        return int(spec.page_size_bytes)

    latent = int(MLAAttentionSpec(num_kv_heads=1, head_size=576, **common).page_size_bytes)
    return {
        "Qwen/Qwen2.5-1.5B": 28 * full(2, 128),
        "meta-llama/Llama-3.1-8B": 32 * full(8, 128),
        "Qwen/Qwen3-30B-A3B": 48 * full(4, 128),
        "mistralai/Mistral-7B-v0.1": 32 * sliding(8, 128, 4096),
        "google/gemma-3-27b-pt": 52 * sliding(16, 128, 1024) + 10 * full(16, 128),
        "openai/gpt-oss-20b": 12 * sliding(8, 64, 128) + 12 * full(8, 64),
        "deepseek-ai/DeepSeek-V3": 61 * latent,
    }[name]


def state_bytes(name: str) -> int:
    """Return the bytes of the states of all layers, from vLLM's own shapes and dtypes."""
    import torch
    from vllm.model_executor.layers.mamba.mamba_utils import (
        MambaStateDtypeCalculator as Dtypes,
    )
    from vllm.model_executor.layers.mamba.mamba_utils import (
        MambaStateShapeCalculator as Shapes,
    )

    settings, model = settings_of(name), torch.bfloat16
    if name in ("qwen3_next", "qwen3_5_text", "olmo_hybrid"):
        numbers = [settings[f"linear_num_{part}_heads"] for part in ("key", "value")]
        sizes = [settings[f"linear_{part}_head_dim"] for part in ("key", "value")]
        shapes = Shapes.gated_delta_net_state_shape(1, *numbers, *sizes, 4)
        dtype = "float32" if name == "qwen3_5_text" else "auto"
        dtypes = Dtypes.gated_delta_net_state_dtype(model, "auto", dtype)
    elif name == "kimi_linear":
        shapes = Shapes.kda_state_shape(1, 4, 16, conv_kernel_size=4)
        dtypes = Dtypes.kda_state_dtype(model, "auto")
    elif name == "granitemoehybrid":
        shapes = Shapes.mamba2_state_shape(1, 128, 1, 4, 32, 16, 4)
        dtypes = Dtypes.mamba2_state_dtype(model, "auto", "auto")
    elif name == "nemotron_h":
        shapes = Shapes.mamba2_state_shape(1, 96, 2, 4, 24, 16, 4)
        dtypes = Dtypes.mamba2_state_dtype(model, "auto", "float32")
    elif name == "minimax":
        shapes = Shapes.linear_attention_state_shape(4, 1, 16)
        dtypes = Dtypes.linear_attention_state_dtype(model, "auto")
    else:
        shapes = Shapes.short_conv_state_shape(1, 64, 3)
        dtypes = Dtypes.short_conv_state_dtype(model, "auto")
    return sum(
        dtype.itemsize * math.prod(shape) for shape, dtype in zip(shapes, dtypes, strict=True)
    )


@pytest.mark.parametrize(
    "name",
    [
        "granitemoehybrid",
        "kimi_linear",
        "lfm2",
        "minimax",
        "nemotron_h",
        "olmo_hybrid",
        "qwen3_5_text",
        "qwen3_next",
    ],
)
def test_bytes_of_a_state(name: str) -> None:
    """One of the layers has a state, which is all that the cache of no token holds."""
    settings = settings_of(name)
    if name == "qwen3_5_text":
        settings["mamba_ssm_dtype"] = "float32"  # in the configs of its checkpoints
    assert cache_bytes(shape_of_config(settings, "mine"), 0, 2) == state_bytes(name)


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen2.5-1.5B",
        "meta-llama/Llama-3.1-8B",
        "Qwen/Qwen3-30B-A3B",
        "mistralai/Mistral-7B-v0.1",
        "google/gemma-3-27b-pt",
        "openai/gpt-oss-20b",
        "deepseek-ai/DeepSeek-V3",
    ],
)
def test_bytes_of_a_block(name: str) -> None:
    assert cache_bytes(model_shape(name), BLOCK, 2, block=BLOCK) == page_bytes(name)
