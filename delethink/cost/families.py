"""Model types, and the layers that each one has.

Most types differ in a few traits only: biases, norms, windows, experts. ``SOFTMAX`` has their
traits, one row a type. Types with other layers have a function each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from delethink.cost.config_reader import ConfigReader, Flag
from delethink.cost.shape import FeedForward, Layer, Mixer, ModelShape, softmax_attention

Windows = tuple[int | None, Callable[[int], bool]]  # a window, and the layers without it
WindowRule = Callable[[ConfigReader], Windows]

_BIASES: Flag = ("attention_bias", False)


def _no_window(config: ConfigReader) -> Windows:
    """Return no window, whatever the config names."""
    return None, lambda index: True


def same_window(config: ConfigReader) -> Windows:
    """Return the window of all layers, if there is one."""
    window = config.optional("sliding_window")
    return window, lambda index: window is None


def _used_window(config: ConfigReader) -> int | None:
    """Return the window, if the config says that it is used."""
    return config.optional("sliding_window") if config.get("use_sliding_window") else None


def used_window(config: ConfigReader) -> Windows:
    """Return the window of all layers, if it is used."""
    window = _used_window(config)
    return window, lambda index: window is None


def _later_window(config: ConfigReader) -> Windows:
    """Return the window of the layers after the first ones, if it is used."""
    window, first = _used_window(config), config.count("max_window_layers", default=28, least=0)
    return window, lambda index: window is None or index < first


def alternate_window(config: ConfigReader) -> Windows:
    """Return the window of every second one of the first layers, if it is used."""
    window, first = _used_window(config), config.count("max_window_layers", default=28, least=0)
    return window, lambda index: window is None or index % 2 == 1 or index >= first


def final_window(config: ConfigReader) -> Windows:
    """Return the window of the last layers, if there is one."""
    first = config.count("max_window_layers", default=62, least=0)
    window = config.optional("sliding_window")
    return window, lambda index: window is None or index < first


def _smollm_window(config: ConfigReader) -> Windows:
    """Return the window of the layers without rotary embedding, if it is used."""
    window, step = _used_window(config), config.count("no_rope_layer_interval", default=4)
    rotary = config.listed("no_rope_layers")  # 1 for a layer with it
    return (
        window,
        lambda index: window is None or bool(rotary[index] if rotary else (index + 1) % step),
    )


def one_in(step: int) -> WindowRule:
    """Return the pattern of one full layer after ``step`` - 1 layers with a window."""

    def pattern(config: ConfigReader) -> Windows:
        if "sliding_window" not in config.config:
            config.count("sliding_window")  # raises: null means no window, absence means nothing
        window = config.optional("sliding_window")
        return window, (lambda index: True) if window is None else config.every(step)

    return pattern


@dataclass(frozen=True)
class AttentionTraits:
    """Properties by which types of softmax attention differ."""

    head_dim: int | None = None  # if the config has none; ``None``: the width over the heads
    qkv_bias: Flag = False
    out_bias: Flag = False
    mlp_bias: Flag = False
    head_bias: Flag = False
    qk_norm: Flag = False  # norms of queries and keys
    qk_norm_all: bool = False  # their weights cover all heads; otherwise each head has the same
    norms: int = 2  # norms of the residual stream in a layer
    norm_vectors: int = 1  # 2: norms have a bias; 0: they have no parameters
    matrices: int = 3  # of a feed-forward part: gate, up and down; 2 without a gate
    mlp_parameters: int = 0  # of an activation
    tied: bool = False  # if the config does not say
    windows: WindowRule = _no_window
    gated: bool = False  # attention has an output gate
    chunked: bool = False  # windows do not slide
    sinks: bool = False  # one learned score a head


LLAMA = AttentionTraits(qkv_bias=_BIASES, out_bias=_BIASES, mlp_bias=("mlp_bias", False))
MISTRAL = AttentionTraits(windows=same_window)
QWEN = AttentionTraits(head_dim=128, qkv_bias=_BIASES, out_bias=_BIASES, qk_norm=True)
OLMO2 = AttentionTraits(qkv_bias=_BIASES, out_bias=_BIASES, qk_norm=True, qk_norm_all=True)
_GLM = AttentionTraits(head_dim=128, qkv_bias=("attention_bias", True))
_GEMMA = AttentionTraits(head_dim=256, qkv_bias=_BIASES, out_bias=_BIASES, tied=True)
_GEMMA3 = replace(_GEMMA, norms=4, qk_norm=True, windows=one_in(6))
_COHERE = replace(LLAMA, mlp_bias=False, norms=1, tied=True)
_ALL_BIASED: Flag = ("use_bias", True)

# Types whose layers are softmax attention and a feed-forward part of one or two matrices and a
# gate. Aliases share their traits.
SOFTMAX: dict[str, AttentionTraits] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mistral3": MISTRAL,
    "ministral": MISTRAL,
    "ministral3": replace(MISTRAL, head_dim=128),
    "qwen2": AttentionTraits(qkv_bias=True, windows=_later_window),
    "qwen3": replace(QWEN, windows=_later_window),
    "phi": AttentionTraits(
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
        qk_norm=("qk_layernorm", False),
        norms=1,
        norm_vectors=2,
        matrices=2,
    ),
    "phi3": MISTRAL,
    "smollm3": replace(LLAMA, tied=True, windows=_smollm_window),
    "olmo": replace(LLAMA, mlp_bias=False, norm_vectors=0),
    "olmo2": OLMO2,
    "olmo3": replace(OLMO2, windows=one_in(4)),
    "granite": LLAMA,
    "glm": _GLM,
    "glm4": replace(_GLM, norms=4),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, norms=4, windows=one_in(2)),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "cohere": replace(_COHERE, qk_norm=("use_qk_norm", False), qk_norm_all=True),
    "cohere2": replace(_COHERE, windows=one_in(4)),
    "exaone4": AttentionTraits(qk_norm=True, windows=one_in(4)),
    "ernie4_5": AttentionTraits(
        head_dim=128,
        qkv_bias=("use_bias", False),
        out_bias=("use_bias", False),
        mlp_bias=("use_bias", False),
        tied=True,
    ),
    "seed_oss": AttentionTraits(
        head_dim=128,
        qkv_bias=("attention_bias", True),
        out_bias=("attention_out_bias", False),
        mlp_bias=("mlp_bias", False),
    ),
    "hunyuan_v1_dense": replace(LLAMA, mlp_bias=False, qk_norm=True),
    "nemotron": replace(LLAMA, norm_vectors=2, matrices=2),
    "arcee": replace(LLAMA, matrices=2),
    "apertus": replace(LLAMA, mlp_bias=False, qk_norm=True, matrices=2, mlp_parameters=2),
    "starcoder2": AttentionTraits(
        qkv_bias=_ALL_BIASED,
        out_bias=_ALL_BIASED,
        mlp_bias=_ALL_BIASED,
        norm_vectors=2,
        matrices=2,
        tied=True,
        windows=same_window,
    ),
}


def attention(config: ConfigReader, traits: AttentionTraits, window: int | None = None) -> Mixer:
    """Return the attention of a type with these traits."""
    heads, kv_heads, dim = config.heads(traits.head_dim)
    other = (heads * (1 + traits.gated) + 2 * kv_heads) * dim * config.flag(traits.qkv_bias)
    other += config.hidden_size * config.flag(traits.out_bias) + heads * traits.sinks
    if config.flag(traits.qk_norm):
        other += (heads + kv_heads if traits.qk_norm_all else 2) * dim * traits.norm_vectors
    return softmax_attention(
        config.hidden_size,
        heads,
        kv_heads,
        dim,
        window,
        gated=traits.gated,
        other_parameters=other,
        chunked=traits.chunked and window is not None,
    )


def mixers(
    config: ConfigReader, traits: AttentionTraits, other: str = "sliding_attention"
) -> list[Mixer]:
    """Return the attention of each layer, full or with a window (layers of type ``other``)."""
    window, rule = traits.windows(config)
    is_full = config.full_layers(rule, other)
    if window is None and not all(is_full):
        window = config.count("sliding_window")  # an error if it is missing
    full, sliding = attention(config, traits), attention(config, traits, window)
    return [full if each else sliding for each in is_full]


def norm_parameters(config: ConfigReader, traits: AttentionTraits) -> int:
    """Return the parameters of the norms of the residual stream in a layer."""
    return traits.norms * traits.norm_vectors * config.hidden_size


def dense(config: ConfigReader, traits: AttentionTraits, width: int | None = None) -> FeedForward:
    """Return a feed-forward part without experts."""
    hidden_size = config.hidden_size
    width = config.count("intermediate_size") if width is None else width
    biases = ((traits.matrices - 1) * width + hidden_size) * config.flag(traits.mlp_bias)
    norms = norm_parameters(config, traits)
    return FeedForward(
        weights=traits.matrices * hidden_size * width,
        width=width,
        other_parameters=norms + biases + traits.mlp_parameters,
    )


def experts(
    config: ConfigReader,
    traits: AttentionTraits,
    width: int,
    shared_width: int = 0,
    shared_gate: bool = False,
    expert_biases: int = 0,
) -> FeedForward:
    """Return a router, experts of ``width`` and a shared expert of ``shared_width``."""
    hidden_size, (number, per_token) = config.hidden_size, config.experts()
    return FeedForward(
        weights=hidden_size * (number + shared_gate + 3 * shared_width),
        expert_weights=3 * hidden_size * width,
        experts=number,
        experts_per_token=per_token,
        width=shared_width + per_token * width,
        other_parameters=norm_parameters(config, traits) + number * expert_biases,
    )


def finish(config: ConfigReader, traits: AttentionTraits, layers: list[Layer]) -> ModelShape:
    """Return the shape, with the parameters of the last norm and of the head's bias."""
    biases = config.count("vocab_size") * config.flag(traits.head_bias)
    outer = traits.norm_vectors * config.hidden_size + biases
    return config.shape(layers, tied=traits.tied, outer_parameters=outer)


def softmax_shape(config: ConfigReader) -> ModelShape:
    """Return the shape of a type in ``SOFTMAX``."""
    traits = SOFTMAX[config.model_type]
    each, part = mixers(config, traits), dense(config, traits)
    return finish(config, traits, [Layer(mixer, part) for mixer in each])
