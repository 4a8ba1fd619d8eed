"""The TRL seam against the formula: one optimizer step of plain SGD shows the gradient.

The reference is written from arXiv 2510.06557, equation 3, in float64 and without the trainer.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import make_qwen2
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from delethink.errors import RolloutError
from delethink.training.grpo import DelethinkTrainer, Sampled
from delethink.types import Chunk, StopReason, Trace, TraceStop

pytestmark = pytest.mark.integration

VOCABULARY, GROUP, TEMPERATURE, LEARNING_RATE = 12, 4, 0.7, 0.5


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    own = Tokenizer(WordLevel(vocabulary, unk_token="t2"))
    own.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="t0", eos_token="t1")


def make_model(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = make_qwen2(3, scale=4, vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32)
    return model.to(dtype)


def random_trace(rng: random.Random, query: tuple[int, ...], num_chunks: int) -> Trace:
    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(2, VOCABULARY) for _ in range(n))

    chunks = []
    for i in range(num_chunks):
        prompt = query if i == 0 else query + tokens(rng.randint(1, 6))
        last = i == num_chunks - 1
        output = tokens(rng.randint(1, 7)) + ((1,) if last else ())
        stop = StopReason.EOS if last else StopReason.LENGTH
        chunks.append(Chunk(prompt, output, (-1.0,) * len(output), stop))
    return Trace(query, tuple(chunks), TraceStop.COMPLETED)


def random_batch(seed: int, counts: list[int]) -> tuple[list[Trace], list[float]]:
    rng = random.Random(seed)
    queries = [(5, 6, 7), (8, 9)]
    traces = [random_trace(rng, queries[i // GROUP], n) for i, n in enumerate(counts)]
    rewards = [float(rng.random() < 0.5) for _ in counts]
    rewards[0], rewards[1] = 1.0, 0.0
    return traces, rewards


def config(tmp_path: Path, **options: Any) -> GRPOConfig:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": options.get("gradient_accumulation_steps", 1),
        "num_generations": GROUP,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "temperature": TEMPERATURE,
        "loss_type": "grpo",
        "epsilon_high": 0.26,
        "max_grad_norm": 1e9,
        "optim": "sgd",
        "bf16": False,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "beta": 0.0,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
    }
    return GRPOConfig(output_dir=str(tmp_path), **(settings | options))


def step(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    traces: list[Trace],
    rewards: list[float | None],
    forward_tokens: int = 100_000,
    max_failed_share: float = 0.5,
    **options: Any,
) -> tuple[dict[str, torch.Tensor], DelethinkTrainer, Sampled]:
    """The gradient that one optimizer step applied, by parameter."""
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen: list[Sampled] = []
    trainer = DelethinkTrainer(
        model=model,
        processing_class=tokenizer,
        args=config(tmp_path, **options),
        train_dataset=Dataset.from_list([{"prompt": f"t{i}"} for i in range(len(traces) // GROUP)]),
        reward_funcs=[lambda prompts, **_: rewards],
        play=lambda examples: traces,
        on_sampled=seen.append,
        forward_tokens=forward_tokens,
        max_failed_share=max_failed_share,
    )
    trainer.train()
    gradients = {
        name: (before[name] - p.detach()) / LEARNING_RATE for name, p in model.named_parameters()
    }
    return gradients, trainer, seen[0]


def reference_gradient(traces: list[Trace], rewards: list[float | None]) -> dict[str, torch.Tensor]:
    """Equation 3 on the first step, where the ratio is 1 and the clip is idle."""
    model = make_model()
    scored = torch.tensor([float("nan") if r is None else r for r in rewards], dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for g in range(0, len(traces), GROUP):
        group = scored[g : g + GROUP]
        known = group[~group.isnan()]
        for trace, reward in zip(traces[g : g + GROUP], group, strict=True):
            if reward.isnan():
                continue
            advantage = (reward - known.mean()) / (known.std() + 1e-4)
            for chunk in trace.chunks:
                logprobs = chunk_logprobs(model, chunk)
                ratio = (logprobs - logprobs.detach()).exp()
                total = total - (ratio * advantage).sum() / trace.length / len(traces)
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def chunk_logprobs(model: Any, chunk: Chunk) -> torch.Tensor:
    ids = torch.tensor([chunk.prompt_ids + chunk.output_ids])
    logits = model(input_ids=ids).logits[0, len(chunk.prompt_ids) - 1 : -1] / TEMPERATURE
    return logits.log_softmax(-1)[range(len(chunk.output_ids)), list(chunk.output_ids)]


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    largest = max(g.abs().max().item() for g in expected.values())
    assert largest > 1e-6, "the comparison would hold for any gradient"
    for name, gradient in expected.items():
        # Norms in the model, and rewards in TRL, are float32: the agreement ends there.
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize(
    "counts", [[1] * 8, [3, 1, 5, 2, 4, 1, 1, 6]], ids=["one chunk each", "unequal chunks"]
)
def test_the_gradient_is_the_formulas(tmp_path: Path, tokenizer: Any, counts: list[int]) -> None:
    traces, rewards = random_batch(0, counts)
    gradients, trainer, _ = step(tmp_path, tokenizer, traces, rewards)
    assert_same(gradients, reference_gradient(traces, rewards))
    assert trainer.take_statistics().tokens == sum(trace.length for trace in traces)


def test_micro_batches_and_packing_change_nothing(tmp_path: Path, tokenizer: Any) -> None:
    traces, rewards = random_batch(1, [3, 1, 5, 2, 4, 1, 1, 6])
    whole, _, _ = step(tmp_path, tokenizer, traces, rewards)
    in_parts, _, _ = step(tmp_path, tokenizer, traces, rewards, forward_tokens=20)
    accumulated, trainer, _ = step(
        tmp_path,
        tokenizer,
        traces,
        rewards,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    assert_same(in_parts, whole)
    assert_same(accumulated, whole)
    assert trainer.take_statistics().tokens == sum(trace.length for trace in traces)


def test_one_chunk_is_an_unmodified_grpo_trainer(tmp_path: Path, tokenizer: Any) -> None:
    traces, rewards = random_batch(2, [1] * 8)
    ours, _, _ = step(tmp_path, tokenizer, traces, rewards)
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=config(tmp_path),
        train_dataset=Dataset.from_list([{"prompt": "t1"}, {"prompt": "t2"}]),
        reward_funcs=[lambda prompts, **_: rewards],
        rollout_func=lambda prompts, trainer: {
            "prompt_ids": [list(t.query_ids) for t in traces],
            "completion_ids": [list(t.output_ids) for t in traces],
            "logprobs": [[-1.0] * t.length for t in traces],
        },
    ).train()
    theirs = {n: (before[n] - p.detach()) / LEARNING_RATE for n, p in model.named_parameters()}
    assert_same(ours, theirs)


def test_a_failed_trace_has_no_reward_and_moves_nothing(tmp_path: Path, tokenizer: Any) -> None:
    traces, rewards = random_batch(3, [2, 3, 1, 2, 1, 2, 3, 1])
    scored: list[float | None] = [*rewards]
    failed = Chunk(traces[2].query_ids, (), (), StopReason.ERROR, error="the engine died")
    traces[2], scored[2] = Trace(traces[2].query_ids, (failed,), TraceStop.ERROR), None
    gradients, _, sampled = step(tmp_path, tokenizer, traces, scored)
    assert_same(gradients, reference_gradient(traces, scored))
    assert sampled.rewards[2] == {"<lambda>": None}
    assert sampled.advantages[2] == 0.0


def test_too_many_failures_stop_the_run(tmp_path: Path, tokenizer: Any) -> None:
    traces, rewards = random_batch(4, [1] * 8)
    failed = Chunk((5,), (), (), StopReason.ERROR, error="the engine died")
    traces[:2] = [Trace((5,), (failed,), TraceStop.ERROR)] * 2
    with pytest.raises(RolloutError, match="2 of 8 traces failed.*the engine died"):
        step(tmp_path, tokenizer, traces, rewards, max_failed_share=0.1)


def test_groups_without_signal_move_nothing(tmp_path: Path, tokenizer: Any) -> None:
    traces, _ = random_batch(5, [2] * 8)
    gradients, _, sampled = step(tmp_path, tokenizer, traces, [1.0] * 4 + [0.0] * 4)
    assert sampled.advantages == [0.0] * 8
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())


def test_traces_out_of_budget_can_be_left_out(tmp_path: Path, tokenizer: Any) -> None:
    traces, rewards = random_batch(6, [2] * 8)
    cut = traces[3].chunks[-1]
    spent = Chunk(cut.prompt_ids, cut.output_ids[:-1], cut.logprobs[:-1], StopReason.LENGTH)
    traces[3] = Trace(traces[3].query_ids, (*traces[3].chunks[:-1], spent), TraceStop.BUDGET)
    _, trainer, _ = step(tmp_path, tokenizer, traces, rewards, mask_truncated_completions=True)
    left = sum(trace.length for i, trace in enumerate(traces) if i != 3)
    assert trainer.take_statistics().tokens == left


def test_a_step_of_masked_traces_alone_moves_nothing(tmp_path: Path, tokenizer: Any) -> None:
    traces, rewards = random_batch(8, [2] * 8)
    for i, trace in enumerate(traces):
        cut = trace.chunks[-1]
        spent = Chunk(cut.prompt_ids, cut.output_ids[:-1], cut.logprobs[:-1], StopReason.LENGTH)
        traces[i] = Trace(trace.query_ids, (*trace.chunks[:-1], spent), TraceStop.BUDGET)
    gradients, trainer, _ = step(
        tmp_path,
        tokenizer,
        traces,
        rewards,
        mask_truncated_completions=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    assert trainer.take_statistics().tokens == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())


def test_statistics_weight_tokens_and_not_micro_batches(tmp_path: Path, tokenizer: Any) -> None:
    traces, rewards = random_batch(9, [3, 1, 5, 2, 4, 1, 1, 6])
    whole = step(tmp_path, tokenizer, traces, rewards)[1].take_statistics()
    parts = step(
        tmp_path,
        tokenizer,
        traces,
        rewards,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
    )[1].take_statistics()
    assert parts == pytest.approx(whole, rel=1e-5)


def test_several_optimizer_steps_for_a_batch_use_the_log_probs_of_sampling(
    tmp_path: Path, tokenizer: Any
) -> None:
    """With num_iterations=2 the old log-probs are forwarded too, chunk by chunk."""
    traces, rewards = random_batch(7, [3, 1, 2, 2, 1, 4, 1, 2])
    one, _, _ = step(tmp_path, tokenizer, traces, rewards, num_iterations=1)
    two, _, _ = step(tmp_path, tokenizer, traces, rewards, num_iterations=2)
    assert_same(two, one)
