"""Losses against their formulas, and the settings that select them."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from delethink.config import TrainingConfig
from delethink.errors import ConfigError
from delethink.training.loss import (
    LOSSES,
    LossSettings,
    StepSize,
    TokenBatch,
    TraceRatio,
    token_losses,
)

STEP = StepSize(traces=4, tokens=50, budget=100, chunks=8)


def make_batch(log_ratio: float, advantage: float, **values: Any) -> TokenBatch:
    """Return a batch of one token with log-prob -1 and the given log-ratio."""
    logprobs = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    return TokenBatch(
        logprobs,
        torch.zeros(1, 1),
        torch.tensor([[advantage]], dtype=torch.float64),
        **({"engine_logprobs": logprobs.detach() - log_ratio} | values),
        old_logprobs=logprobs.detach() - log_ratio,
    )


def loss_and_gradient(batch: TokenBatch, **settings: Any) -> tuple[float, float]:
    loss = token_losses(batch, LossSettings(**settings)).loss.sum()
    loss.backward()
    assert batch.logprobs.grad is not None
    return loss.item(), batch.logprobs.grad.item()


def test_the_recipe_has_exactly_these_loss_types() -> None:
    field = TrainingConfig.model_fields["loss_type"]
    assert set(get_args(field.annotation)) == set(LOSSES)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("loss_type", "gpro", "unknown loss_type 'gpro'. Did you mean 'grpo'"),
        ("importance_sampling_level", "trace", "importance_sampling_level 'trace'"),
        ("vllm_importance_sampling_mode", "sequence_mask", "Did you mean 'token_mask'"),
    ],
)
def test_unknown_names_are_refused(name: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LossSettings(**{name: value})


@pytest.mark.parametrize(
    ("loss_type", "weight"),
    [
        ("grpo", 1 / (4 * 10)),
        ("sapo", 1 / (4 * 10)),
        ("grpo_chunk", 1 / (8 * 5)),
        ("dr_grpo", 1 / (4 * 100)),
        ("dapo", 1 / 50),
        ("cispo", 1 / 50),
        ("luspo", 1 / 4),
    ],
)
def test_weight_of_a_token(loss_type: str, weight: float) -> None:
    assert LOSSES[loss_type].weight(10, 5, STEP) == pytest.approx(weight)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2 * 1.3, 0.0),  # clipped above
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),  # clipped below
        (1.5, -2.0, 3.0, 3.0),
        (5.0, -2.0, 6.0, 0.0),  # dual clip
    ],
)
def test_clipped_loss(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    batch = make_batch(torch.tensor(ratio).double().log().item(), advantage)
    settings = {"epsilon": 0.2, "epsilon_high": 0.3, "delta": 3.0}
    found = loss_and_gradient(batch, **settings)
    assert found == (pytest.approx(loss), pytest.approx(gradient))


def test_without_an_upper_range_the_lower_one_is_used() -> None:
    batch = make_batch(1.0, 1.0)
    assert loss_and_gradient(batch, epsilon=0.1)[0] == pytest.approx(-1.1)


@pytest.mark.parametrize(("mode", "weight"), [("token_truncate", 1.5), ("token_mask", 0.0)])
def test_correction_for_the_engine(mode: str, weight: float) -> None:
    batch = make_batch(0.0, 2.0, engine_logprobs=torch.tensor([[-2.0]]))  # ratio e
    options = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.5}
    assert loss_and_gradient(batch, **options)[0] == pytest.approx(-2 * weight)
    off = {"vllm_importance_sampling_correction": False} | options
    assert token_losses(batch, LossSettings(**off)).correction.item() == 1.0


def test_kl_gradient_is_unbiased_with_the_ratio() -> None:
    """The gradient of ratio * k3 is that of ratio * log(policy / reference)."""
    log_ratio, difference = 0.3, -0.4
    batch = make_batch(log_ratio, 0.0, ref_logprobs=torch.tensor([[-1.0 + difference]]).double())
    ratio = torch.tensor(log_ratio).double().exp().item()
    k3 = torch.tensor(difference).double().exp().item() - difference - 1
    slope = 1 - torch.tensor(difference).double().exp().item()
    loss, gradient = loss_and_gradient(batch, beta=0.5)
    assert loss == pytest.approx(0.5 * ratio * k3)
    assert gradient == pytest.approx(0.5 * ratio * (k3 + slope))
    assert gradient == pytest.approx(0.5 * ratio * -difference)
    batch.logprobs.grad = None
    plain = loss_and_gradient(batch, beta=0.5, use_bias_correction_kl=False)
    assert plain == (pytest.approx(0.5 * k3), pytest.approx(0.5 * slope))


def test_a_ratio_over_the_trace_has_its_value_at_each_token_and_its_gradient_in_their_sum() -> None:
    """d/dtheta exp(mean log-ratio), times the number of tokens."""
    logprobs = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.2, -1.9, -0.9]], dtype=torch.float64)
    mean = (logprobs.detach() - old).mean()
    batch = TokenBatch(
        logprobs,
        torch.zeros(1, 3),
        torch.tensor([[1.0]], dtype=torch.float64),
        old,
        old,
        trace_ratio=TraceRatio(mean.view(1, 1), torch.ones(1, 1, dtype=torch.float64)),
    )
    found = token_losses(batch, LossSettings(epsilon=0.9, importance_sampling_level="sequence"))
    torch.testing.assert_close(found.loss.detach(), -mean.exp().expand(1, 3))
    found.loss.sum().backward()
    direct = logprobs.detach().clone().requires_grad_()
    (-3 * (direct - old).mean().exp()).backward()
    torch.testing.assert_close(logprobs.grad, direct.grad)
