"""The objective in float64, written from the formulas and without the trainer.

For a trace tau with tokens t in chunks (x_l, y_l), r_t the ratio of its probability now to that
before the first step on the batch, A its advantage and w_t the truncated correction of the engine's
probabilities (arXiv 2510.06557, equation 3, and section 2.2 of its code):

    loss = -1/N sum_tau 1/l(tau) sum_l sum_t w_t min(r_t A, clip(r_t, 1-eps, 1+eps_high) A)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from delethink.types import Chunk, Trace, TraceStop


@dataclass(frozen=True)
class Settings:
    """Of the objective, under the names of a recipe."""

    group: int
    temperature: float
    epsilon: float = 0.2
    epsilon_high: float = 0.26
    delta: float | None = None
    loss_type: str = "grpo"
    level: str = "token"
    correction: str | None = "truncate"
    cap: float = 2.0
    beta: float = 0.0
    budget: int = 256
    mask_budget: bool = False


def advantages(rewards: Sequence[float | None], group: int) -> list[float | None]:
    """(R - mean) / (std + 1e-4) over the traces of a problem that have a reward."""
    found: list[float | None] = []
    for first in range(0, len(rewards), group):
        known = torch.tensor(
            [r for r in rewards[first : first + group] if r is not None], dtype=torch.float64
        )
        for reward in rewards[first : first + group]:
            if reward is None:
                found.append(None)
            else:
                found.append(((reward - known.mean()) / (known.std() + 1e-4)).item())
    return found


def chunk_logprobs(model: Any, chunk: Chunk, temperature: float) -> torch.Tensor:
    """Log-probs of a chunk's tokens, from one forward pass over it alone."""
    ids = torch.tensor([chunk.prompt_ids + chunk.output_ids])
    logits = model(input_ids=ids).logits[0, len(chunk.prompt_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1)[range(len(chunk.output_ids)), list(chunk.output_ids)]


def trace_logprobs(model: Any, trace: Trace, temperature: float) -> torch.Tensor:
    """Log-probs of all sampled tokens of a trace."""
    chunks = [chunk_logprobs(model, c, temperature) for c in trace.chunks if c.output_ids]
    return torch.cat(chunks) if chunks else torch.zeros(0, dtype=torch.float64)


def step_loss(
    model: Any,
    old: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor],
    traces: Sequence[Trace],
    gains: Sequence[float | None],
    settings: Settings,
) -> torch.Tensor:
    """The loss of an optimizer step over ``traces`` with advantages ``gains``."""
    s = settings
    counted = [
        i
        for i, (trace, gain) in enumerate(zip(traces, gains, strict=True))
        if gain is not None
        and trace.length
        and not (s.mask_budget and trace.stop is TraceStop.BUDGET)
    ]
    tokens = sum(traces[i].length for i in counted)
    by_trace = [[len(c.output_ids) for c in traces[i].chunks if c.output_ids] for i in counted]
    num_chunks = sum(map(len, by_trace))
    total = torch.zeros((), dtype=torch.float64)
    for i, lengths in zip(counted, by_trace, strict=True):
        gain = gains[i]
        assert gain is not None
        terms = trace_terms(model, old[i], reference[i], traces[i], gain, s)
        share = {
            "grpo": 1 / traces[i].length / len(counted),
            "grpo_chunk": torch.cat([torch.full((n,), 1 / n / num_chunks) for n in lengths]),
            "sapo": 1 / traces[i].length / len(counted),
            "dr_grpo": 1 / s.budget / len(counted),
            "dapo": 1 / tokens,
            "cispo": 1 / tokens,
            "luspo": 1 / len(counted),
        }[s.loss_type]
        total = total - (share * terms).sum()
    return total


def trace_terms(
    model: Any,
    old: torch.Tensor,
    reference: torch.Tensor,
    trace: Trace,
    gain: float,
    settings: Settings,
) -> torch.Tensor:
    """What each token of a trace adds to the objective, before it is weighed."""
    s = settings
    now = trace_logprobs(model, trace, s.temperature)
    engine = torch.tensor([v for c in trace.chunks for v in c.logprobs], dtype=torch.float64)
    ratio = (now - old).exp()
    if s.level == "sequence":
        ratio = (now - old).mean().exp().expand_as(now)
    if s.loss_type == "cispo":
        terms = ratio.clamp(max=s.epsilon_high).detach() * gain * now
    elif s.loss_type == "sapo":
        t = 1.0 if gain > 0 else 1.05
        terms = torch.sigmoid(t * (ratio - 1)) * 4 / t * gain
    else:
        free = ratio if s.delta is None else ratio.clamp(max=s.delta)
        held = ratio.clamp(1 - s.epsilon, 1 + s.epsilon_high)
        terms = torch.minimum(free * gain, held * gain)
    if s.correction is not None:
        weight = (old - engine).exp()
        beyond = weight > s.cap
        terms = terms * weight.masked_fill(beyond, s.cap if s.correction == "truncate" else 0.0)
    if s.beta:
        divergence = (reference - now).exp() - (reference - now) - 1
        terms = terms - s.beta * divergence * (ratio if s.level == "token" else 1)
    return terms


def train(
    model: Any,
    traces: Sequence[Trace],
    rewards: Sequence[float | None],
    steps: Sequence[Sequence[int]],
    learning_rate: float,
    settings: Settings,
) -> list[float]:
    """Plain gradient steps on ``model``, each on the traces of these places; their losses."""
    gains = advantages(rewards, settings.group)
    with torch.no_grad():
        old = [trace_logprobs(model, trace, settings.temperature) for trace in traces]
    losses = []
    for places in steps:
        model.zero_grad()
        loss = step_loss(
            model,
            [old[i] for i in places],
            [old[i] for i in places],  # the reference weights are the first ones
            [traces[i] for i in places],
            [gains[i] for i in places],
            settings,
        )
        if loss.requires_grad:
            loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= learning_rate * parameter.grad
        losses.append(loss.item())
    return losses
