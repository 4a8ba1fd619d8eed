"""Checked access to the figures of a Hugging Face config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from delethink.cost.shape import Layer, ModelShape
from delethink.errors import ModelError
from delethink.json_io import shorten

Config = dict[str, Any]
Flag = bool | tuple[str, bool]  # a constant, or the key of a config and its default

_MAX_COUNT = 10**12
_MAX_LAYERS = 10_000  # each is an object
_FULL = "full_attention"
_OLD_LAYER_TYPES = {"attention": _FULL, "mamba": "linear_attention"}  # names of older configs

# Expert counts under the keys of all types.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)
_SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")


@dataclass(frozen=True)
class ConfigReader:
    """A config, and the name of its model in errors."""

    config: Config
    name: str

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value under a key as it is."""
        return self.config.get(key, default)

    def flag(self, flag: Flag) -> bool:
        """Return a constant, or the truth of the value under a key."""
        if isinstance(flag, bool):
            return flag
        key, default = flag
        value = self.config.get(key)
        return default if value is None else bool(value)

    def count(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """Return the integer under the first of ``keys`` in the config, at least ``least``."""
        for key in keys:
            value = self.config.get(key)
            if isinstance(value, list) and value and all(each == value[0] for each in value):
                value = value[0]  # one figure a layer, all the same
            if value is None:
                continue
            if type(value) is not int or not least <= value <= _MAX_COUNT:
                raise ModelError(
                    f"{self.name}: {key} must be a whole number >= {least}, got {shorten(value)}"
                )
            return value
        if default is None:
            raise ModelError(
                f"{self.name}: {keys[0]} is missing from the config; add it there, or give the "
                f"figures as --model {keys[0]}=…,…"
            )
        return default

    def counts(self, key: str, default: int | None = None) -> list[int]:
        """Return a positive integer for each layer, from a list or from one for all layers."""
        value = self.config.get(key)
        if not isinstance(value, list):
            return [self.count(key, default=default)] * self.num_layers
        values = self.listed(key)
        if values is None:  # an empty list
            raise ModelError(f"{self.name}: {key} has no entries for {self.num_layers} layers")
        return [ConfigReader({key: each}, self.name).count(key) for each in values]

    def listed(self, key: str) -> list[Any] | None:
        """Return the list under a key, with one value for each layer; ``None`` if missing."""
        values = self.config.get(key)
        if not values:
            return None
        if not isinstance(values, list) or len(values) != self.num_layers:
            found = f"{len(values)} entries" if isinstance(values, list) else shorten(values)
            raise ModelError(f"{self.name}: {key} has {found} for {self.num_layers} layers")
        return values

    def optional(self, key: str) -> int | None:
        """Return a positive integer, or ``None`` if the key is missing."""
        return None if self.config.get(key) is None else self.count(key)

    @property
    def model_type(self) -> str:
        """Type of the model, by default ``llama``."""
        return str(self.config.get("model_type", "llama"))

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        number = self.count("num_hidden_layers")
        if number > _MAX_LAYERS:
            raise ModelError(
                f"{self.name}: num_hidden_layers must be at most {_MAX_LAYERS:,}, got {number}"
            )
        return number

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.count("hidden_size")

    def heads(self, head_dim: int | None = None) -> tuple[int, int, int]:
        """Return the number of query heads and of key-value heads, and the head dimension.

        Args:
            head_dim: the dimension if the config has none; ``None``: the width over the heads.
        """
        heads = self.count("num_attention_heads")
        kv_heads = self.count("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise ModelError(
                f"{self.name}: num_attention_heads={heads} is no multiple of "
                f"num_key_value_heads={kv_heads}"
            )
        if self.config.get("head_dim") is None and head_dim is None and self.hidden_size % heads:
            raise ModelError(
                f"{self.name}: hidden_size={self.hidden_size} is no multiple of "
                f"num_attention_heads={heads}, and there is no head_dim"
            )
        return (
            heads,
            kv_heads,
            self.count("head_dim", default=head_dim or self.hidden_size // heads),
        )

    def experts(self) -> tuple[int, int]:
        """Return the number of experts, and of those that a token is routed to."""
        experts, per_token = self.count(*_EXPERTS), self.count(*_EXPERTS_PER_TOKEN)
        if per_token > experts:
            raise ModelError(
                f"{self.name}: a token cannot be routed to {per_token} of {experts} experts"
            )
        return experts, per_token

    def shared_experts(self, default: int) -> int:
        """Return the number of experts that every token uses; it may be 0."""
        return self.count(*_SHARED_EXPERTS, default=default, least=0)

    def full_layers(
        self, rule: Callable[[int], bool], other: str = "sliding_attention"
    ) -> list[bool]:
        """Return for each layer whether it has full attention; the others are of type ``other``.

        Older configs have no ``layer_types``: ``rule`` maps the index of a layer to the answer.
        """
        listed = self.listed("layer_types")
        if listed is None:
            return [rule(i) for i in range(self.num_layers)]
        old = _OLD_LAYER_TYPES if other == "linear_attention" else {}
        types = [old.get(str(each), str(each)) for each in listed]
        if unknown := set(types) - {_FULL, other}:
            raise ModelError(
                f"{self.name}: layer_types {sorted(unknown)} are not supported for model_type "
                f"{self.model_type!r}, whose layers are {_FULL} or {other}"
            )
        return [layer_type == _FULL for layer_type in types]

    def every(self, default: int) -> Callable[[int], bool]:
        """Return the rule that one layer in a pattern, its last, has full attention."""
        pattern = self.config.get("sliding_window_pattern")
        if isinstance(pattern, str) and pattern:  # one letter a layer
            step = len(pattern)
        else:
            step = self.count("sliding_window_pattern", default=default)
        return lambda index: (index + 1) % step == 0

    def sparse_layers(self, dense: int) -> list[bool]:
        """Return for each layer whether it has experts; the ``dense`` first ones have none."""
        listed = self.listed("mlp_layer_types")
        if listed is not None:
            return [each == "sparse" for each in listed]
        dense = self.config.get("first_k_dense_replace", min(dense, self.num_layers))
        if not isinstance(dense, int) or not 0 <= dense <= self.num_layers:
            raise ModelError(
                f"{self.name}: first_k_dense_replace must be from 0 to {self.num_layers}, "
                f"got {dense!r}"
            )
        return [index >= dense for index in range(self.num_layers)]

    def indices(self, key: str) -> set[int]:
        """Return the indices of layers listed under a key; none if it is missing."""
        value = self.config.get(key) or []
        if not isinstance(value, list) or not all(type(each) is int for each in value):
            raise ModelError(
                f"{self.name}: {key} must be a list of the numbers of layers, got {shorten(value)}"
            )
        return set(value)

    def own_figures(self) -> dict[int, Config]:
        """Return the figures in which layers differ from the others, by the index of the layer."""
        listed = self.config.get("per_layer_config") or {}
        try:  # keys of JSON are text, with leading zeros
            by_index = {int(key): figures for key, figures in listed.items()}
        except (AttributeError, ValueError):
            by_index = {-1: None}
        if not all(isinstance(figures, dict) for figures in by_index.values()):
            raise ModelError(
                f"{self.name}: per_layer_config must map the index of a layer to its figures, got "
                f"{shorten(listed)}"
            )
        return by_index

    def shape(self, layers: Sequence[Layer], tied: bool = False, **figures: Any) -> ModelShape:
        """Return the shape with these layers; ``figures`` are further fields of it."""
        return ModelShape(
            name=self.name,
            hidden_size=self.hidden_size,
            vocabulary_size=self.count("vocab_size"),
            layers=tuple(layers),
            tied_embeddings=self.flag(("tie_word_embeddings", tied)),
            **figures,
        )
