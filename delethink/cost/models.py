"""Model configurations: from a ``config.json``, the bundled table or figures on the command line.

Only architectures with known layers are supported. Any other one is an error, never a guess.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
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
from delethink.json_io import parse_json, read_json, shorten

Config = dict[str, Any]

_MAX_COUNT = 10**12
_MAX_LAYERS = 10_000  # each is an object


def model_shape(model: str) -> ModelShape:
    """Return the shape of a model.

    Args:
        model: a name from the bundled table, or ``"toy"`` for the shipped reasoner. Also a folder
            or file with a ``config.json``, a model id on the Hugging Face Hub, or figures under
            the keys of a config (``"hidden_size=1536,num_hidden_layers=28,…"``).

    Raises:
        ModelError: the model is unknown, or its architecture or figures cannot be used.
        MissingExtraError: the model is on the Hub, and ``huggingface_hub`` is not installed.
    """
    if "=" in model:
        return shape_of_config(_parse_figures(model), "model by hand")
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
    return shape_of_config(_download(model), model)


def known_models() -> list[str]:
    """Return the names in the bundled table."""
    return [name for name, _ in _bundled().values()]


def shape_of_config(config: Config, name: str) -> ModelShape:
    """Return the shape of the model with this Hugging Face config.

    Raises:
        ModelError: the architecture is not supported, or a figure is missing or impossible.
    """
    if isinstance(config.get("text_config"), dict):  # a multimodal model
        tied = {k: config[k] for k in ("tie_word_embeddings",) if k in config}
        config = {**config["text_config"], **tied}
    model_type = str(config.get("model_type", "llama"))
    if model_type not in _FAMILIES:
        raise ModelError(
            f"{name}: model_type {model_type!r:.80} is not supported."
            f"{did_you_mean(model_type, _FAMILIES)}"
        )
    return _FAMILIES[model_type](_ConfigReader(config, name))


@dataclass(frozen=True)
class _ConfigReader:
    """Checked access to the values of a config."""

    config: Config
    name: str

    def count(self, *keys: str, default: int | None = None) -> int:
        """Return the positive integer under the first of ``keys`` in the config."""
        for key in keys:
            value = self.config.get(key)
            if value is None:
                continue
            if type(value) is not int or not 1 <= value <= _MAX_COUNT:
                raise ModelError(
                    f"{self.name}: {key} must be a whole number >= 1, got {shorten(value)}"
                )
            return value
        if default is None:
            raise ModelError(
                f"{self.name}: {keys[0]} is missing from the config; add it there, or give the "
                f"figures as --model {keys[0]}=…,…"
            )
        return default

    def optional(self, key: str) -> int | None:
        """Return a positive integer, or ``None`` if the key is missing."""
        return None if self.config.get(key) is None else self.count(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self.config.get(key, default)

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "llama"))

    @property
    def num_layers(self) -> int:
        number = self.count("num_hidden_layers")
        if number > _MAX_LAYERS:
            raise ModelError(
                f"{self.name}: num_hidden_layers must be at most {_MAX_LAYERS:,}, got {number}"
            )
        return number

    @property
    def hidden_size(self) -> int:
        return self.count("hidden_size")

    def heads(self) -> tuple[int, int, int]:
        """Return the number of query heads and of key-value heads, and the head dimension."""
        heads = self.count("num_attention_heads")
        kv_heads = self.count("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise ModelError(
                f"{self.name}: num_attention_heads={heads} is no multiple of "
                f"num_key_value_heads={kv_heads}"
            )
        if self.config.get("head_dim") is None and self.hidden_size % heads:
            raise ModelError(
                f"{self.name}: hidden_size={self.hidden_size} is no multiple of "
                f"num_attention_heads={heads}, and there is no head_dim"
            )
        return heads, kv_heads, self.count("head_dim", default=self.hidden_size // heads or None)

    def full_layers(
        self, rule: Callable[[int], bool], other: str = "sliding_attention"
    ) -> list[bool]:
        """Return for each layer whether it has full attention; the others are of type ``other``.

        Older configs have no ``layer_types``: ``rule`` maps the index of a layer to the answer.
        """
        types = self.config.get("layer_types")
        if not types:
            return [rule(i) for i in range(self.num_layers)]
        if len(types) != self.num_layers:
            raise ModelError(
                f"{self.name}: layer_types has {len(types)} entries for {self.num_layers} layers"
            )
        if unknown := set(types) - {"full_attention", other}:
            raise ModelError(
                f"{self.name}: layer_types {sorted(unknown)} are not supported for model_type "
                f"{self.model_type!r}"
            )
        return [layer_type == "full_attention" for layer_type in types]

    def shape(self, layers: list[Layer], tied: bool = False) -> ModelShape:
        return ModelShape(
            name=self.name,
            hidden_size=self.hidden_size,
            vocabulary_size=self.count("vocab_size"),
            layers=tuple(layers),
            tied_embeddings=bool(self.get("tie_word_embeddings", tied)),
        )


def _dense(config: _ConfigReader, norms: int = 2) -> FeedForward:
    """Return a gate, an up and a down projection."""
    hidden_size, width = config.hidden_size, config.count("intermediate_size")
    return FeedForward(3 * hidden_size * width, width=width, other_parameters=norms * hidden_size)


def _experts(
    config: _ConfigReader,
    width: int,
    shared_width: int = 0,
    shared_gate: bool = False,
    expert_biases: int = 0,
) -> FeedForward:
    """Return a router, experts of ``width`` and a shared expert of ``shared_width``."""
    hidden_size = config.hidden_size
    experts = config.count("num_experts", "num_local_experts", "n_routed_experts")
    per_token = config.count("num_experts_per_tok", "num_experts_per_token")
    if per_token > experts:
        raise ModelError(
            f"{config.name}: a token cannot be routed to {per_token} of {experts} experts"
        )
    return FeedForward(
        weights=hidden_size * (experts + shared_gate + 3 * shared_width),
        expert_weights=3 * hidden_size * width,
        experts=experts,
        experts_per_token=per_token,
        width=shared_width + per_token * width,
        other_parameters=2 * hidden_size + experts * expert_biases,
    )


def _attention(
    config: _ConfigReader,
    window: int | None = None,
    bias: bool = False,
    qk_norm: bool = False,
    sinks: bool = False,
) -> Mixer:
    heads, kv_heads, dim = config.heads()
    other = (heads + 2 * kv_heads) * dim if bias else 0
    other += 2 * dim if qk_norm else 0
    other += heads + config.hidden_size if sinks else 0  # sinks, and a bias of the output
    return softmax_attention(
        config.hidden_size, heads, kv_heads, dim, window, other_parameters=other
    )


def _decoder(config: _ConfigReader) -> ModelShape:
    """Llama, Mistral, Qwen2, Qwen3, Phi-3, SmolLM3: softmax attention, dense feed-forward."""
    kind = config.model_type
    qwen = kind in ("qwen2", "qwen3")
    bias = kind == "qwen2" or bool(config.get("attention_bias"))
    window = config.optional("sliding_window")
    if (qwen or kind == "smollm3") and not config.get("use_sliding_window"):
        window = None
    first = config.get("max_window_layers", 0) if qwen else 0
    is_full = config.full_layers(lambda i: window is None or i < first)
    full = _attention(config, None, bias, kind == "qwen3")
    sliding = _attention(config, window, bias, kind == "qwen3")
    dense = _dense(config)
    return config.shape([Layer(full if f else sliding, dense) for f in is_full])


def _gemma(config: _ConfigReader) -> ModelShape:
    """Gemma 2 and 3: alternating sliding and full layers, four norms in each."""
    third = config.model_type != "gemma2"
    every = config.count("sliding_window_pattern", default=6) if third else 2
    full = _attention(config, qk_norm=third)
    sliding = _attention(config, config.count("sliding_window"), qk_norm=third)
    is_full = config.full_layers(lambda i: (i + 1) % every == 0)
    dense = _dense(config, norms=4)
    return config.shape([Layer(full if f else sliding, dense) for f in is_full], tied=True)


def _mixture(config: _ConfigReader) -> ModelShape:
    """Mixtral and Qwen3-MoE: softmax attention and experts."""
    qwen = config.model_type == "qwen3_moe"
    sparse_step = config.count("decoder_sparse_step", default=1)
    if qwen and (config.get("mlp_only_layers") or sparse_step > 1):
        raise ModelError(f"{config.name}: Qwen3-MoE models with dense layers are not supported")
    width = config.count("moe_intermediate_size" if qwen else "intermediate_size")
    window = None if qwen else config.optional("sliding_window")
    layer = Layer(_attention(config, window, qk_norm=qwen), _experts(config, width))
    return config.shape([layer] * config.num_layers)


def _gpt_oss(config: _ConfigReader) -> ModelShape:
    """gpt-oss: alternating sliding and full layers, experts, biases throughout."""
    width = config.count("intermediate_size")
    experts = _experts(config, width, expert_biases=2 * width + config.hidden_size + 1)
    full = _attention(config, None, bias=True, sinks=True)
    sliding = _attention(config, config.count("sliding_window"), bias=True, sinks=True)
    is_full = config.full_layers(lambda i: (i + 1) % 2 == 0)
    return config.shape([Layer(full if f else sliding, experts) for f in is_full])


def _latent(config: _ConfigReader) -> Mixer:
    query_rank = config.optional("q_lora_rank")
    kv_rank = config.count("kv_lora_rank")
    return latent_attention(
        config.hidden_size,
        config.count("num_attention_heads"),
        config.count("qk_nope_head_dim"),
        config.count("qk_rope_head_dim"),
        config.count("v_head_dim"),
        kv_rank,
        query_rank,
        other_parameters=kv_rank + (query_rank or 0),
    )


def _shared_and_routed(config: _ConfigReader, dense_layers: int) -> list[FeedForward]:
    """Return the feed-forward part of each layer: dense ones first, then experts."""
    dense_layers = config.get("first_k_dense_replace", dense_layers)
    if not isinstance(dense_layers, int) or not 0 <= dense_layers <= config.num_layers:
        raise ModelError(
            f"{config.name}: first_k_dense_replace must be from 0 to {config.num_layers}, "
            f"got {dense_layers!r}"
        )
    width = config.count("moe_intermediate_size")
    shared = config.count("n_shared_experts", "num_shared_experts", default=1)
    dense, experts = _dense(config), _experts(config, width, width * shared)
    return [dense if i < dense_layers else experts for i in range(config.num_layers)]


def _deepseek(config: _ConfigReader) -> ModelShape:
    """DeepSeek-V2 and V3: latent attention, experts after the first dense layers."""
    parts, mixer = _shared_and_routed(config, 0), _latent(config)
    return config.shape([Layer(mixer, part) for part in parts])


def _qwen3_next(config: _ConfigReader) -> ModelShape:
    """Qwen3-Next: one layer of gated attention after three of gated delta rule, experts."""
    every = config.count("full_attention_interval", default=4)
    heads, kv_heads, dim = config.heads()
    full = softmax_attention(
        config.hidden_size, heads, kv_heads, dim, gated=True, other_parameters=2 * dim
    )
    key_heads = config.count("linear_num_key_heads")
    value_heads = config.count("linear_num_value_heads")
    key_dim = config.count("linear_key_head_dim")
    value_dim = config.count("linear_value_head_dim")
    values = value_heads * value_dim
    # Inputs: queries, keys, values, the output gate, and two scalars per head.
    inputs = 2 * key_heads * key_dim + 2 * values + 2 * value_heads
    weights, kernel = config.hidden_size * (inputs + values), config.count("linear_conv_kernel_dim")
    linear = delta_attention(weights, key_heads, value_heads, key_dim, value_dim, kernel)
    width = config.count("moe_intermediate_size")
    shared_width = config.count("shared_expert_intermediate_size")
    experts = _experts(config, width, shared_width, shared_gate=True)
    is_full = config.full_layers(lambda i: (i + 1) % every == 0, "linear_attention")
    return config.shape([Layer(full if f else linear, experts) for f in is_full])


def _kimi_linear(config: _ConfigReader) -> ModelShape:
    """Kimi Linear: one layer of latent attention after three of Kimi delta attention, experts."""
    inner = _ConfigReader(
        config.get("linear_attn_config")
        or {
            "head_dim": config.get("linear_head_dim"),
            "num_heads": config.get("linear_num_heads"),
            "short_conv_kernel_size": config.get("linear_conv_kernel_dim"),
        },
        config.name,
    )
    numbers = inner.get("full_attn_layers")  # counted from 1
    if numbers is None and not config.get("layer_types"):
        raise ModelError(f"{config.name}: full_attn_layers is missing from linear_attn_config")
    is_full = config.full_layers(lambda i: i + 1 in numbers, "linear_attention")
    hidden_size, heads, dim = config.hidden_size, inner.count("num_heads"), inner.count("head_dim")
    width = heads * dim
    low_rank = 2 * (hidden_size * dim + dim * width)  # projections of the decay and the output gate
    weights = 4 * hidden_size * width + low_rank + hidden_size * heads
    kernel = inner.count("short_conv_kernel_size")
    linear = delta_attention(weights, heads, heads, dim, dim, kernel)
    latent, parts = _latent(config), _shared_and_routed(config, 1)
    return config.shape(
        [Layer(latent if f else linear, part) for f, part in zip(is_full, parts, strict=True)]
    )


_FAMILIES: dict[str, Callable[[_ConfigReader], ModelShape]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"), _decoder),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), _gemma),
    **dict.fromkeys(("mixtral", "qwen3_moe"), _mixture),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _deepseek),
    "gpt_oss": _gpt_oss,
    "qwen3_next": _qwen3_next,
    "kimi_linear": _kimi_linear,
}


@cache
def _bundled() -> dict[str, tuple[str, Config]]:
    """Return name and config by lower-case name. ``like`` names an entry to inherit from."""
    text = files("delethink").joinpath("assets/models.json").read_text(encoding="utf-8")
    table: dict[str, Config] = json.loads(text)

    def resolved(name: str) -> Config:
        config = dict(table[name])
        like = config.pop("like", None)
        return {**(resolved(like) if like else {}), **config}

    return {name.lower(): (name, resolved(name)) for name in table}


def _parse_figures(text: str) -> Config:
    config: Config = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals or not key:
            raise ModelError(f"the figures of a model are key=value,key=value: got {part!r}")
        try:
            config[key] = parse_json(value, "a figure", ModelError)
        except ModelError:
            config[key] = value
    return config


def _read(path: Path) -> Config:
    config = read_json(path, ModelError)
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no config: expected a JSON object")
    return config


def _download(model: str) -> Config:
    name, _, revision = model.partition("@")
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise ModelError(
            f"{model!r} is neither a file nor a known model (see `delethink cost --models`), "
            "and models on the Hugging Face Hub are named owner/name"
        )
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise MissingExtraError("huggingface_hub", "eval") from None
    try:
        return _read(Path(hf_hub_download(name, "config.json", revision=revision or None)))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        near = get_close_matches(model.lower(), _bundled(), n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "`delethink cost --models` lists them."
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{model!r} is not a known model, and its config.json could not be downloaded from the "
            f"Hugging Face Hub ({reason}). {hint}"
        ) from None
