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
from transformers import PreTrainedTokenizerFast

from delethink.training.batching import RolloutBatch, ScoredBatch
from delethink.training.grpo import DelethinkTrainer, NonFinite
from delethink.training.grpo_config import DelethinkConfig
from delethink.types import Chunk, StopReason, Trace, TraceStop

pytestmark = pytest.mark.integration

VOCABULARY, GROUP, POISON = 12, 4, 11
PLAIN, BROKEN = (5, 6, 7, 1), (5, POISON, 6, 1)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    own = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t2"))
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="t0", eos_token="t1")


def trace(ids: tuple[int, ...], engine_logprob: float = -1.0) -> Trace:
    chunk = Chunk((3, 4), ids, (engine_logprob,) * len(ids), StopReason.EOS)
    return Trace((3, 4), (chunk,), TraceStop.COMPLETED)


def poisoned_model(poison: float) -> Any:
    """The square of the poisonous token's embedding overflows in the first norm.

    Where the embedding itself is finite, log-probs are too, and only gradients are NaN; where it is
    infinite, everything after the token is NaN.
    """
    model = make_qwen2(3, scale=2, vocab_size=VOCABULARY, tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = poison
    return model


def healthy(model: Any) -> torch.Tensor:
    """All weights but the poison, on end."""
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
            "num_generations": GROUP,
            "max_steps": len(traces),
            "learning_rate": 0.01,
            "weight_decay": 0.1,
            "lr_scheduler_type": "constant",
            "scale_rewards": "none",
            "loss_type": "grpo",
            "beta": 0.0,
            "bf16": False,
            "gradient_checkpointing": False,
            "logging_nan_inf_filter": False,
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "use_cpu": True,
        }
        self.trainer = DelethinkTrainer(
            model=poisoned_model(poison),
            processing_class=tokenizer,
            args=DelethinkConfig(output_dir=str(folder), **(settings | options)),
            train_dataset=Dataset.from_list([{"prompt": f"t{i}"} for i in range(len(traces))]),
            reward_funcs=[lambda prompts, **_: next(batch_rewards)],
            run_rollouts=lambda examples: RolloutBatch(examples, next(batches)),
            on_sampled=self._see,
            on_nonfinite=on_nonfinite or self.found.append,
        )

    def train(self) -> Run:
        self.trainer.train()
        self._see(None)
        return self

    def _see(self, sampled: ScoredBatch | None) -> None:
        """Weights and Adam's count before each step, and after the last."""
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
def test_a_log_prob_that_is_none_leaves_weights_and_moments_alone(
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
    """Rewards that float32 just holds, times the bound of the correction for the engine."""
    far, unlikely = [3e38, -3e38, 3e38, -3e38], [trace(t.output_ids, -50.0) for t in GOOD]
    run = Run(tmp_path, tokenizer, [unlikely, GOOD], [far, REWARDS]).train()
    assert [(found.step, found.quantity, found.traces) for found in run.found] == [(1, "loss", [])]
    assert torch.equal(run.weights[0], run.weights[1])
    assert run.moments == [0, 0, 1]
    assert torch.isfinite(run.weights[-1]).all()


def test_a_gradient_that_is_none_is_found(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Every log-prob and the loss are finite, and yet the step would have made NaN of the model."""
    run = Run(tmp_path, tokenizer, [BAD, GOOD], [REWARDS] * 2).train()
    assert run.found == [NonFinite(1, "gradient", [])]
    assert torch.equal(run.weights[0], run.weights[1])
    assert run.moments == [0, 0, 1]
    assert torch.isfinite(run.weights[-1]).all()


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_too_large_for_its_norm_is_found(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, max_grad_norm: float
) -> None:
    """The loss is finite; clipped to its norm, such a gradient would become zero in silence."""
    large = [1e30, -1e30, 0.0, 0.0]
    options = {"max_grad_norm": max_grad_norm}
    run = Run(tmp_path, tokenizer, [GOOD, GOOD], [large, REWARDS], **options).train()
    assert [(found.step, found.quantity) for found in run.found] == [(1, "gradient")]
    assert torch.equal(run.weights[0], run.weights[1])
    assert run.moments == [0, 0, 1]


def test_what_is_finite_is_not_touched(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    run = Run(tmp_path, tokenizer, [GOOD, GOOD], [REWARDS] * 2).train()
    assert run.found == []
    assert run.moments == [0, 1, 2]


def test_whoever_is_told_may_stop_before_anything_changes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def stop(found: NonFinite) -> None:
        raise ArithmeticError(found.quantity)

    run = Run(tmp_path, tokenizer, [BAD], [REWARDS], on_nonfinite=stop)
    before = healthy(run.trainer.model)
    with pytest.raises(ArithmeticError, match="gradient"):
        run.trainer.train()
    assert torch.equal(before, healthy(run.trainer.model))
