"""Model types with linear attention, state spaces or convolutions beside full layers.

The state of these layers does not grow with the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from delethink.cost.config_reader import ConfigReader
from delethink.cost.families import (
    LLAMA,
    MISTRAL,
    OLMO2,
    QWEN,
    AttentionTraits,
    attention,
    dense,
    finish,
)
from delethink.cost.mixtures import Routing, latent_mixer, qwen_sparse
from delethink.cost.shape import (
    FeedForward,
    Layer,
    Mixer,
    ModelShape,
    delta_attention,
    lightning_attention,
    short_convolution,
    state_space,
)
from delethink.errors import ModelError

_GATED = replace(QWEN, head_dim=256, gated=True)
_QWEN_EXPERTS = Routing(
    _GATED,
    shared_width="shared_expert_intermediate_size",
    shared_gate=True,
    sparse=qwen_sparse,
)
_GRANITE = replace(LLAMA, mlp_bias=False)


def _gated_delta(config: ConfigReader) -> Mixer:
    """Return the layer with the gated delta rule of Qwen3-Next, Qwen3.5 and OLMo Hybrid."""
    heads = config.count("num_attention_heads")
    key_heads = config.count("linear_num_key_heads", default=heads)
    value_heads = config.count("linear_num_value_heads", default=heads)
    key_dim = config.count("linear_key_head_dim")
    value_dim = config.count("linear_value_head_dim")
    values = value_heads * value_dim
    # Inputs: queries, keys, values, the output gate, and two scalars per head.
    inputs = 2 * key_heads * key_dim + 2 * values + 2 * value_heads
    return delta_attention(
        config.hidden_size * (inputs + values),
        key_heads,
        value_heads,
        key_dim,
        value_dim,
        config.count("linear_conv_kernel_dim", default=4),
        other_parameters=2 * value_heads + value_dim,  # decay, its bias, and the output's norm
        float32_state=config.get("mamba_ssm_dtype") == "float32",  # as vLLM reads it
    )


def _mixed(
    config: ConfigReader,
    traits: AttentionTraits,
    is_full: Sequence[bool],
    linear: Mixer | None,
    parts: Sequence[FeedForward],
) -> ModelShape:
    """Return the shape of layers with full attention, and others of the mixer ``linear``."""
    full = attention(config, traits)
    each = [full if each or linear is None else linear for each in is_full]
    return finish(config, traits, [Layer(m, part) for m, part in zip(each, parts, strict=True)])


def _three_to_one(config: ConfigReader) -> list[bool]:
    every = config.count("full_attention_interval", default=4)
    return config.full_layers(lambda i: (i + 1) % every == 0, "linear_attention")


def qwen3_5(config: ConfigReader) -> ModelShape:
    """Return the shape of Qwen3.5: a gated layer after three with the gated delta rule."""
    parts = [dense(config, _GATED)] * config.num_layers
    return _mixed(config, _GATED, _three_to_one(config), _gated_delta(config), parts)


def qwen3_next(config: ConfigReader) -> ModelShape:
    """Return the shape of Qwen3-Next and Qwen3.5 with experts."""
    parts = _QWEN_EXPERTS.parts(config)
    return _mixed(config, _GATED, _three_to_one(config), _gated_delta(config), parts)


def olmo_hybrid(config: ConfigReader) -> ModelShape:
    """Return the shape of OLMo Hybrid: OLMo 2's layer after three with the gated delta rule."""
    is_full = config.full_layers(lambda i: i % 4 == 3, "linear_attention")
    parts = [dense(config, OLMO2)] * config.num_layers
    return _mixed(config, OLMO2, is_full, _gated_delta(config), parts)


