"""Model shapes: the figures that decide the cost of sampling and training.

A layer is a mixer (attention), which reads other tokens, and a feed-forward part, which does not.
The mixers of every architecture reduce to the same figures: weights, FLOPs per query-key pair,
cached values per token, a window, and a state of constant size. A multiply-add is two FLOPs. Norms,
activations, rotary embeddings and the softmax are not counted, as in ``FlopCounterMode`` of torch.
The products of a recurrent state are counted, though torch's counter sees them only in part.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Mixer:
    """The attention part of a layer."""

    weights: int  # parameters of the projections
    pair_flops: int = 0  # FLOPs per query-key pair in prefill and training
    decode_pair_flops: int = 0  # FLOPs per query-key pair in decoding; latent attention differs
    cache_numbers: int = 0  # cached values per token
    window: int | None = None  # maximum keys per query, its own included; ``None``: full attention
    chunked: bool = False  # the window is that of fixed chunks of the sequence: it does not slide
    shared_numbers: int = 0  # values per token read from the cache of an earlier layer
    state_numbers: int = 0  # values of the recurrent state, at any sequence length
    float32_numbers: int = 0  # further values of it, in 4 bytes whatever the cache's dtype
    token_flops: int = 0  # FLOPs per token beside projections and pairs
    kept_numbers: int = 0  # values per token kept for the backward pass
    other_parameters: int = 0  # parameters of norms and biases


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward part of a layer."""

    weights: int  # parameters used by every token: the dense part, shared experts, the router
    expert_weights: int = 0  # parameters of one expert
    experts: int = 0
    experts_per_token: int = 0  # experts that a token is routed to
    width: int = 0  # intermediate size, summed over the experts of a token
    token_flops: int = 0  # FLOPs per token beside the weights
    other_parameters: int = 0  # parameters of norms and biases


@dataclass(frozen=True)
class Layer:
    """One layer of a model."""

    mixer: Mixer
    feed_forward: FeedForward


