"""FLOP formulas against real models, counted by torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from delethink.cost.flops import (
    LONGCOT,
    cut_traces,
    decode_flops,
    forward_flops,
    training_flops,
)
from delethink.cost.models import model_shape
from delethink.cost.shape import ModelShape

pytestmark = pytest.mark.integration

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
LATENT = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "llama", "num_key_value_heads": 4, "intermediate_size": 160},
    "grouped-query": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "intermediate_size": 160,
        "tie_word_embeddings": True,
    },
    "multi-query": {
        "model_type": "qwen3",
        "num_key_value_heads": 1,
        "head_dim": 24,
        "intermediate_size": 160,
    },
    "sliding window": {
        "model_type": "mistral",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 160,
        "sliding_window": 10,
    },
    "sliding and full": {
        "model_type": "gemma3_text",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 160,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "experts": {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "intermediate_size": 160,
        "tie_word_embeddings": False,
        **ROUTED,
    },
    "experts with biases": {
        "model_type": "gpt_oss",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
        "sliding_window": 8,
    },
    "latent attention": {
        "model_type": "deepseek_v3",
        "q_lora_rank": 24,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "intermediate_size": 160,
        **ROUTED,
        **LATENT,
    },
    "gated delta rule": {
        "model_type": "qwen3_next",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 4,
        "shared_expert_intermediate_size": 32,
        "intermediate_size": 160,
        "tie_word_embeddings": False,
        **ROUTED,
    },
    "Kimi delta attention": {
        "model_type": "kimi_linear",
        "num_local_experts": 4,
        "n_shared_experts": 1,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "linear_conv_kernel_dim": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "intermediate_size": 160,
        "q_lora_rank": None,
        **ROUTED,
        **LATENT,
    },
}
LINEAR = {"gated delta rule", "Kimi delta attention"}  # torch's counter sees their products in part
COUNTED = sorted(set(MODELS) - LINEAR)
PROMPT, NEW = 24, 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, ModelShape, Path]]:
    """Return a small random model of each kind and its shape from its ``config.json``."""
    made = {}
    for name, settings in MODELS.items():
        torch.manual_seed(0)
        settings = {**COMMON, **settings}
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        config._experts_implementation = "eager"  # one product an expert, which torch counts
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        folder = tmp_path_factory.mktemp("config")
        config.save_pretrained(folder)
        made[name] = (model.float().eval(), model_shape(str(folder)), folder)
    return made


class Counter:
    """FLOPs of the products that torch counts, without rotary embeddings."""

    def __init__(self) -> None:
        self.flops = 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with FlopCounterMode(display=False) as counter:
            yield
        by_module = counter.get_flop_counts()
        rotary = {name for name in by_module if name.endswith("rotary_emb")}
        rotations = sum(sum(by_module[name].values()) for name in rotary)
        self.flops = counter.get_total_flops() - rotations


@pytest.fixture
def counter() -> Counter:
    return Counter()


def ids(length: int) -> torch.Tensor:
    return torch.randint(0, COMMON["vocab_size"], (1, length), generator=torch.manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name: str, models: dict[str, tuple[Any, ModelShape, Path]]) -> None:
    model, shape, _ = models[name]
    assert shape.parameters == pytest.approx(model.num_parameters(), rel=2e-3)


@pytest.mark.parametrize("name", ["dense", "grouped-query", "multi-query", "experts"])
def test_parameters_to_the_last_one(
    name: str, models: dict[str, tuple[Any, ModelShape, Path]]
) -> None:
    model, shape, _ = models[name]
    assert shape.parameters == model.num_parameters()


@pytest.mark.parametrize("name", COUNTED)
def test_flops_of_a_prefill(
    name: str, models: dict[str, tuple[Any, ModelShape, Path]], counter: Counter
) -> None:
    model, shape, _ = models[name]
    with torch.no_grad(), counter():
        model(ids(PROMPT), use_cache=True, logits_to_keep=1)
    assert counter.flops == forward_flops(shape, 0, PROMPT, 1, masked=True)


@pytest.mark.parametrize("name", sorted(set(COUNTED) - {"latent attention"}))
def test_flops_of_decoding(
    name: str, models: dict[str, tuple[Any, ModelShape, Path]], counter: Counter
) -> None:
    model, shape, _ = models[name]
    with torch.no_grad():
        cache = model(ids(PROMPT), use_cache=True).past_key_values
        with counter():
            for _ in range(NEW):
                cache = model(ids(1), past_key_values=cache, use_cache=True).past_key_values
    assert counter.flops == decode_flops(shape, PROMPT, PROMPT + NEW)


HEADS, RANK, NOPE, ROPE, VALUE = 4, 32, 16, 8, 16
EXPANSION = 2 * RANK * HEADS * (NOPE + VALUE)  # FLOPs to expand a cached latent into keys, values


def test_latent_attention_decodes_in_its_latent_space(
    models: dict[str, tuple[Any, ModelShape, Path]], counter: Counter
) -> None:
    """Transformers expands every cached latent for each token; engines absorb the expansion."""
    model, shape, _ = models["latent attention"]
    with torch.no_grad():
        cache = model(ids(PROMPT), use_cache=True).past_key_values
        with counter():
            model(ids(1), past_key_values=cache, use_cache=True)
    expanded = forward_flops(shape, PROMPT, PROMPT + 1, 1)
    assert counter.flops == expanded + 2 * PROMPT * EXPANSION
    wider = 2 * HEADS * ((2 * RANK + ROPE) - (NOPE + ROPE + VALUE))
    assert decode_flops(shape, PROMPT, PROMPT + 1) == expanded + 2 * wider * (PROMPT + 1)


@pytest.mark.parametrize("name", COUNTED)
def test_flops_of_a_training_step(
    name: str, models: dict[str, tuple[Any, ModelShape, Path]], counter: Counter
) -> None:
    model, shape, _ = models[name]
    model.train()
    with counter():
        model(ids(PROMPT + NEW), use_cache=False, logits_to_keep=NEW).logits.sum().backward()
    chunks = cut_traces(NEW, PROMPT, LONGCOT)
    expected = training_flops(shape, chunks, masked=True)
    # No gradient of the embedding's output is needed where nothing before it is trained, but here
    # it is; so all products count three times.
    assert counter.flops == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("name", sorted(LINEAR))
def test_linear_attention_does_not_grow_with_the_context(
    name: str, models: dict[str, tuple[Any, ModelShape, Path]], counter: Counter
) -> None:
    """Only the full layers do more work for a later token."""
    model, shape, _ = models[name]
    counts = []
    with torch.no_grad():
        cache = model(ids(PROMPT), use_cache=True).past_key_values
        for _ in range(2):
            with counter():
                cache = model(ids(1), past_key_values=cache, use_cache=True).past_key_values
            counts.append(counter.flops)
    pair = sum(count * mixer.pair_flops for mixer, count in shape.mixers)
    again = EXPANSION if name == "Kimi delta attention" else 0
    assert counts[1] - counts[0] == pair + again
    # torch's counter sees the projections, and only some of the state's products
    expected = float(forward_flops(shape, PROMPT, PROMPT + 1, 1)) + again * PROMPT
    assert counts[0] == pytest.approx(expected, rel=0.05)
