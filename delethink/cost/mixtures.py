"""Model types with experts, and those with latent attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from delethink.cost.config_reader import ConfigReader
from delethink.cost.families import (
    LLAMA,
    MISTRAL,
    OLMO2,
    QWEN,
    SOFTMAX,
    AttentionTraits,
    Windows,
    alternate_window,
    dense,
    experts,
    final_window,
    finish,
    mixers,
    one_in,
    same_window,
    used_window,
)
from delethink.cost.shape import FeedForward, Layer, Mixer, ModelShape, latent_attention


def _all_sparse(config: ConfigReader) -> list[bool]:
    return [True] * config.num_layers


def _dense_first(number: int) -> Callable[[ConfigReader], list[bool]]:
    return lambda config: config.sparse_layers(number)


def qwen_sparse(config: ConfigReader) -> list[bool]:
    """Return for each layer of a Qwen type whether it has experts."""
    without = config.indices("mlp_only_layers")
    step = config.count("decoder_sparse_step", default=1)
    return [i not in without and (i + 1) % step == 0 for i in range(config.num_layers)]


def _ernie_sparse(config: ConfigReader) -> list[bool]:
    step = config.count("moe_layer_interval", default=1)
    first = config.count("moe_layer_start_index", default=1, least=0)
    last = config.count("moe_layer_end_index", default=-1, least=-1)
    last = config.num_layers - 1 if last == -1 else last
    return [(i + 1) % step == 0 and first <= i <= last for i in range(config.num_layers)]


def _llama4_sparse(config: ConfigReader) -> list[bool]:
    if config.get("moe_layers") is not None:
        with_experts = config.indices("moe_layers")
        return [i in with_experts for i in range(config.num_layers)]
    step = config.count("interleave_moe_layer_step", default=1)
    return [(i + 1) % step == 0 for i in range(config.num_layers)]


def _llama4_window(config: ConfigReader) -> Windows:
    """Return the chunk of the layers with rotary embedding."""
    chunk = config.optional("attention_chunk_size")
    step = config.count("no_rope_layer_interval", default=4)
    rotary = config.listed("no_rope_layers")  # 1 for a layer with it
    return (
        chunk,
        lambda index: chunk is None or not (rotary[index] if rotary else (index + 1) % step),
    )


@dataclass(frozen=True)
class Routing:
    """Properties by which types with experts differ."""

    traits: AttentionTraits
    width: str = "moe_intermediate_size"  # key of an expert's width
    dense_width: str = "intermediate_size"  # key of the width in layers without experts
    shared: int = 0  # shared experts as wide as the others, if the config does not say
    shared_width: str | None = None  # key of the width of the one shared expert
    shared_gate: bool = False
    expert_biases: int = 0  # numbers that an expert has beside its weights and their biases
    biased_experts: bool = False
    sparse: Callable[[ConfigReader], list[bool]] = _all_sparse
    latent: bool = False
    other_layers: str = "sliding_attention"

    def shape(self, config: ConfigReader) -> ModelShape:
        """Return the shape of a type with this routing."""
        parts = self.parts(config)
        if self.latent:
            each: list[Mixer] = [latent_mixer(config)] * config.num_layers
        else:
            each = mixers(config, self.traits, self.other_layers)
        layers = [Layer(mixer, part) for mixer, part in zip(each, parts, strict=True)]
        return finish(config, self.traits, layers)

    def parts(self, config: ConfigReader) -> list[FeedForward]:
        """Return the feed-forward part of each layer."""
        sparse = self.sparse(config)
        routed = self._experts(config) if any(sparse) else None
        plain = None
        if not all(sparse):
            plain = dense(config, self.traits, config.count(self.dense_width))
        each = [routed if with_experts else plain for with_experts in sparse]
        return [part for part in each if part is not None]

    def _experts(self, config: ConfigReader) -> FeedForward:
        width = config.count(self.width)
        if self.shared_width is not None:
            shared = config.count(self.shared_width, default=0, least=0)
        else:
            shared = width * config.shared_experts(self.shared)
        biases = 2 * width + config.hidden_size + 1 if self.biased_experts else self.expert_biases
        part = experts(config, self.traits, width, shared, self.shared_gate, biases)
        if not shared or not config.flag(self.traits.mlp_bias):
            return part
        more = 2 * shared + config.hidden_size
        return replace(part, other_parameters=part.other_parameters + more)


def latent_mixer(config: ConfigReader) -> Mixer:
    """Return the latent attention of a type derived from DeepSeek-V2."""
    query_rank = config.optional("q_lora_rank")
    kv_rank, rope_dim = config.count("kv_lora_rank"), config.count("qk_rope_head_dim")
    other = kv_rank + (query_rank or 0)
    if config.flag(("attention_bias", False)):
        other += kv_rank + rope_dim + (query_rank or 0) + config.hidden_size
    return latent_attention(
        config.hidden_size,
        config.count("num_attention_heads"),
        config.count("qk_nope_head_dim"),
        rope_dim,
        config.count("v_head_dim"),
        kv_rank,
        query_rank,
        other_parameters=other,
    )


_GRANITE = replace(LLAMA, mlp_bias=False)
_QWEN_ROUTING = Routing(replace(QWEN, head_dim=None, windows=used_window), sparse=qwen_sparse)
_DEEPSEEK_V3 = Routing(AttentionTraits(), shared=1, sparse=_dense_first(3), latent=True)
_LLAMA4 = Routing(
    AttentionTraits(
        head_dim=128,
        qkv_bias=("attention_bias", False),
        out_bias=("attention_bias", False),
        windows=_llama4_window,
        chunked=True,
    ),
    width="intermediate_size",
    dense_width="intermediate_size_mlp",
    shared_width="intermediate_size",
    sparse=_llama4_sparse,
    other_layers="chunked_attention",
)

MIXTURES: dict[str, Routing] = {
    "mixtral": Routing(MISTRAL, width="intermediate_size"),
    "phimoe": Routing(
        AttentionTraits(
            qkv_bias=("attention_bias", False),
            out_bias=("attention_bias", False),
            head_bias=("lm_head_bias", False),
            norm_vectors=2,
            windows=same_window,
        ),
        width="intermediate_size",
    ),
    "qwen2_moe": Routing(
        AttentionTraits(qkv_bias=("qkv_bias", True), windows=alternate_window),
        shared_width="shared_expert_intermediate_size",
        shared_gate=True,
        sparse=qwen_sparse,
    ),
    "qwen3_moe": _QWEN_ROUTING,
    "olmoe": Routing(OLMO2, width="intermediate_size"),
    "flex_olmo": Routing(OLMO2, width="intermediate_size"),
    "granitemoe": Routing(_GRANITE, width="intermediate_size"),
    "granitemoeshared": Routing(
        _GRANITE, width="intermediate_size", shared_width="shared_intermediate_size"
    ),
    "glm4_moe": Routing(
        AttentionTraits(qkv_bias=("attention_bias", False), qk_norm=("use_qk_norm", False)),
        shared=1,
        sparse=_dense_first(1),
    ),
    "glm4_moe_lite": replace(_DEEPSEEK_V3, sparse=_dense_first(1)),
    "dots1": Routing(replace(_GRANITE, qk_norm=True, windows=final_window), sparse=_dense_first(0)),
    "exaone_moe": Routing(SOFTMAX["exaone4"], shared=1, sparse=_dense_first(1)),
    "ernie4_5_moe": Routing(
        replace(SOFTMAX["ernie4_5"], head_dim=None, head_bias=("use_bias", False)),
        shared=2,
        expert_biases=1,
        sparse=_ernie_sparse,
    ),
    "hunyuan_v1_moe": Routing(
        SOFTMAX["hunyuan_v1_dense"], width="intermediate_size", shared_width="intermediate_size"
    ),
    "minimax_m2": Routing(
        AttentionTraits(head_dim=128, qk_norm=True, qk_norm_all=True), width="intermediate_size"
    ),
    "gpt_oss": Routing(
        AttentionTraits(
            head_dim=64,
            qkv_bias=("attention_bias", True),
            out_bias=("attention_bias", True),
            windows=one_in(2),
            sinks=True,
        ),
        width="intermediate_size",
        biased_experts=True,
    ),
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "deepseek_v2": replace(
        _DEEPSEEK_V3,
        traits=AttentionTraits(mlp_bias=("mlp_bias", False)),
        shared=2,
        sparse=_dense_first(0),
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "mistral4": replace(_DEEPSEEK_V3, sparse=_dense_first(0)),
    "kimi_k2": _DEEPSEEK_V3,
    "kimi_k25": _DEEPSEEK_V3,
}
