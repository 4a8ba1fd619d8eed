"""FLOPs, parameters and caches against real models of each known type, counted by torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_causal import COMMON, LATENT, SETTINGS, VARIANTS, settings_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, Mistral4ForCausalLM

from delethink.cost.flops import (
    LONGCOT,
    cut_traces,
    decode_flops,
    forward_flops,
    training_flops,
)
from delethink.cost.memory import cache_bytes
from delethink.cost.models import known_model_types, model_shape, shape_of_config
from delethink.cost.shape import FeedForward, Layer, Mixer, ModelShape

pytestmark = pytest.mark.integration

# Types of which a model runs in the default tier; the others run in the slow one. Parameters of all
# of them are counted in the default tier.
USUAL = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "olmo2",
    "olmo3",
    "granite",
    "granitemoe",
    "granitemoehybrid",
    "glm4",
    "glm4_moe",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "gpt_oss",
    "deepseek_v3",
    "kimi_linear",
    "llama4_text",
}
LATENT_TYPES = {"deepseek_v2", "deepseek_v3", "glm4_moe_lite", "mistral4"}
RUN = [*sorted(SETTINGS), "gemma4_text alike", "gemma4_text experts", "qwen3 window"]
PROMPT, NEW = 24, 2

# torch's counter sees the products of a recurrent state in part, depending on the kernel that a
# library chooses. They are left out of the comparison, and counted in their recurrent form instead.
RECURRENT = {
    "qwen3_5_text": "linear_attn",
    "qwen3_5_moe_text": "linear_attn",
    "qwen3_next": "linear_attn",
    "olmo_hybrid": "linear_attn",
    "granitemoehybrid": "mamba",
    "kimi_linear": "self_attn",
    "minimax": "self_attn",
    "nemotron_h": "mixer",
    "lfm2": "conv",
    "lfm2_moe": "conv",
}


def names(wanted: set[str]) -> Any:
    """Return a parametrization over types; the less usual ones are slow."""
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=[] if name in USUAL else [pytest.mark.slow])
            for name in RUN
            if name in wanted
        ],
    )


@dataclass(frozen=True)
class Tiny:
    """A small random model of a type, and its shape from its ``config.json``."""

    name: str
    model: Any
    shape: ModelShape

    def flops(self, run: Callable[[], object]) -> int:
        """Return the FLOPs of the products that torch counts, but for rotations and states."""
        with FlopCounterMode(display=False) as counter:
            run()
        total = counter.get_total_flops()
        by_module = {
            name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()
        }
        total -= sum(flops for name, flops in by_module.items() if name.endswith("rotary_emb"))
        recurrent = RECURRENT.get(self.name)
        for index, layer in enumerate(self.shape.layers):
            if layer.mixer.state_numbers:
                total -= own_flops(by_module, f".layers.{index}.{recurrent}")
        return total

    def product_flops(self, run: Callable[[], object]) -> int:
        """Return the FLOPs of products with a weight: those of two matrices."""
        with FlopCounterMode(display=False) as counter:
            run()
        by_operation = counter.get_flop_counts()["Global"]
        return sum(
            flops
            for operation, flops in by_operation.items()
            if str(operation) in ("aten.mm", "aten.addmm")
        )

    @property
    def comparable(self) -> ModelShape:
        """The shape as ``transformers`` runs it, without the products of states."""
        layers = []
        for layer in self.shape.layers:
            mixer, part = layer.mixer, layer.feed_forward
            if mixer.state_numbers:
                mixer = replace(mixer, token_flops=0)
            if mixer.chunked:  # its cache slides, also where attention does not
                mixer = replace(mixer, chunked=False)
            if self.name == "llama4_text":  # every expert runs for every token
                part = replace(part, experts_per_token=part.experts)
            layers.append(Layer(mixer, part))
        return replace(self.shape, layers=tuple(layers))


def own_flops(by_module: dict[str, int], suffix: str) -> int:
    """Return the FLOPs of a module beside those of the modules in it."""
    (name,) = (name for name in by_module if name.endswith(suffix))
    depth = name.count(".") + 1
    within = [n for n in by_module if n.startswith(f"{name}.") and n.count(".") == depth]
    return by_module[name] - sum(by_module[n] for n in within)


def made_config(name: str) -> Any:
    settings = settings_of(name)
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def made_model(config: Any, **options: Any) -> Any:
    if config.model_type == "mistral4":  # inside a multimodal model only, so no automatic class
        return Mistral4ForCausalLM._from_config(config, **options)
    return AutoModelForCausalLM.from_config(config, **options)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    @cache
    def make_one(name: str) -> Tiny:
        torch.manual_seed(0)
        config = made_config(name)
        config._experts_implementation = "eager"  # one product an expert, which torch counts
        model = made_model(config, attn_implementation="eager")
        folder = tmp_path_factory.mktemp("config")
        config.save_pretrained(folder)
        return Tiny(name, model.float().eval(), model_shape(str(folder)))

    return make_one


def ids(length: int) -> torch.Tensor:
    return torch.randint(3, COMMON["vocab_size"], (1, length), generator=torch.manual_seed(1))


def test_every_known_type_is_compared() -> None:
    aliases = set(MULTIMODAL) | {"kimi_k2"}  # the name of DeepSeek-V3's layers in Kimi K2
    assert set(SETTINGS) | aliases == set(known_model_types())
    assert shape_of_config(settings_of("deepseek_v3") | {"model_type": "kimi_k2"}, "mine")


@pytest.mark.parametrize("name", [*SETTINGS, *VARIANTS])
def test_parameters(name: str, tmp_path: Path) -> None:
    config = made_config(name)
    with torch.device("meta"):
        model = made_model(config)
    config.save_pretrained(tmp_path)
    assert model_shape(str(tmp_path)).parameters == model.num_parameters()
    in_memory = json.loads(json.dumps(config.to_dict(), default=str))
    assert shape_of_config(in_memory, "mine").parameters == model.num_parameters()


# Types whose default config names no sizes that a model can be made of.
WITHOUT_DEFAULTS = {
    "deepseek_v2",
    "dots1",
    "glm4_moe",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "lfm2_moe",
    "ministral",
    "nemotron",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(SETTINGS) - WITHOUT_DEFAULTS))
def test_parameters_at_the_default_sizes_of_a_type(name: str, tmp_path: Path) -> None:
    """Most defaults are those of a published checkpoint, so the config takes other ways."""
    config = AutoConfig.for_model(name)
    with torch.device("meta"):
        model = made_model(config)
    config.save_pretrained(tmp_path)
    assert model_shape(str(tmp_path)).parameters == model.num_parameters()


MULTIMODAL = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "kimi_k25": "deepseek_v3",
    "llama4": "llama4_text",
    "mistral3": "mistral",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}


@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_text_model_of_a_multimodal_one(name: str, tmp_path: Path) -> None:
    inner = settings_of(MULTIMODAL[name])
    outer = AutoConfig.for_model(name, text_config=dict(inner), tie_word_embeddings=False)
    outer.save_pretrained(tmp_path)
    alone = shape_of_config(inner, "mine")
    assert replace(model_shape(str(tmp_path)), name="mine") == alone
    del inner["model_type"]  # the type of the whole says which text model it has
    assert shape_of_config({"model_type": name, "text_config": inner}, "mine") == alone


@names(set(RUN))
def test_flops_of_a_prefill(name: str, make: Callable[[str], Tiny]) -> None:
    tiny = make(name)
    with torch.no_grad():
        counted = tiny.flops(lambda: tiny.model(ids(PROMPT), use_cache=True, logits_to_keep=1))
    assert counted == forward_flops(tiny.comparable, 0, PROMPT, 1, masked=True)


@names(set(RUN) - LATENT_TYPES - {"kimi_linear"})
def test_flops_of_decoding(name: str, make: Callable[[str], Tiny]) -> None:
    tiny = make(name)

    def decode() -> None:
        past = prefill
        for _ in range(NEW):
            past = tiny.model(ids(1), past_key_values=past, use_cache=True).past_key_values

    with torch.no_grad():
        prefill = tiny.model(ids(PROMPT), use_cache=True).past_key_values
        counted = tiny.flops(decode)
    assert counted == decode_flops(tiny.comparable, PROMPT, PROMPT + NEW)


@names(LATENT_TYPES | {"kimi_linear"})
def test_latent_attention_decodes_in_its_latent_space(
    name: str, make: Callable[[str], Tiny]
) -> None:
    """Transformers expands every cached latent for each token; engines absorb the expansion."""
    tiny, shape = make(name), make(name).comparable
    with torch.no_grad():
        past = tiny.model(ids(PROMPT), use_cache=True).past_key_values
        counted = tiny.flops(lambda: tiny.model(ids(1), past_key_values=past, use_cache=True))
    heads, rank, rope = COMMON["num_attention_heads"], LATENT["kv_lora_rank"], 8
    nope, value = LATENT["qk_nope_head_dim"], LATENT["v_head_dim"]
    latent_layers = sum(bool(layer.mixer.pair_flops) for layer in shape.layers)
    expansion = latent_layers * 2 * rank * heads * (nope + value)  # FLOPs per cached latent
    expanded = forward_flops(shape, PROMPT, PROMPT + 1, 1)
    assert counted == expanded + PROMPT * expansion
    wider = latent_layers * 2 * heads * ((2 * rank + rope) - (nope + rope + value))
    assert decode_flops(shape, PROMPT, PROMPT + 1) == expanded + wider * (PROMPT + 1)


def train(tiny: Tiny) -> Callable[[], object]:
    tiny.model.train()
    tokens = ids(PROMPT + NEW)
    return lambda: tiny.model(tokens, use_cache=False, logits_to_keep=NEW).logits.sum().backward()


@names(set(RUN) - set(RECURRENT))
def test_flops_of_a_training_step(name: str, make: Callable[[str], Tiny]) -> None:
    tiny = make(name)
    counted = tiny.flops(train(tiny))
    # No gradient of the embedding's output is needed where nothing before it is trained, but here
    # it is; so all products count three times.
    chunks = cut_traces(NEW, PROMPT, LONGCOT)
    assert counted == training_flops(tiny.comparable, chunks, masked=True)


@names(set(RECURRENT))
def test_products_with_weights_in_a_training_step(name: str, make: Callable[[str], Tiny]) -> None:
    """The counter does not say to which module a backward pass of a state belongs."""
    tiny = make(name)
    counted = tiny.product_flops(train(tiny))
    mixerless = [Layer(Mixer(each.mixer.weights), each.feed_forward) for each in tiny.shape.layers]
    shape = replace(tiny.shape, layers=tuple(mixerless))
    assert counted == training_flops(shape, cut_traces(NEW, PROMPT, LONGCOT))


def numbers_of(layer: Any) -> int:
    """Return the values that a layer of a cache holds, of the convolution one input fewer."""
    found = 0
    for key, held in vars(layer).items():
        if not isinstance(held, dict | torch.Tensor):
            continue
        for tensor in held.values() if isinstance(held, dict) else [held]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dim():
                kernel = tensor.shape[-1]  # the input of the next token overwrites the oldest
                found += tensor.numel() // kernel * (kernel - 1 if "conv" in key else kernel)
    return found


@names(set(RUN) - {"minimax"})  # it keeps its states in a cache of its own
def test_numbers_in_a_cache(name: str, make: Callable[[str], Tiny]) -> None:
    tiny = make(name)
    with torch.no_grad():
        past = tiny.model(ids(PROMPT), use_cache=True).past_key_values
    held = sum(numbers_of(layer) for layer in past.layers)
    mixers = [layer.mixer for layer in tiny.shape.layers]
    wide = sum(mixer.float32_numbers for mixer in mixers)
    # A window holds the query's own token too, which enters the cache with the next pass.
    entering = sum(mixer.cache_numbers for mixer in mixers if mixer.window)
    assert held == cache_bytes(tiny.shape, PROMPT, 1) - 3 * wide - entering


@names(set(RECURRENT))
def test_only_full_layers_do_more_work_for_a_later_token(
    name: str, make: Callable[[str], Tiny]
) -> None:
    tiny, counts = make(name), []
    with torch.no_grad():
        past = tiny.model(ids(PROMPT), use_cache=True).past_key_values
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                past = tiny.model(ids(1), past_key_values=past, use_cache=True).past_key_values
            counts.append(counter.get_total_flops())
    pair = sum(count * mixer.pair_flops for mixer, count in tiny.shape.mixers)
    rank, heads = LATENT["kv_lora_rank"], COMMON["num_attention_heads"]
    again = 2 * rank * heads * (LATENT["qk_nope_head_dim"] + LATENT["v_head_dim"])
    assert counts[1] - counts[0] == pair + (again if name == "kimi_linear" else 0)


def test_a_layer_without_experts_has_no_router() -> None:
    shape = shape_of_config(settings_of("qwen3_moe dense"), "mine")
    dense, routed = (layer.feed_forward for layer in shape.layers)
    assert dense == FeedForward(3 * 64 * 160, width=160, other_parameters=2 * 64)
    assert routed.experts == 4
