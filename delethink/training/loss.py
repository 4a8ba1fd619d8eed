"""Policy-gradient losses as pure functions of per-token tensors.

The loss of an optimizer step is one sum over all sampled tokens t of its traces:

    L = sum_t  w_t * l_t

``token_losses`` returns the l_t of a forward batch, ``Loss.weight`` the w_t of a trace. For the
default ``grpo``, l_t is the clipped surrogate and w_t = 1 / (N * length): each trace is divided by
its own number of sampled tokens, and the N traces are averaged (arXiv 2510.06557, equation 3).
A sum has no order, so the result depends neither on the number of chunks nor on how traces are
split into micro-batches and over ranks.

To add a loss type, write its per-token loss and add a row to ``LOSSES``. Settings and loss types
have TRL's names and TRL's meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from delethink.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class LossSettings:
    """Settings of the loss, with the names of TRL's ``GRPOConfig``.

    Raises:
        ConfigError: A name is unknown.
    """

    loss_type: str = "grpo"  # key of LOSSES
    # "token", or "sequence" for one probability ratio per trace (GSPO, arXiv 2507.18071)
    importance_sampling_level: str = "token"
    epsilon: float = 0.2  # lower clip range of the ratio
    epsilon_high: float | None = None  # upper clip range; None: epsilon
    delta: float | None = None  # bound of the ratio for negative advantages (dual clip); None: none
    beta: float = 0.0  # weight of the KL divergence from the reference weights
    use_bias_correction_kl: bool = True  # multiply it by the ratio: its gradient is unbiased
    sapo_temperature_pos: float = 1.0  # of the sapo gate, for positive advantages
    sapo_temperature_neg: float = 1.05  # for the other advantages
    # Multiply each term by the ratio of the trainer's to the engine's probability of the token.
    vllm_importance_sampling_correction: bool = True
    # "token_truncate" caps this ratio, "token_mask" drops the tokens beyond the cap.
    vllm_importance_sampling_mode: str = "token_truncate"
    vllm_importance_sampling_clip_max: float = 2.0  # the cap

    def __post_init__(self) -> None:
        allowed = {
            "loss_type": list(LOSSES),
            "importance_sampling_level": ["token", "sequence"],
            "vllm_importance_sampling_mode": ["token_truncate", "token_mask"],
        }
        for name, values in allowed.items():
            if (value := getattr(self, name)) not in values:
                raise ConfigError(f"unknown {name} {value!r}.{did_you_mean(str(value), values)}")

    @property
    def clip_high(self) -> float:
        """Upper clip range of the ratio."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @classmethod
    def from_config(cls, config: Any) -> LossSettings:
        """Read the settings from a configuration with attributes of the same names."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


class TraceRatio(NamedTuple):
    """Means over all tokens of a trace, for ratios at the sequence level: [K, 1] each."""

    log_ratio: torch.Tensor
    correction: torch.Tensor


class TokenBatch(NamedTuple):
    """Per-token tensors of K chunks, [K, T] unless noted; columns without a token are ignored."""

    logprobs: torch.Tensor  # under the current weights, with gradient
    entropies: torch.Tensor  # under the current weights, with gradient
    advantages: torch.Tensor  # [K, 1], of the traces
    engine_logprobs: torch.Tensor  # when the tokens were sampled
    old_logprobs: torch.Tensor | None = None  # before the first step on the batch; None: the same
    ref_logprobs: torch.Tensor | None = None  # under the reference weights; None: no KL term
    trace_ratio: TraceRatio | None = None  # at the sequence level


class TokenLosses(NamedTuple):
    """Loss of each token, and detached intermediate values for metrics: [K, T] each."""

    loss: torch.Tensor  # with gradient
    ratio: torch.Tensor  # current over old probability
    correction: torch.Tensor  # weight for the probability in the engine
    clipped: torch.Tensor  # bool: beyond the clip range, on the side of the advantage
    kl: torch.Tensor | None


class StepSize(NamedTuple):
    """Normalizers of an optimizer step, over all ranks; of the traces in the loss alone."""

    traces: int  # number of traces (N)
    tokens: int  # sampled tokens of these traces
    budget: int  # maximum sampled tokens of one trace (n)
    chunks: int  # number of chunks with sampled tokens


def token_losses(batch: TokenBatch, settings: LossSettings) -> TokenLosses:
    """Return the loss of each token, before its weight."""
    current = batch.logprobs.detach()
    old = current if batch.old_logprobs is None else batch.old_logprobs
    correction = engine_correction(old - batch.engine_logprobs, settings)
    if batch.trace_ratio is not None:
        # Each token has the value of the trace and its own gradient: their sum over the tokens is
        # the gradient of the trace's ratio.
        old = current - batch.trace_ratio.log_ratio
        correction = batch.trace_ratio.correction.expand_as(current)
    ratio = (batch.logprobs - old).exp()

    loss = LOSSES[settings.loss_type].token_loss(ratio, batch, settings) * correction
    kl = None
    if batch.ref_logprobs is not None:
        difference = batch.ref_logprobs - batch.logprobs
        kl = difference.exp() - difference - 1  # the k3 estimate of KL(policy, reference)
        loss = loss + settings.beta * (kl * ratio if settings.use_bias_correction_kl else kl)
        kl = kl.detach()
    ratio = ratio.detach()
    below, above = ratio < 1 - settings.epsilon, ratio > 1 + settings.clip_high
    clipped = (below & (batch.advantages < 0)) | (above & (batch.advantages > 0))
    return TokenLosses(loss, ratio, correction, clipped, kl)


def engine_correction(log_ratio: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    """Return the importance weight of each token from its log-probs in trainer minus engine."""
    ratio, cap = log_ratio.exp(), settings.vllm_importance_sampling_clip_max
    if not settings.vllm_importance_sampling_correction:
        return torch.ones_like(ratio)
    if settings.vllm_importance_sampling_mode == "token_mask":
        return ratio.where(ratio <= cap, torch.zeros_like(ratio))
    return ratio.clamp(max=cap)


def clipped_loss(ratio: torch.Tensor, batch: TokenBatch, settings: LossSettings) -> torch.Tensor:
    """Return the clipped surrogate of PPO, with the dual clip of arXiv 2505.07291 if set."""
    clipped = ratio.clamp(1 - settings.epsilon, 1 + settings.clip_high)
    if settings.delta is not None:
        ratio = ratio.clamp(max=settings.delta)
    return -torch.min(ratio * batch.advantages, clipped * batch.advantages)


def cispo_loss(ratio: torch.Tensor, batch: TokenBatch, settings: LossSettings) -> torch.Tensor:
    """Return log-probs weighted by the capped ratio without gradient (CISPO, arXiv 2506.13585)."""
    return -ratio.clamp(max=settings.clip_high).detach() * batch.advantages * batch.logprobs


def sapo_loss(ratio: torch.Tensor, batch: TokenBatch, settings: LossSettings) -> torch.Tensor:
    """Return the ratio behind a sigmoid gate instead of a clip (SAPO, arXiv 2511.20347)."""
    positive, negative = settings.sapo_temperature_pos, settings.sapo_temperature_neg
    advantages = batch.advantages
    temperature = torch.full_like(advantages, negative).masked_fill(advantages > 0, positive)
    return -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages


class Loss(NamedTuple):
    """Per-token loss, and weight of each sampled token of a trace in its optimizer step."""

    token_loss: Callable[[torch.Tensor, TokenBatch, LossSettings], torch.Tensor]
    # of the sampled tokens of the trace and of the chunk, and the step
    weight: Callable[[int, int, StepSize], float]


LOSSES = {
    # Divide each trace by its own length, then average the traces.
    "grpo": Loss(clipped_loss, lambda length, chunk, step: 1 / (step.traces * length)),
    "sapo": Loss(sapo_loss, lambda length, chunk, step: 1 / (step.traces * length)),
    # Divide each chunk by its own length, then average the chunks: a trace counts by its chunks.
    "grpo_chunk": Loss(clipped_loss, lambda length, chunk, step: 1 / (step.chunks * chunk)),
    # Divide every trace by the budget, then average the traces.
    "dr_grpo": Loss(clipped_loss, lambda length, chunk, step: 1 / (step.traces * step.budget)),
    # Average the sums of the traces, so that a trace counts in proportion to its length.
    "luspo": Loss(clipped_loss, lambda length, chunk, step: 1 / step.traces),
    # Average all tokens of the step.
    "dapo": Loss(clipped_loss, lambda length, chunk, step: 1 / step.tokens),
    "cispo": Loss(cispo_loss, lambda length, chunk, step: 1 / step.tokens),
}
