"""Gemma 3n and Gemma 4: per-layer embeddings, shared caches, and layers of different sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from delethink.cost.config_reader import ConfigReader
from delethink.cost.families import AttentionTraits, dense, experts
from delethink.cost.shape import FeedForward, Layer, Mixer, ModelShape, softmax_attention
from delethink.errors import ModelError

_NORMS = AttentionTraits(norms=4, tied=True)
_PER_LAYER_WORDS = 262_144  # entries of the per-layer embedding, if the config does not say


@dataclass(frozen=True)
class _SharedCache:
    """The layers that read the cache of an earlier one, from index ``first`` on."""

    first: int

    @classmethod
    def of(cls, config: ConfigReader, default: int) -> _SharedCache:
        shared = config.count("num_kv_shared_layers", default=default, least=0)
        if shared >= config.num_layers:
            raise ModelError(
                f"{config.name}: num_kv_shared_layers must be below num_hidden_layers="
                f"{config.num_layers}, got {shared}"
            )
        return cls(config.num_layers - shared)


def _per_layer_figures(config: ConfigReader) -> tuple[int, dict[str, int]]:
    """Return the width of the per-layer embedding, and what it adds beside the layers."""
    width = config.count("hidden_size_per_layer_input", default=256, least=0)
    words = config.count("vocab_size_per_layer_input", default=_PER_LAYER_WORDS)
    total = config.num_layers * width
    return width, {
        "outer_weights": config.hidden_size * total,
        "row_parameters": words * total,
        "outer_parameters": config.hidden_size + width,  # the last norm, and that of the rows
    }


def _with_row(part: FeedForward, hidden_size: int, width: int) -> FeedForward:
    """Return the part with the gate and projection of the per-layer embedding, and a norm."""
    if not width:
        return part
    return replace(
        part,
        weights=part.weights + 2 * hidden_size * width,
        other_parameters=part.other_parameters + hidden_size,
    )


def gemma3n(config: ConfigReader) -> ModelShape:
    """Return the shape of Gemma 3n (AltUp of arXiv 2301.13310; LAuReL of 2411.07501).

    AltUp keeps several streams. In each layer one product per token predicts them all, with
    coefficients from a router that is applied twice.
    """
    hidden, streams = config.hidden_size, config.count("altup_num_inputs", default=4)
    rank = config.count("laurel_rank", default=64)
    row, figures = _per_layer_figures(config)
    shared = _SharedCache.of(config, 15)
    router = hidden * streams
    extra_weights = router + streams**3 + streams**2 + 2 * hidden * rank
    extra_norms = 3 * hidden  # of the router, the low-rank part, and the scale of the output
    products = 2 * router + 2 * hidden * streams**2
    each = []
    is_full = config.full_layers(lambda i: (i + 1) % 5 == 0)
    widths = config.counts("intermediate_size")
    for index, (full, width) in enumerate(zip(is_full, widths, strict=True)):
        window = None if full else config.count("sliding_window")
        mixer = _attention(config, config.heads(256), window, index >= shared.first)
        part = _with_row(dense(config, _NORMS, width), hidden, row)
        part = replace(
            part,
            weights=part.weights + extra_weights,
            other_parameters=part.other_parameters + extra_norms,
            token_flops=products,
        )
        each.append(Layer(mixer, part))
    figures["outer_weights"] += 2 * (streams - 1) * hidden * hidden
    return config.shape(each, tied=True, **figures)


def gemma4(config: ConfigReader) -> ModelShape:
    """Return the shape of Gemma 4: full layers have heads of their own size."""
    hidden, unified = config.hidden_size, config.model_type.startswith("gemma4_unified")
    row, figures = (0, {}) if unified else _per_layer_figures(config)
    shared = _SharedCache.of(config, 0)
    doubled = config.flag(("use_double_wide_mlp", False))
    width = config.count("intermediate_size")
    is_full = config.full_layers(lambda i: (i + 1) % 6 == 0)
    is_full[-1] = True
    each = []
    for index, full in enumerate(is_full):
        heads = _gemma4_heads(config, index, full)
        window = None if full else config.count("sliding_window")
        is_shared = index >= shared.first
        alike = full and config.flag(("attention_k_eq_v", False))
        mixer = _attention(config, heads, window, is_shared, alike)
        part = _with_row(
            dense(config, _NORMS, width * (2 if doubled and is_shared else 1)), hidden, row
        )
        each.append(Layer(mixer, _gemma4_experts(config, part)))
    return config.shape(each, tied=True, **figures)


def _gemma4_heads(config: ConfigReader, index: int, full: bool) -> tuple[int, int, int]:
    """Return query heads, key-value heads and head dimension of a layer."""
    heads, kv_heads, dim = config.heads(256)
    own_figures = config.own_figures()
    if own_figures:
        reader = ConfigReader(own_figures.get(index, {}), config.name)
        kv_heads = reader.count("num_key_value_heads", default=kv_heads)
        return heads, kv_heads, reader.count("head_dim", default=dim)
    if not full:
        return heads, kv_heads, dim
    if config.flag(("attention_k_eq_v", False)):
        kv_heads = config.count("num_global_key_value_heads", default=kv_heads)
    return heads, kv_heads, config.count("global_head_dim", default=512)


def _gemma4_experts(config: ConfigReader, part: FeedForward) -> FeedForward:
    """Return the part with experts beside it, their router and their norms."""
    if not config.flag(("enable_moe_block", False)):
        return part
    routed = experts(config, replace(_NORMS, norms=0), config.count("moe_intermediate_size"))
    hidden, number = config.hidden_size, routed.experts
    scales = hidden + number  # of the router and of the experts
    return replace(
        routed,
        weights=part.weights + routed.weights,
        width=part.width + routed.width,
        other_parameters=part.other_parameters + 3 * hidden + scales,
    )


def _attention(
    config: ConfigReader,
    heads: tuple[int, int, int],
    window: int | None,
    shared: bool,
    alike: bool = False,
) -> Mixer:
    """Return the attention of a layer; ``shared``: it reads the cache of an earlier layer.

    ``alike``: the keys, before their norm, are the values.
    """
    number, kv_heads, dim = heads
    projections = 0 if shared else 1 if alike else 2
    biases = (number + projections * kv_heads) * dim + config.hidden_size
    return softmax_attention(
        config.hidden_size,
        number,
        kv_heads,
        dim,
        window,
        kv_projections=projections,
        other_parameters=(dim if shared else 2 * dim)
        + biases * config.flag(("attention_bias", False)),
    )
