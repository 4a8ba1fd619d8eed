"""Reads a model's shape from its ``config.json``, from the bundled table, or from figures by hand.

Only architectures whose layers are known here are read: another one is an error, never a guess.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from delethink.cost.shape import (
    FeedForward,
    Layer,
    Mixer,
    ModelShape,
    delta_attention,
    latent_attention,
    softmax_attention,
)
from delethink.errors import MissingExtraError, ModelError, did_you_mean

Config = dict[str, Any]


def model_shape(model: str) -> ModelShape:
    """The shape of a model.

    Args:
        model: a name from the bundled table, ``"toy"`` for the shipped reasoner, a folder or file
            with a ``config.json``, figures by hand (``"hidden_size=1536,num_hidden_layers=28,…"``,
            with a config's own keys), or the name of a model on the Hugging Face hub.

    Raises:
        ModelError: nothing of the sort, or an architecture or figures that cannot be used.
        MissingExtraError: the hub is needed, and its client is not installed.
    """
    if "=" in model:
        return shape_of_config(_by_hand(model), "model by hand")
    if model == "toy":
        toy = str(files("delethink").joinpath("assets/toy_reasoner/config.json"))
        return shape_of_config(_read(Path(toy)), "the shipped toy reasoner")
    bundled = _bundled()
    if model.lower() in bundled:
        name, config = bundled[model.lower()]
        return shape_of_config(config, name)
    path = Path(model)
    if path.exists():
        return shape_of_config(_read(path / "config.json" if path.is_dir() else path), path.name)
    return shape_of_config(_from_hub(model), model)


def known_models() -> list[str]:
    """The names of the bundled table."""
    return [name for name, _ in _bundled().values()]


def shape_of_config(config: Config, name: str) -> ModelShape:
    """The shape that a Hugging Face config stands for.

    Raises:
        ModelError: an architecture that is not covered, or a figure that is missing or impossible.
    """
    if "text_config" in config:
        config = {**config["text_config"], **_outer(config)}
    kind = config.get("model_type", "llama")
    if kind not in _FAMILIES:
        raise ModelError(
            f"{name}: no formula here covers model_type {kind!r}.{did_you_mean(kind, _FAMILIES)} "
            "Known types: " + ", ".join(sorted(_FAMILIES))
        )
    return _FAMILIES[kind](_Figures(config, name))


def _outer(config: Config) -> Config:
    """What a multimodal config says of its text model outside of it."""
    return {key: config[key] for key in ("tie_word_embeddings",) if key in config}


class _Figures:
    """A config's figures, checked when they are asked for."""

    def __init__(self, config: Config, name: str) -> None:
        self.config = config
        self.name = name

    def count(self, *keys: str, default: int | None = None) -> int:
        """A whole number of at least 1, under the first of ``keys`` that the config has."""
        for key in keys:
            value = self.config.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ModelError(f"{self.name}: {key} must be a whole number >= 1, got {value!r}")
            return value
        if default is None:
            raise ModelError(
                f"{self.name}: {keys[0]} is missing from the config; give it there, or by hand "
                f"as --model {keys[0]}=…,…"
            )
        return default

    def optional(self, key: str) -> int | None:
        """A whole number of at least 1, or ``None``."""
        return None if self.config.get(key) is None else self.count(key)

    def flag(self, key: str, default: bool) -> bool:
        """A yes or no."""
        return bool(self.config.get(key, default))

    @property
    def num_layers(self) -> int:
        return self.count("num_hidden_layers")

    @property
    def hidden(self) -> int:
        return self.count("hidden_size")

    def heads(self) -> tuple[int, int, int]:
        """Query heads, key-value heads, numbers a head."""
        heads = self.count("num_attention_heads")
        kv_heads = self.count("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise ModelError(
                f"{self.name}: num_attention_heads={heads} is no multiple of "
                f"num_key_value_heads={kv_heads}"
            )
        if self.config.get("head_dim") is None and self.hidden % heads:
            raise ModelError(
                f"{self.name}: hidden_size={self.hidden} is no multiple of "
                f"num_attention_heads={heads}, and there is no head_dim"
            )
        return heads, kv_heads, self.count("head_dim", default=self.hidden // heads or None)

    def layer_types(self, otherwise: Callable[[int], str]) -> list[str]:
        """What each layer is; older configs leave it to a rule of the architecture."""
        types = self.config.get("layer_types") or [otherwise(i) for i in range(self.num_layers)]
        if len(types) != self.num_layers:
            raise ModelError(
                f"{self.name}: layer_types has {len(types)} entries for {self.num_layers} layers"
            )
        unknown = set(types) - {"full_attention", "sliding_attention", "linear_attention"}
        if unknown:
            raise ModelError(f"{self.name}: no formula here covers layers of {sorted(unknown)}")
        return list(types)

    def shape(self, layers: list[Layer], tied: bool) -> ModelShape:
        """The whole model."""
        return ModelShape(
            name=self.name,
            hidden_size=self.hidden,
            vocabulary_size=self.count("vocab_size"),
            layers=tuple(layers),
            tied_embeddings=self.flag("tie_word_embeddings", tied),
            max_position=self.optional("max_position_embeddings"),
        )


def _gated(hidden: int, intermediate: int) -> int:
    """Weights of a gate, an up and a down projection."""
    return 3 * hidden * intermediate


def _dense(figures: _Figures, norms: int = 2) -> FeedForward:
    width = figures.count("intermediate_size")
    return FeedForward(
        _gated(figures.hidden, width), width=width, other_parameters=norms * figures.hidden
    )


def _experts(
    figures: _Figures,
    experts: int,
    width: int,
    shared: int = 0,
    shared_gate: bool = False,
    biases: int = 0,
) -> FeedForward:
    """A router and experts; ``shared`` is the width of what every token goes through."""
    hidden = figures.hidden
    chosen = figures.count("num_experts_per_tok", "num_experts_per_token")
    if chosen > experts:
        raise ModelError(f"{figures.name}: a token cannot go through {chosen} of {experts} experts")
    weights = hidden * experts + (hidden if shared_gate else 0)
    return FeedForward(
        weights=weights + (_gated(hidden, shared) if shared else 0),
        expert_weights=_gated(hidden, width),
        experts=experts,
        experts_per_token=chosen,
        width=shared + chosen * width,
        other_parameters=2 * hidden + biases,
    )


def _attention(
    figures: _Figures, window: int | None, bias: bool, qk_norm: bool = False, sinks: bool = False
) -> Mixer:
    heads, kv_heads, dim = figures.heads()
    other = (heads + 2 * kv_heads) * dim if bias else 0
    other += 2 * dim if qk_norm else 0
    other += heads + figures.hidden if sinks else 0  # sinks, and a bias of the output
    return softmax_attention(figures.hidden, heads, kv_heads, dim, window, other_parameters=other)


def _decoder(figures: _Figures) -> ModelShape:
    """Llama, Mistral, Qwen2, Qwen3, Phi-3, SmolLM3: softmax attention and a gated dense part."""
    kind = figures.config.get("model_type", "llama")
    bias = kind == "qwen2" or figures.flag("attention_bias", False)
    window = figures.optional("sliding_window")
    if kind in ("qwen2", "qwen3", "smollm3") and not figures.flag("use_sliding_window", False):
        window = None
    first = figures.config.get("max_window_layers", 0) if kind in ("qwen2", "qwen3") else 0
    types = figures.layer_types(
        lambda i: "full_attention" if window is None or i < first else "sliding_attention"
    )
    dense = _dense(figures)
    layers = [
        Layer(
            _attention(
                figures, window if t == "sliding_attention" else None, bias, kind == "qwen3"
            ),
            dense,
        )
        for t in types
    ]
    return figures.shape(layers, tied=False)


def _gemma(figures: _Figures) -> ModelShape:
    """Gemma 2 and 3: sliding and full layers take turns; four norms a layer."""
    third = figures.config.get("model_type") != "gemma2"
    every = figures.count("sliding_window_pattern", default=6) if third else 2
    types = figures.layer_types(
        lambda i: "full_attention" if (i + 1) % every == 0 else "sliding_attention"
    )
    window, dense = figures.count("sliding_window"), _dense(figures, norms=4)
    layers = [
        Layer(_attention(figures, window if "sliding" in t else None, False, third), dense)
        for t in types
    ]
    return figures.shape(layers, tied=True)


def _mixture(figures: _Figures) -> ModelShape:
    """Mixtral and Qwen3-MoE: softmax attention and experts."""
    qwen = figures.config.get("model_type") == "qwen3_moe"
    if qwen and (
        figures.config.get("mlp_only_layers") or figures.count("decoder_sparse_step", default=1) > 1
    ):
        raise ModelError(f"{figures.name}: dense layers among Qwen3-MoE's are not covered here")
    experts = figures.count("num_experts", "num_local_experts")
    width = figures.count("moe_intermediate_size" if qwen else "intermediate_size")
    window = None if qwen else figures.optional("sliding_window")
    layer = Layer(
        _attention(figures, window, False, qk_norm=qwen), _experts(figures, experts, width)
    )
    return figures.shape([layer] * figures.num_layers, tied=False)


def _gpt_oss(figures: _Figures) -> ModelShape:
    """gpt-oss: sliding and full layers take turns, all with experts and biases."""
    types = figures.layer_types(
        lambda i: "full_attention" if (i + 1) % 2 == 0 else "sliding_attention"
    )
    experts, width = figures.count("num_local_experts"), figures.count("intermediate_size")
    biases = experts * (2 * width + figures.hidden + 1)
    part = _experts(figures, experts, width, biases=biases)
    window = figures.count("sliding_window")
    layers = [
        Layer(_attention(figures, window if "sliding" in t else None, True, sinks=True), part)
        for t in types
    ]
    return figures.shape(layers, tied=False)


def _latent(figures: _Figures) -> Mixer:
    query_rank = figures.optional("q_lora_rank")
    kv_rank = figures.count("kv_lora_rank")
    return latent_attention(
        figures.hidden,
        figures.count("num_attention_heads"),
        figures.count("qk_nope_head_dim"),
        figures.count("qk_rope_head_dim"),
        figures.count("v_head_dim"),
        kv_rank,
        query_rank,
        other_parameters=kv_rank + (query_rank or 0),
    )


def _deepseek(figures: _Figures) -> ModelShape:
    """DeepSeek-V2 and V3: latent attention; dense layers first, then experts."""
    dense_layers = figures.config.get("first_k_dense_replace", 0)
    if not isinstance(dense_layers, int) or not 0 <= dense_layers <= figures.num_layers:
        raise ModelError(
            f"{figures.name}: first_k_dense_replace must be within 0 and "
            f"{figures.num_layers}, got {dense_layers!r}"
        )
    experts = figures.count("n_routed_experts", "num_local_experts")
    width = figures.count("moe_intermediate_size")
    shared = width * figures.count("n_shared_experts", default=1)
    mixer, dense = _latent(figures), _dense(figures)
    part = _experts(figures, experts, width, shared)
    layers = [Layer(mixer, dense if i < dense_layers else part) for i in range(figures.num_layers)]
    return figures.shape(layers, tied=False)


def _qwen3_next(figures: _Figures) -> ModelShape:
    """Qwen3-Next: three layers of gated delta rule to one of gated attention, all with experts."""
    every = figures.count("full_attention_interval", default=4)
    types = figures.layer_types(
        lambda i: "full_attention" if (i + 1) % every == 0 else "linear_attention"
    )
    heads, kv_heads, dim = figures.heads()
    full = softmax_attention(
        figures.hidden, heads, kv_heads, dim, gated=True, other_parameters=2 * dim
    )
    key_heads = figures.count("linear_num_key_heads")
    value_heads = figures.count("linear_num_value_heads")
    key_dim, value_dim = (
        figures.count("linear_key_head_dim"),
        figures.count("linear_value_head_dim"),
    )
    values = value_heads * value_dim
    # queries, keys, values and the output gate; two figures a head; the output
    inputs = 2 * key_heads * key_dim + 2 * values + 2 * value_heads
    linear = delta_attention(
        figures.hidden * (inputs + values),
        key_heads,
        value_heads,
        key_dim,
        value_dim,
        figures.count("linear_conv_kernel_dim"),
    )
    part = _experts(
        figures,
        figures.count("num_experts", "num_local_experts"),
        figures.count("moe_intermediate_size"),
        figures.count("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    layers = [Layer(full if t == "full_attention" else linear, part) for t in types]
    return figures.shape(layers, tied=False)


def _kimi_linear(figures: _Figures) -> ModelShape:
    """Kimi Linear: three layers of Kimi delta attention to one of latent attention; experts."""
    inner = _Figures(
        figures.config.get("linear_attn_config")
        or {
            "head_dim": figures.config.get("linear_head_dim"),
            "num_heads": figures.config.get("linear_num_heads"),
            "short_conv_kernel_size": figures.config.get("linear_conv_kernel_dim"),
        },
        figures.name,
    )
    full_layers = inner.config.get("full_attn_layers")  # counted from 1
    if full_layers is None and not figures.config.get("layer_types"):
        raise ModelError(f"{figures.name}: full_attn_layers is missing from linear_attn_config")
    types = figures.layer_types(
        lambda i: "full_attention" if i + 1 in (full_layers or ()) else "linear_attention"
    )
    heads, dim = inner.count("num_heads"), inner.count("head_dim")
    wide, hidden = heads * dim, figures.hidden
    low_rank = 2 * (hidden * dim + dim * wide)  # of the decay and of the output gate
    linear = delta_attention(
        4 * hidden * wide + low_rank + hidden * heads,
        heads,
        heads,
        dim,
        dim,
        inner.count("short_conv_kernel_size"),
    )
    width = figures.count("moe_intermediate_size")
    shared = width * figures.count("num_shared_experts", "n_shared_experts", default=1)
    experts = figures.count("num_experts", "num_local_experts")
    latent, dense = _latent(figures), _dense(figures)
    part = _experts(figures, experts, width, shared)
    dense_layers = figures.config.get("first_k_dense_replace", 1)
    layers = [
        Layer(latent if t == "full_attention" else linear, dense if i < dense_layers else part)
        for i, t in enumerate(types)
    ]
    return figures.shape(layers, tied=False)


_FAMILIES: dict[str, Callable[[_Figures], ModelShape]] = {
    "llama": _decoder,
    "mistral": _decoder,
    "qwen2": _decoder,
    "qwen3": _decoder,
    "phi3": _decoder,
    "smollm3": _decoder,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "gemma3_text": _gemma,
    "mixtral": _mixture,
    "qwen3_moe": _mixture,
    "gpt_oss": _gpt_oss,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "qwen3_next": _qwen3_next,
    "kimi_linear": _kimi_linear,
}


@cache
def _bundled() -> dict[str, tuple[str, Config]]:
    """Name in small letters -> name and config; ``like`` names the entry that one starts from."""
    text = files("delethink").joinpath("assets/models.json").read_text(encoding="utf-8")
    table: dict[str, Config] = json.loads(text)

    def whole(name: str) -> Config:
        config = dict(table[name])
        like = config.pop("like", None)
        return {**(whole(like) if like else {}), **config}

    return {name.lower(): (name, whole(name)) for name in table}


def _by_hand(text: str) -> Config:
    config: Config = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals or not key:
            raise ModelError(f"figures by hand are key=value,key=value: got {part!r}")
        try:
            config[key] = json.loads(value)
        except json.JSONDecodeError:
            config[key] = value
    return config


def _read(path: Path) -> Config:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no config: a JSON object is needed")
    return config


def _from_hub(model: str) -> Config:
    near = did_you_mean(model, _bundled()) if "/" not in model else ""
    unknown = f"{model!r} is not in the table of known models, and there is no such file.{near}"
    if model.count("/") != 1 or model.startswith((".", "/")):
        raise ModelError(unknown + " A model on the hub is named owner/name.")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise MissingExtraError("huggingface_hub", "eval") from None
    try:
        return _read(Path(hf_hub_download(model, "config.json")))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{model!r} is not in the table of known models, and its config.json could not be had "
            f"from the hub ({first}).{did_you_mean(model, _bundled())} Its figures can be given by "
            "hand too: --model hidden_size=…,num_hidden_layers=…,…"
        ) from None
