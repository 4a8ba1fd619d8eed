"""The shape of a model: the few numbers that decide what thinking with it costs.

A layer is a mixer, which looks at other tokens, and a feed-forward part, which does not. Mixers of
every architecture come down to the same figures: weights that a token is multiplied with, FLOPs for
each key it looks at, numbers kept for each token, how far back it looks, and a state that does not
grow. A multiplication and its addition are two FLOPs; norms, activations, rotations and the softmax
are left out, as torch's counter leaves them out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from delethink.errors import ModelError


@dataclass(frozen=True)
class Mixer:
    """How a layer looks at other tokens.

    Args:
        weights: numbers that a token is multiplied with (the projections).
        pair_flops: FLOPs for a query and a key where many queries are worked on at once.
        decode_pair_flops: the same where one token is decoded; latent attention differs.
        cache_numbers: numbers kept for each token.
        window: how many keys a query looks at, itself included, or ``None`` for all before it.
        state_numbers: numbers kept however long the sequence is.
        token_flops: FLOPs for a token that are neither projections nor pairs.
        kept_numbers: numbers that training keeps of a token for the backward pass.
        other_parameters: norms and biases.
    """

    weights: int
    pair_flops: int = 0
    decode_pair_flops: int = 0
    cache_numbers: int = 0
    window: int | None = None
    state_numbers: int = 0
    token_flops: int = 0
    kept_numbers: int = 0
    other_parameters: int = 0


@dataclass(frozen=True)
class FeedForward:
    """What a layer does with each token by itself.

    Args:
        weights: numbers that every token is multiplied with: the dense part, shared experts, the
            router.
        expert_weights: those of one expert.
        experts: how many there are.
        experts_per_token: how many of them a token goes through.
        width: numbers between its projections, of all that a token goes through.
        other_parameters: norms and biases.
    """

    weights: int
    expert_weights: int = 0
    experts: int = 0
    experts_per_token: int = 0
    width: int = 0
    other_parameters: int = 0

    @property
    def active_weights(self) -> int:
        """Numbers that one token is multiplied with."""
        return self.weights + self.experts_per_token * self.expert_weights


@dataclass(frozen=True)
class Layer:
    """A mixer and a feed-forward part."""

    mixer: Mixer
    feed_forward: FeedForward


@dataclass(frozen=True)
class ModelShape:
    """A causal language model, as far as its cost goes.

    Args:
        name: for tables.
        hidden_size: width of the residual stream (d).
        vocabulary_size: entries of the embedding (V).
        layers: in order.
        tied_embeddings: the head's weights are the embedding's.
        max_position: the longest sequence that the model was made for, if known.
    """

    name: str
    hidden_size: int
    vocabulary_size: int
    layers: tuple[Layer, ...]
    tied_embeddings: bool = False
    max_position: int | None = None

    def __post_init__(self) -> None:
        if self.hidden_size < 1 or self.vocabulary_size < 1 or not self.layers:
            raise ModelError(
                f"{self.name}: hidden_size, vocabulary size and the number of layers must be at "
                f"least 1, got {self.hidden_size}, {self.vocabulary_size} and {len(self.layers)}"
            )

    @cached_property
    def mixers(self) -> tuple[tuple[Mixer, int], ...]:
        """The different mixers, and how many layers have each."""
        return tuple(Counter(layer.mixer for layer in self.layers).items())

    @cached_property
    def feed_forwards(self) -> tuple[tuple[FeedForward, int], ...]:
        """The different feed-forward parts, and how many layers have each."""
        return tuple(Counter(layer.feed_forward for layer in self.layers).items())

    @cached_property
    def token_weights(self) -> int:
        """Numbers that a token is multiplied with in all layers; without the head."""
        return sum(layer.mixer.weights + layer.feed_forward.active_weights for layer in self.layers)

    @cached_property
    def head_weights(self) -> int:
        """Numbers that a token is multiplied with to be given its logits: V d."""
        return self.vocabulary_size * self.hidden_size

    @cached_property
    def expert_weights(self) -> int:
        """Numbers in all experts of all layers."""
        parts = (layer.feed_forward for layer in self.layers)
        return sum(part.experts * part.expert_weights for part in parts)

    @cached_property
    def parameters(self) -> int:
        """All parameters."""
        embeddings = self.head_weights * (1 if self.tied_embeddings else 2)
        dense = sum(
            layer.mixer.weights
            + layer.mixer.other_parameters
            + layer.feed_forward.weights
            + layer.feed_forward.other_parameters
            for layer in self.layers
        )
        return embeddings + dense + self.expert_weights + self.hidden_size  # the last norm

    @cached_property
    def active_parameters(self) -> int:
        """Parameters that take part in one token, as model cards count them: with the embedding."""
        idle = sum(
            (part.experts - part.experts_per_token) * part.expert_weights * count
            for part, count in self.feed_forwards
        )
        return self.parameters - idle

    @cached_property
    def unbounded_layers(self) -> int:
        """Layers whose attention and cache grow with all that went before."""
        return sum(
            count for mixer, count in self.mixers if mixer.pair_flops and mixer.window is None
        )


def softmax_attention(
    hidden_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None = None,
    gated: bool = False,
    other_parameters: int = 0,
) -> Mixer:
    """Multi-head, grouped-query or multi-query attention, over all tokens or a sliding window.

    Scores take 2 H d_h FLOPs a pair and the weighted sum of values as many. Keys and values keep
    2 H_kv d_h numbers a token; a backward pass needs queries, keys, values and the outcome. Gated:
    queries come with a gate of the same size (Qwen3-Next).
    """
    query = heads * head_dim
    weights = hidden_size * (query * (3 if gated else 2) + 2 * kv_heads * head_dim)
    return Mixer(
        weights=weights,
        pair_flops=4 * query,
        decode_pair_flops=4 * query,
        cache_numbers=2 * kv_heads * head_dim,
        window=window,
        kept_numbers=(3 if gated else 2) * query + 2 * kv_heads * head_dim,
        other_parameters=other_parameters,
    )


def latent_attention(
    hidden_size: int,
    heads: int,
    nope_dim: int,
    rope_dim: int,
    value_dim: int,
    kv_rank: int,
    query_rank: int | None,
    other_parameters: int = 0,
) -> Mixer:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    A token keeps its latent and one rotated key: r + d_rope numbers. Over many queries at once the
    latents are expanded into keys and values, 2 H (d_nope + d_rope + d_v) FLOPs a pair. In decoding
    the expansion is absorbed into query and output, which takes as many weights, and the pairs are
    made in the latent space: 2 H (2 r + d_rope).
    """
    query_dim = heads * (nope_dim + rope_dim)
    query = (
        hidden_size * query_dim if query_rank is None else query_rank * (hidden_size + query_dim)
    )
    down = hidden_size * (kv_rank + rope_dim)
    up = kv_rank * heads * (nope_dim + value_dim)
    return Mixer(
        weights=query + down + up + heads * value_dim * hidden_size,
        pair_flops=2 * heads * (nope_dim + rope_dim + value_dim),
        decode_pair_flops=2 * heads * (2 * kv_rank + rope_dim),
        cache_numbers=kv_rank + rope_dim,
        kept_numbers=2 * query_dim + 2 * heads * value_dim + kv_rank + (query_rank or 0),
        other_parameters=other_parameters,
    )


def delta_attention(
    projections: int, key_heads: int, value_heads: int, key_dim: int, value_dim: int, kernel: int
) -> Mixer:
    """Linear attention with the gated delta rule (arXiv 2412.06464; Kimi Linear, 2510.26692).

    A token reads the state with its key, writes the correction and reads with its query: three
    products of 2 d_k d_v FLOPs a value head, counted in the recurrent form; forms that work on many
    tokens at once do somewhat more. Then the short convolution. The state has d_k d_v numbers a
    value head, beside the last ``kernel - 1`` inputs of the convolution.
    """
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    return Mixer(
        weights=projections,
        state_numbers=value_heads * key_dim * value_dim + (kernel - 1) * channels,
        token_flops=6 * value_heads * key_dim * value_dim + 2 * kernel * channels,
        kept_numbers=2 * channels + 3 * value_heads * value_dim,
        other_parameters=kernel * channels,
    )
