"""A step with NaN or infinity is skipped: models that really produce them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import make_qwen2
from tiny_training import GROUP, VOCABULARY, make_config, make_tokenizer
from transformers import PreTrainedTokenizerFast

from delethink.errors import NonFiniteError
from delethink.training.batching import RolloutBatch, ScoredBatch
from delethink.training.grpo import DelethinkTrainer, NonFinite, raise_nonfinite
from delethink.types import Chunk, StopReason, Trace, TraceStop

pytestmark = pytest.mark.integration

POISON = 11
PLAIN, BROKEN = (5, 6, 7, 1), (5, POISON, 6, 1)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def trace(ids: tuple[int, ...], engine_logprob: float = -1.0) -> Trace:
    chunk = Chunk((3, 4), ids, (engine_logprob,) * len(ids), StopReason.EOS)
    return Trace((3, 4), (chunk,), TraceStop.COMPLETED)


def poisoned_model(poison: float) -> Any:
    """Return a model in which the square of one embedding overflows in the first norm.

    With a finite embedding only gradients are NaN. With an infinite one, all log-probs after the
    token are NaN.
    """
    model = make_qwen2(3, scale=2, vocab_size=VOCABULARY, tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = poison
    return model


def healthy(model: Any) -> torch.Tensor:
    """Return all weights but the poisoned embedding, concatenated."""
    with torch.no_grad():
        parts = [
            p[:POISON] if p is model.get_input_embeddings().weight else p
            for p in model.parameters()
        ]
        return torch.cat([part.flatten().clone() for part in parts])


class Run:
    """Three optimizer steps of Adam over given traces and rewards."""

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerFast,
        traces: list[list[Trace]],
        rewards: list[list[float]],
        poison: float = 3e38,
        on_nonfinite: Callable[[NonFinite], None] | None = None,
        **options: Any,
    ) -> None:
        self.found: list[NonFinite] = []
        self.weights: list[torch.Tensor] = []
        self.moments: list[int] = []
        self.sampled: list[ScoredBatch] = []
        batches, batch_rewards = iter(traces), iter(rewards)
        settings: dict[str, Any] = {
            "per_device_train_batch_size": GROUP,
            "max_steps": len(traces),
            "learning_rate": 0.01,
            "weight_decay": 0.1,
            "scale_rewards": "none",
            "logging_nan_inf_filter": False,
        }
        self.trainer = DelethinkTrainer(
            model=poisoned_model(poison),
            processing_class=tokenizer,
            args=make_config(folder, **(settings | options)),
            train_dataset=Dataset.from_list([{"prompt": f"t{i}"} for i in range(len(traces))]),
            reward_funcs=[lambda prompts, **_: next(batch_rewards)],
            run_rollouts=lambda examples: RolloutBatch(examples, next(batches)),
            on_sampled=self._record,
            on_nonfinite=on_nonfinite or self.found.append,
        )

    def train(self) -> Run:
        self.trainer.train()
        self._record(None)
        return self

    def _record(self, sampled: ScoredBatch | None) -> None:
        """Record the weights and the step count of Adam before each step and after the last."""
        model, states = self.trainer.model, list(self.trainer.optimizer.state.values())
        self.weights.append(healthy(model))
        self.moments.append(int(states[0]["step"]) if states else 0)
        self.sampled += [] if sampled is None else [sampled]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.trainer.state.log_history if "loss" in line]


GOOD = [trace(PLAIN), trace((6, 1)), trace((7, 7, 1)), trace((8, 1))]
BAD = [trace(PLAIN), trace(BROKEN), trace((7, 7, 1)), trace((8, 1))]
REWARDS = [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("forward_tokens", [10_000, 6])
@pytest.mark.parametrize("micro_batch", [GROUP, 1])
def test_a_nonfinite_log_prob_leaves_weights_and_moments_unchanged(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, micro_batch: int, forward_tokens: int
) -> None:
    options = {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": GROUP // micro_batch,
        "steps_per_generation": GROUP // micro_batch,
        "forward_tokens": forward_tokens,
    }
    batches = [GOOD, BAD, GOOD]
    run = Run(tmp_path, tokenizer, batches, [REWARDS] * 3, math.inf, **options).train()
    assert run.found == [NonFinite(2, "log-prob", [1])]
    first, second, third, last = run.weights
    assert not torch.equal(first, second)
    assert torch.equal(second, third)
    assert not torch.equal(third, last)
    assert torch.isfinite(last).all()
    assert run.moments == [0, 1, 1, 2]
    assert all(abs(loss) < 1e3 for loss in run.losses)


def test_an_infinite_loss_is_found(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The largest rewards of float32, times the cap of the engine correction."""
    far, unlikely = [3e38, -3e38, 3e38, -3e38], [trace(t.output_ids, -50.0) for t in GOOD]
    run = Run(tmp_path, tokenizer, [unlikely, GOOD], [far, REWARDS]).train()
    assert [(found.step, found.quantity, found.traces) for found in run.found] == [(1, "loss", [])]
    assert torch.equal(run.weights[0], run.weights[1])
    assert run.moments == [0, 0, 1]
    assert torch.isfinite(run.weights[-1]).all()


def test_a_nonfinite_gradient_is_found(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Every log-prob and the loss are finite, but the step would make the weights NaN."""
    run = Run(tmp_path, tokenizer, [BAD, GOOD], [REWARDS] * 2).train()
    assert run.found == [NonFinite(1, "gradient", [])]
    assert torch.equal(run.weights[0], run.weights[1])
    assert run.moments == [0, 0, 1]
    assert torch.isfinite(run.weights[-1]).all()


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_too_large_for_its_norm_is_found(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, max_grad_norm: float
) -> None:
    """The loss is finite; clipping to the norm would silently make this gradient zero."""
    large = [1e30, -1e30, 0.0, 0.0]
    options = {"max_grad_norm": max_grad_norm}
    run = Run(tmp_path, tokenizer, [GOOD, GOOD], [large, REWARDS], **options).train()
    assert [(found.step, found.quantity) for found in run.found] == [(1, "gradient")]
    assert torch.equal(run.weights[0], run.weights[1])
    assert run.moments == [0, 0, 1]


def test_finite_steps_are_taken(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    run = Run(tmp_path, tokenizer, [GOOD, GOOD], [REWARDS] * 2).train()
    assert run.found == []
    assert run.moments == [0, 1, 2]


def test_the_callback_can_stop_the_run_before_any_change(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def stop(found: NonFinite) -> None:
        raise ArithmeticError(found.quantity)

    run = Run(tmp_path, tokenizer, [BAD], [REWARDS], on_nonfinite=stop)
    before = healthy(run.trainer.model)
    with pytest.raises(ArithmeticError, match="gradient"):
        run.trainer.train()
    assert torch.equal(before, healthy(run.trainer.model))


def test_without_a_callback_the_step_is_an_error() -> None:
    with pytest.raises(NonFiniteError, match="step 3: a loss is not finite"):
        raise_nonfinite(NonFinite(3, "loss", []))