def kimi_linear(config: ConfigReader) -> ModelShape:
    """Return the shape of Kimi Linear: latent attention after three of Kimi delta attention."""
    nested = config.get("linear_attn_config")
    if nested and not isinstance(nested, dict):
        raise ModelError(
            f"{config.name}: linear_attn_config must be a mapping of figures, got {nested!r:.80}"
        )
    inner = ConfigReader(
        nested
        or {
            "head_dim": config.get("linear_head_dim"),
            "num_heads": config.get("linear_num_heads"),
            "short_conv_kernel_size": config.get("linear_conv_kernel_dim"),
        },
        config.name,
    )
    numbers = inner.indices("full_attn_layers")  # counted from 1
    if "full_attn_layers" not in inner.config and not config.get("layer_types"):
        raise ModelError(f"{config.name}: full_attn_layers is missing from linear_attn_config")
    is_full = config.full_layers(lambda i: i + 1 in numbers, "linear_attention")
    hidden_size, heads, dim = config.hidden_size, inner.count("num_heads"), inner.count("head_dim")
    width = heads * dim
    low_rank = 2 * (hidden_size * dim + dim * width)  # projections of the decay and the output gate
    weights = 4 * hidden_size * width + low_rank + hidden_size * heads
    kernel = inner.count("short_conv_kernel_size")
    biases = width + heads + dim  # of the decay, its scale, and the norm of the output
    # vLLM keeps the state in float32 unless told otherwise.
    linear = delta_attention(weights, heads, heads, dim, dim, kernel, biases, float32_state=True)
    full, traits = latent_mixer(config), AttentionTraits()
    parts = Routing(traits, shared=1, sparse=lambda c: c.sparse_layers(1)).parts(config)
    each = [full if each else linear for each in is_full]
    return finish(config, traits, [Layer(m, part) for m, part in zip(each, parts, strict=True)])


def minimax(config: ConfigReader) -> ModelShape:
    """Return the shape of MiniMax-01 and M1: lightning attention, some full layers, experts."""
    is_full = config.full_layers(lambda i: i % 2 == 0, "linear_attention")
    heads, _, dim = config.heads()
    linear = lightning_attention(config.hidden_size, heads, dim, other_parameters=heads * dim)
    parts = Routing(MISTRAL, width="intermediate_size").parts(config)
    return _mixed(config, MISTRAL, is_full, linear, parts)


def granite_hybrid(config: ConfigReader) -> ModelShape:
    """Return the shape of Granite 4: full layers among state spaces, a shared MLP, experts."""
    is_full = config.full_layers(lambda i: False, "linear_attention")
    shared = config.count("shared_intermediate_size", default=1024)
    if config.count("num_local_experts", default=8, least=0):
        routing = Routing(
            _GRANITE, width="intermediate_size", shared_width="shared_intermediate_size"
        )
        parts = routing.parts(config)
    else:
        parts = [dense(config, _GRANITE, shared)] * config.num_layers
    linear = None if all(is_full) else _granite_state_space(config)
    return _mixed(config, _GRANITE, is_full, linear, parts)


def _granite_state_space(config: ConfigReader) -> Mixer:
    return _state_space(
        config,
        heads=config.count("mamba_n_heads", default=128),
        width=config.count("mamba_expand", default=2) * config.hidden_size,
        state_dim=config.count("mamba_d_state", default=256),
        groups=config.count("mamba_n_groups", default=1),
        kernel=config.count("mamba_d_conv", default=4),
        convolution_bias=config.flag(("mamba_conv_bias", True)),
        bias=config.flag(("mamba_proj_bias", False)),
    )


def _state_space(
    config: ConfigReader,
    heads: int,
    width: int,
    state_dim: int,
    groups: int,
    kernel: int,
    convolution_bias: bool,
    bias: bool,
    float32_state: bool = False,
) -> Mixer:
    """Return a state space with one step size, decay and skip a head, and a norm of its output."""
    hidden_size, channels = config.hidden_size, width + 2 * groups * state_dim
    inputs = width + channels + heads  # a gate, what is convolved, step sizes
    return state_space(
        hidden_size * (inputs + width),
        width,
        state_dim,
        groups,
        kernel,
        other_parameters=3 * heads
        + width
        + channels * convolution_bias
        + (inputs + hidden_size) * bias,
        float32_state=float32_state,
    )


_BLOCKS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
_OLD_BLOCKS = {"mamba": "linear_attention", "attention": "full_attention"}
_NEMOTRON = AttentionTraits(head_dim=128, norms=1, matrices=2, mlp_bias=("mlp_bias", False))


def _nemotron_blocks(config: ConfigReader) -> list[str]:
    """Return what each layer of Nemotron-H consists of."""
    pattern = config.get("hybrid_override_pattern")
    listed = config.get("layers_block_type") or config.get("layer_types") or pattern
    if not isinstance(listed, list | str):
        raise ModelError(
            f"{config.name}: layers_block_type must list what each layer is, or "
            f"hybrid_override_pattern have a letter for each, got {listed!r:.80}"
        )
    names = _BLOCKS if isinstance(listed, str) else _OLD_BLOCKS
    blocks = [names.get(str(each), str(each)) for each in listed]
    if unknown := set(blocks) - set(_BLOCKS.values()):
        raise ModelError(
            f"{config.name}: layers {sorted(unknown)} are not supported for model_type "
            f"'nemotron_h', whose layers are {', '.join(_BLOCKS.values())}"
        )
    return blocks