@dataclass(frozen=True)
class ModelShape:
    """A causal language model, reduced to the figures that decide its cost."""

    name: str  # name in tables and errors
    hidden_size: int  # width of the residual stream (d)
    vocabulary_size: int  # entries of the embedding (V)
    layers: tuple[Layer, ...]
    tied_embeddings: bool = False  # the head shares the weights of the embedding
    outer_weights: int = 0  # parameters of projections beside the layers, used by every token
    row_parameters: int = 0  # parameters of further embeddings, of which a token reads a row
    outer_parameters: int | None = None  # norms and biases beside the layers; ``None``: one norm

    @cached_property
    def mixers(self) -> tuple[tuple[Mixer, int], ...]:
        """Distinct mixers, each with its number of layers."""
        return tuple(Counter(layer.mixer for layer in self.layers).items())

    @cached_property
    def feed_forwards(self) -> tuple[tuple[FeedForward, int], ...]:
        """Distinct feed-forward parts, each with its number of layers."""
        return tuple(Counter(layer.feed_forward for layer in self.layers).items())

    @cached_property
    def token_weights(self) -> int:
        """Parameters used by one token in all layers (N), without embedding and head."""
        parts = (layer.mixer.weights + layer.feed_forward.weights for layer in self.layers)
        return sum(parts) + self._routed_weights + self.outer_weights

    @cached_property
    def _routed_weights(self) -> int:
        return sum(
            part.experts_per_token * part.expert_weights * count
            for part, count in self.feed_forwards
        )

    @cached_property
    def head_weights(self) -> int:
        """Parameters of the head: V d."""
        return self.vocabulary_size * self.hidden_size

    @cached_property
    def expert_weights(self) -> int:
        """Parameters of all experts in all layers."""
        return sum(part.experts * part.expert_weights * count for part, count in self.feed_forwards)

    @cached_property
    def parameters(self) -> int:
        """Number of parameters."""
        embeddings = self.head_weights * (1 if self.tied_embeddings else 2)
        dense = sum(
            layer.mixer.weights
            + layer.mixer.other_parameters
            + layer.feed_forward.weights
            + layer.feed_forward.other_parameters
            for layer in self.layers
        )
        outer = self.hidden_size if self.outer_parameters is None else self.outer_parameters
        rest = self.outer_weights + self.row_parameters + outer
        return embeddings + dense + self.expert_weights + rest

    @cached_property
    def active_parameters(self) -> int:
        """Parameters used by one token, the embedding included, as model cards count them."""
        return self.parameters - self.expert_weights + self._routed_weights

    @cached_property
    def unbounded_layers(self) -> int:
        """Number of layers with full attention, whose cache grows with the context."""
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
    kv_projections: int = 2,
    chunked: bool = False,
) -> Mixer:
    """Return multi-head, grouped-query or multi-query attention, full or with a window.

    Scores take 2 H d_h FLOPs per pair, and so does the weighted sum of values. The cache holds
    2 H_kv d_h values per token. The backward pass needs queries, keys, values and the output.
    ``gated`` adds an output gate of the size of the queries (Qwen3-Next). With one of
    ``kv_projections`` the keys, before their norm, are the values; with none, the layer reads the
    cache of an earlier one (Gemma 3n and 4).
    """
    query, cached = heads * head_dim, 2 * kv_heads * head_dim
    projected = query * (3 if gated else 2) + kv_projections * kv_heads * head_dim
    return Mixer(
        weights=hidden_size * projected,
        pair_flops=4 * query,
        decode_pair_flops=4 * query,
        cache_numbers=cached if kv_projections else 0,
        shared_numbers=0 if kv_projections else cached,
        window=window,
        chunked=chunked,
        kept_numbers=(3 if gated else 2) * query + (cached if kv_projections else 0),
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
    """Return multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    The cache holds the latent and one rotary key per token: r + d_rope values. Prefill and training
    expand the latents into keys and values: 2 H (d_nope + d_rope + d_v) FLOPs per pair. Decoding
    absorbs the expansion into query and output, with as many weights, and works in the latent
    space: 2 H (2 r + d_rope) FLOPs per pair.
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
    projections: int,
    key_heads: int,
    value_heads: int,
    key_dim: int,
    value_dim: int,
    kernel: int,
    other_parameters: int = 0,
    float32_state: bool = False,
) -> Mixer:
    """Return linear attention with the gated delta rule (arXiv 2412.06464; Kimi, 2510.26692).

    Each token reads the state with its key, writes the correction and reads with its query: three
    products of 2 d_k d_v FLOPs per value head in the recurrent form. Chunk-parallel kernels do
    somewhat more. A short convolution follows. The state holds d_k d_v values per value head, and
    the last ``kernel - 1`` inputs of the convolution. ``float32_state`` keeps the former in
    float32 whatever the cache's dtype is.
    """
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    return _recurrent(
        weights=projections,
        state=value_heads * key_dim * value_dim,
        products=3,
        channels=channels,
        kernel=kernel,
        kept_numbers=2 * channels + 3 * value_heads * value_dim,
        other_parameters=other_parameters,
        float32_state=float32_state,
    )


def state_space(
    projections: int,
    width: int,
    state_dim: int,
    groups: int,
    kernel: int,
    other_parameters: int = 0,
    float32_state: bool = False,
) -> Mixer:
    """Return a state-space layer (Mamba-2, arXiv 2405.21060).

    Each token is written to the state of ``width`` times ``state_dim`` values and reads it: two
    products. A short convolution goes over inputs, write and read vectors. ``float32_state`` is
    that of ``delta_attention``.
    """
    channels = width + 2 * groups * state_dim
    return _recurrent(
        weights=projections,
        state=width * state_dim,
        products=2,
        channels=channels,
        kernel=kernel,
        kept_numbers=2 * channels + 2 * width,
        other_parameters=other_parameters,
        float32_state=float32_state,
    )


def lightning_attention(
    hidden_size: int, heads: int, head_dim: int, other_parameters: int = 0
) -> Mixer:
    """Return linear attention with a decay and an output gate (MiniMax-01, arXiv 2501.08313).

    Each token is written to the state with its key and reads it with its query: two products of
    2 d_h^2 FLOPs per head.
    """
    width = heads * head_dim
    return _recurrent(
        weights=5 * hidden_size * width,
        state=width * head_dim,
        products=2,
        kept_numbers=5 * width,
        other_parameters=other_parameters,
    )


def short_convolution(hidden_size: int, kernel: int, other_parameters: int = 0) -> Mixer:
    """Return a gated convolution over the last ``kernel`` tokens (LFM2, arXiv 2511.23404)."""
    return _recurrent(
        weights=4 * hidden_size * hidden_size,
        channels=hidden_size,
        kernel=kernel,
        kept_numbers=5 * hidden_size,
        other_parameters=other_parameters,
    )


def _recurrent(
    weights: int,
    kept_numbers: int,
    other_parameters: int,
    state: int = 0,
    products: int = 0,
    channels: int = 0,
    kernel: int = 1,
    float32_state: bool = False,
) -> Mixer:
    """Return a mixer with a state, of which a token computes ``products``, and a convolution."""
    return Mixer(
        weights=weights,
        state_numbers=(0 if float32_state else state) + (kernel - 1) * channels,
        float32_numbers=state if float32_state else 0,
        token_flops=2 * products * state + 2 * kernel * channels,
        kept_numbers=kept_numbers,
        other_parameters=(kernel * channels if channels else 0) + other_parameters,
    )