def nemotron_h(config: ConfigReader) -> ModelShape:
    """Return the shape of Nemotron-H: a layer is a state space, attention, an MLP or experts."""
    hidden_size, blocks = config.hidden_size, _nemotron_blocks(config)
    norm, no_mixer = FeedForward(0, other_parameters=hidden_size), Mixer(0)
    made = {}
    if "linear_attention" in blocks:
        heads = config.count("mamba_num_heads", default=128)
        mixer = _state_space(
            config,
            heads=heads,
            width=heads * config.count("mamba_head_dim", default=64),
            state_dim=config.count("ssm_state_size", default=128),
            groups=config.count("n_groups", "mamba_n_groups", default=8),
            kernel=config.count("conv_kernel", "mamba_d_conv", default=4),
            convolution_bias=config.flag(("use_conv_bias", True)),
            bias=config.flag(("use_bias", False)),
            float32_state=config.get("mamba_ssm_cache_dtype", "float32") == "float32",
        )
        made["linear_attention"] = Layer(mixer, norm)
    if "full_attention" in blocks:
        made["full_attention"] = Layer(attention(config, _NEMOTRON), norm)
    if "mlp" in blocks:
        made["mlp"] = Layer(no_mixer, dense(config, _NEMOTRON))
    if "moe" in blocks:
        made["moe"] = Layer(no_mixer, _nemotron_experts(config))
    return finish(config, _NEMOTRON, [made[block] for block in blocks])


def _nemotron_experts(config: ConfigReader) -> FeedForward:
    """Return experts without gates, which may work in a space of fewer dimensions."""
    hidden_size, (number, per_token) = config.hidden_size, config.experts()
    width = config.count("moe_intermediate_size")
    shared = dense(config, _NEMOTRON, config.count("moe_shared_expert_intermediate_size"))
    reduced = config.optional("moe_latent_size")
    down = 2 * hidden_size * reduced if reduced else 0
    biases = (hidden_size + reduced) * config.flag(("mlp_bias", False)) if reduced else 0
    return FeedForward(
        weights=shared.weights + hidden_size * number + down,
        expert_weights=2 * (reduced or hidden_size) * width,
        experts=number,
        experts_per_token=per_token,
        width=shared.width + per_token * width,
        other_parameters=shared.other_parameters + biases,
    )


def _lfm2_traits(config: ConfigReader) -> AttentionTraits:
    return AttentionTraits(qk_norm=True, tied=config.flag(("tie_embedding", True)))


def _convolution(config: ConfigReader) -> Mixer:
    biases = 5 * config.hidden_size * config.flag(("conv_bias", False))
    kernel = config.count("conv_L_cache", default=3)
    return short_convolution(config.hidden_size, kernel, other_parameters=biases)


def _lfm2_layers(config: ConfigReader) -> list[bool]:
    full = config.indices("full_attn_idxs")
    return config.full_layers(lambda i: i in full or not full, "conv")


def lfm2(config: ConfigReader) -> ModelShape:
    """Return the shape of LFM2: full layers among gated convolutions."""
    width, traits = config.count("block_ff_dim", "intermediate_size"), _lfm2_traits(config)
    if config.flag(("block_auto_adjust_ff_dim", True)):
        factor = config.get("block_ffn_dim_multiplier", 1.0)
        if not isinstance(factor, int | float) or not 0 < factor < 1000:
            raise ModelError(
                f"{config.name}: block_ffn_dim_multiplier must be a number above 0, got {factor!r}"
            )
        block = config.count("block_multiple_of", default=256)
        width = -(-int(factor * int(2 * width / 3)) // block) * block
    parts = [dense(config, traits, width)] * config.num_layers
    return _mixed(config, traits, _lfm2_layers(config), _convolution(config), parts)


def lfm2_moe(config: ConfigReader) -> ModelShape:
    """Return the shape of LFM2 with experts after the first layers."""
    first = config.count("num_dense_layers", default=2, least=0)
    traits = _lfm2_traits(config)
    parts = Routing(traits, sparse=lambda c: c.sparse_layers(first)).parts(config)
    is_full = _lfm2_layers(config)
    return _mixed(config, traits, is_full, _convolution(config), parts)
