"""The trainer against the formula in float64, by the change of every parameter under plain SGD.

The formula is in ``reference_objective``. Two parts are replaced, because they compute in float32
for any model and would hide errors below 1e-7: the norms of the model are torch's own, and TRL's
fused head is a plain log-softmax. A further test compares the fused head with the plain one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_objective as reference
import torch
from datasets import Dataset
from reference_objective import Settings
from tiny_models import make_qwen2
from tiny_training import GROUP, VOCABULARY, make_config, make_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from delethink.errors import ConfigError, RolloutError
from delethink.training import grpo
from delethink.training.batching import RolloutBatch, ScoredBatch
from delethink.training.grpo import DelethinkTrainer, GRPOTrainer
from delethink.training.grpo_config import DelethinkConfig
from delethink.training.loss import LOSSES, Loss, TokenBatch
from delethink.training.weights import merged_state_dict
from delethink.types import Chunk, StopReason, Trace, TraceStop

pytestmark = pytest.mark.integration

TEMPERATURE, LEARNING_RATE, BUDGET = 0.7, 0.5, 256
UNEQUAL = [3, 1, 5, 2, 4, 1, 1, 6]
SETTINGS = Settings(group=GROUP, temperature=TEMPERATURE, budget=BUDGET)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


class PlainHead:
    """TRL's fused head, in the precision of the model."""

    @staticmethod
    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        *rest: Any,
    ) -> tuple[Any, ...]:
        logits = (hidden @ weight.T if bias is None else hidden @ weight.T + bias) / temperature
        logprobs = logits.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy, None, None, None


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", PlainHead)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # TRL divides numbers of traces in it
    yield
    torch.set_default_dtype(before)


def make_model() -> PreTrainedModel:
    model = make_qwen2(3, scale=4, vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Qwen2RMSNorm):
                norm = torch.nn.RMSNorm(child.weight.shape, child.variance_epsilon)
                setattr(module, name, norm)
    return model.double()


def random_trace(
    rng: random.Random, query: tuple[int, ...], num_chunks: int, ends: bool = True
) -> Trace:
    """Return chunks of a few tokens, with engine log-probs that differ from the model's."""

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(2, VOCABULARY) for _ in range(n))

    chunks = []
    for i in range(num_chunks):
        prompt = query if i == 0 else query + tokens(rng.randint(1, 6))
        last = ends and i == num_chunks - 1
        output = tokens(rng.randint(1, 7)) + ((1,) if last else ())
        logprobs = tuple(float(np.float32(rng.uniform(-6, -0.5))) for _ in output)
        stop = StopReason.EOS if last else StopReason.LENGTH
        chunks.append(Chunk(prompt, output, logprobs, stop))
    return Trace(query, tuple(chunks), TraceStop.COMPLETED if ends else TraceStop.BUDGET)


def random_batch(seed: int, counts: list[int]) -> tuple[list[Trace], list[float | None]]:
    rng = random.Random(seed)  # rewards and log-probs are numbers that float32 holds exactly
    queries = [(5, 6, 7), (8, 9)]
    traces = [random_trace(rng, queries[i // GROUP % 2], n) for i, n in enumerate(counts)]
    rewards: list[float | None] = [rng.choice([0.0, 1.0, 0.25]) for _ in counts]
    rewards[0], rewards[1] = 1.0, 0.0
    return traces, rewards


def out_of_budget(trace: Trace) -> Trace:
    cut = trace.chunks[-1]
    spent = Chunk(cut.prompt_ids, cut.output_ids[:-1], cut.logprobs[:-1], StopReason.LENGTH)
    return Trace(trace.query_ids, (*trace.chunks[:-1], spent), TraceStop.BUDGET)


def config(folder: Path, **options: Any) -> DelethinkConfig:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "steps_per_generation": options.get("gradient_accumulation_steps", 1),
        "learning_rate": LEARNING_RATE,
        "max_steps": 1,
        "temperature": TEMPERATURE,
        "max_completion_length": BUDGET,
        "epsilon_high": 0.26,
        "max_grad_norm": 1e9,
        "optim": "sgd",
        "max_failed_share": 0.5,
    }
    return make_config(folder, **(settings | options))


class Spy(DelethinkTrainer):
    """Record the traces of each micro-batch, and the sampled batches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.micro_batches: list[list[int]] = []
        self.sampled: list[ScoredBatch] = []
        super().__init__(*args, on_sampled=self.sampled.append, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.micro_batches.append([t.index for t in inputs.traces])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def steps(self) -> list[list[int]]:
        n = self.args.gradient_accumulation_steps
        parts = self.micro_batches
        return [list(chain(*parts[i : i + n])) for i in range(0, len(parts), n)]


def train(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    traces: list[Trace],
    rewards: list[Any],
    model: PreTrainedModel | None = None,
    peft_config: Any = None,
    trainer_class: type[Spy] = Spy,
    **options: Any,
) -> Spy:
    trainer = trainer_class(
        model=make_model() if model is None else model,
        processing_class=tokenizer,
        args=config(folder, **options),
        train_dataset=Dataset.from_list([{"prompt": f"t{i}"} for i in range(len(traces) // GROUP)]),
        reward_funcs=[lambda prompts, **_: rewards],
        run_rollouts=lambda examples: RolloutBatch(examples, traces),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def assert_as_the_formula(
    trainer: Spy,
    traces: list[Trace],
    rewards: list[float | None],
    settings: Settings = SETTINGS,
) -> None:
    """Compare every parameter after the same steps, to 1e-9 of the largest change."""
    model, first = make_model(), dict(make_model().named_parameters())
    losses = reference.train(model, traces, rewards, trainer.steps(), LEARNING_RATE, settings)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-6, abs=1e-6)  # logged with float32
    moved = {name: p - first[name] for name, p in model.named_parameters()}
    largest = max(change.abs().max().item() for change in moved.values())
    assert largest > 1e-3, "the comparison would hold for any gradient"
    trained = dict(trainer.model.named_parameters())
    for name, change in moved.items():
        actual = trained[name] - first[name]
        assert (actual - change).abs().max().item() <= 1e-9 * largest, name


def gradient(trainer: Spy) -> dict[str, torch.Tensor]:
    first = dict(make_model().named_parameters())
    return {n: (first[n] - p.detach()) for n, p in trainer.model.named_parameters()}


def assert_same(actual: Spy, expected: Spy, tolerance: float = 1e-9) -> None:
    theirs = gradient(expected)
    largest = max(change.abs().max().item() for change in theirs.values())
    assert largest > 1e-3, "the comparison would hold for any gradient"
    for name, change in gradient(actual).items():
        assert (change - theirs[name]).abs().max().item() <= tolerance * largest, name


# -- the formula -------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("counts", "seed"),
    [([1] * 8, 0), ([4] * 8, 1), (UNEQUAL, 2), ([1, 12, 1, 1, 2, 1, 9, 1], 3)],
    ids=["one chunk each", "many chunks", "unequal", "very unequal"],
)
def test_loss_and_gradient_equal_the_formula(
    tmp_path: Path, tokenizer: Any, counts: list[int], seed: int
) -> None:
    traces, rewards = random_batch(seed, counts)
    trainer = train(tmp_path, tokenizer, traces, rewards)
    assert_as_the_formula(trainer, traces, rewards)
    assert trainer.pop_statistics().total["trained_tokens"] == sum(trace.length for trace in traces)


@pytest.mark.usefixtures("in_float64")
def test_eos_on_a_boundary(tmp_path: Path, tokenizer: Any) -> None:
    """EOS is the last token of a full chunk, or the only token of a chunk."""
    traces, rewards = random_batch(4, UNEQUAL)
    full = Chunk((5, 6, 7), (3, 4, 9, 2, 8, 7, 1), (-1.0,) * 7, StopReason.EOS)
    alone = Chunk((5, 6, 7, 2), (1,), (-0.5,), StopReason.EOS)
    traces[1] = replace(traces[1], chunks=(full,))
    traces[2] = replace(traces[2], chunks=(*traces[2].chunks[:-1], alone))
    assert_as_the_formula(train(tmp_path, tokenizer, traces, rewards), traces, rewards)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"loss_type": "grpo_chunk"}, {"loss_type": "grpo_chunk"}),
        ({"loss_type": "dr_grpo"}, {"loss_type": "dr_grpo"}),
        ({"loss_type": "dapo"}, {"loss_type": "dapo"}),
        ({"loss_type": "cispo"}, {"loss_type": "cispo"}),
        ({"loss_type": "sapo"}, {"loss_type": "sapo"}),
        ({"importance_sampling_level": "sequence"}, {"level": "sequence"}),
        (
            {"loss_type": "luspo", "importance_sampling_level": "sequence"},
            {"loss_type": "luspo", "level": "sequence"},
        ),
        ({"vllm_importance_sampling_correction": False}, {"correction": None}),
        (
            {
                "vllm_importance_sampling_mode": "token_mask",
                "vllm_importance_sampling_clip_max": 1.5,
            },
            {"correction": "mask", "cap": 1.5},
        ),
        ({"vllm_importance_sampling_clip_max": 1.1}, {"cap": 1.1}),
    ],
    ids=lambda value: "-".join(f"{v}" for v in value.values()),
)
def test_every_objective_over_several_steps_on_a_batch(
    tmp_path: Path, tokenizer: Any, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """Three passes over two optimizer steps: ratios differ from 1 after the first pass."""
    traces, rewards = random_batch(7, UNEQUAL)
    trainer = train(
        tmp_path,
        tokenizer,
        traces,
        rewards,
        **({"forward_tokens": 24} | ours),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        num_iterations=3,
        max_steps=6,
    )
    assert_as_the_formula(trainer, traces, rewards, replace(SETTINGS, **theirs))


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("delta", [None, 1.3])
def test_ratios_are_clipped_on_both_sides_with_and_without_dual_clip(
    tmp_path: Path, tokenizer: Any, delta: float | None
) -> None:
    traces, rewards = random_batch(8, UNEQUAL)
    options = {"num_iterations": 3, "max_steps": 3, "delta": delta}
    trainer = train(tmp_path, tokenizer, traces, rewards, **options)
    assert_as_the_formula(trainer, traces, rewards, replace(SETTINGS, delta=delta))
    assert 0.1 < trainer.pop_statistics().total["clip_fraction"] < 0.9


@pytest.mark.usefixtures("in_float64")
def test_divergence_from_the_first_weights(tmp_path: Path, tokenizer: Any) -> None:
    make_model().save_pretrained(tmp_path / "first")
    traces, rewards = random_batch(9, UNEQUAL)
    model = make_model()
    model.config._name_or_path = model.name_or_path = str(tmp_path / "first")
    options = {"num_iterations": 2, "max_steps": 2, "beta": 0.3}
    trainer = train(tmp_path, tokenizer, traces, rewards, model=model, **options)
    # TRL loads the reference from disk, with norms that are float32.
    model, first = make_model(), gradient(trainer)
    settings = replace(SETTINGS, beta=0.3)
    reference.train(model, traces, rewards, trainer.steps(), LEARNING_RATE, settings)
    for name, parameter in model.named_parameters():
        moved = dict(make_model().named_parameters())[name] - parameter
        torch.testing.assert_close(first[name], moved, rtol=1e-5, atol=1e-6)
    assert trainer.pop_statistics().total["kl"] > 0


# -- invariances ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("forward_tokens", "options"),
    [
        (1, {}),
        (20, {}),
        (40, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        (100_000, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
        (25, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}),
    ],
)
def test_micro_batches_and_packing_change_nothing(
    tmp_path: Path, tokenizer: Any, forward_tokens: int, options: dict[str, int]
) -> None:
    traces, rewards = random_batch(1, UNEQUAL)
    whole = train(tmp_path, tokenizer, traces, rewards)
    parts = train(
        tmp_path,
        tokenizer,
        traces,
        rewards,
        forward_tokens=forward_tokens,
        **options,
    )
    assert_same(parts, whole)
    assert parts.pop_statistics().total == pytest.approx(whole.pop_statistics().total)


@pytest.mark.usefixtures("in_float64")
def test_the_order_of_traces_changes_nothing(tmp_path: Path, tokenizer: Any) -> None:
    traces, rewards = random_batch(2, UNEQUAL)
    order = [6, 4, 7, 5, 2, 0, 3, 1]  # groups stay together
    one = train(tmp_path, tokenizer, traces, rewards)
    other = train(tmp_path, tokenizer, [traces[i] for i in order], [rewards[i] for i in order])
    assert_same(other, one)


@pytest.mark.usefixtures("in_float64")
def test_a_long_chain_may_be_cut_where_everything_is_carried(
    tmp_path: Path, tokenizer: Any
) -> None:
    traces, rewards = random_batch(3, [1] * 8)
    traces = [random_trace(random.Random(i), t.query_ids, 1) for i, t in enumerate(traces)]
    cut = [cut_with_full_carryover(trace) for trace in traces]
    assert {len(trace.chunks) for trace in cut} > {1, 2}
    whole = train(tmp_path, tokenizer, traces, rewards)
    pieces = train(tmp_path, tokenizer, cut, rewards)
    assert_same(pieces, whole)


def cut_with_full_carryover(trace: Trace) -> Trace:
    (chunk,) = trace.chunks
    chunks = []
    for start in range(0, len(chunk.output_ids), 3):
        chunks.append(
            Chunk(
                chunk.prompt_ids + chunk.output_ids[:start],
                chunk.output_ids[start : start + 3],
                chunk.logprobs[start : start + 3],
                StopReason.LENGTH,
            )
        )
    chunks[-1] = replace(chunks[-1], stop=StopReason.EOS)
    return replace(trace, chunks=tuple(chunks))


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo", "sapo"])
def test_one_chunk_is_an_unmodified_grpo_trainer(
    tmp_path: Path, tokenizer: Any, loss_type: Any
) -> None:
    """The same data through TRL's own trainer and head, with several steps on a batch."""
    traces, rewards = random_batch(2, [1] * 8)
    options = {
        "num_iterations": 2,
        "max_steps": 2,
        "delta": 1.5,
        "loss_type": loss_type,
        "vllm_importance_sampling_correction": False,
    }
    ours = train(tmp_path, tokenizer, traces, rewards, **options)
    theirs = GRPOTrainer(
        model=make_model(),
        processing_class=tokenizer,
        args=config(tmp_path, **options),
        train_dataset=Dataset.from_list([{"prompt": "t1"}, {"prompt": "t2"}]),
        reward_funcs=[lambda prompts, **_: rewards],
        rollout_func=lambda prompts, trainer: {
            "prompt_ids": [list(t.query_ids) for t in traces],
            "completion_ids": [list(t.output_ids) for t in traces],
            "logprobs": [[-1.0] * t.length for t in traces],
        },
    )
    theirs.train()
    assert_same(ours, theirs, tolerance=1e-5)  # rewards, and the fused head, are float32 in TRL
    losses = [
        [entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (ours, theirs)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-6)


def test_the_fused_head_is_a_plain_one(tmp_path: Path, tokenizer: Any) -> None:
    traces, rewards = random_batch(4, UNEQUAL)
    trainer = train(tmp_path, tokenizer, traces, rewards)
    model, first = make_model(), make_model()
    reference.train(model, traces, rewards, trainer.steps(), LEARNING_RATE, SETTINGS)
    start = dict(first.named_parameters())
    expected = {n: start[n] - p for n, p in model.named_parameters()}
    largest = max(change.abs().max().item() for change in expected.values())
    for name, change in gradient(trainer).items():
        assert (change - expected[name]).abs().max().item() < 1e-5 * largest


def test_entropies_carry_their_gradient(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entropy bonus is a line of ``token_losses`` (CONTRIBUTING.md)."""
    bonus = Loss(lambda ratio, batch, settings: -batch.entropies, LOSSES["grpo"].weight)
    monkeypatch.setitem(LOSSES, "grpo", bonus)
    traces, rewards = random_batch(4, UNEQUAL)
    trainer = train(tmp_path, tokenizer, traces, rewards, vllm_importance_sampling_correction=False)
    model = make_model()
    loss = torch.zeros((), dtype=torch.float64)
    for trace in traces:
        for chunk in trace.chunks:
            ids = torch.tensor([list(chunk.prompt_ids) + list(chunk.output_ids)])
            logits = model(ids).logits[0, len(chunk.prompt_ids) - 1 : -1] / TEMPERATURE
            logprobs = logits.log_softmax(-1)
            entropies = -(logprobs.exp() * logprobs).sum(-1)
            loss = loss - entropies.sum() / (len(traces) * trace.length)
    loss.backward()
    expected = {n: LEARNING_RATE * p.grad for n, p in model.named_parameters()}
    largest = max(change.abs().max().item() for change in expected.values())
    assert largest > 0
    for name, change in gradient(trainer).items():
        assert (change - expected[name]).abs().max().item() < 1e-5 * largest


# -- traces outside the loss --------------------------------------------------------------------


@pytest.mark.usefixtures("in_float64")
def test_a_failed_trace_moves_nothing_and_does_not_count(tmp_path: Path, tokenizer: Any) -> None:
    traces, rewards = random_batch(3, [2, 3, 1, 2, 1, 2, 3, 1])
    failed = Chunk(traces[2].query_ids, (), (), StopReason.ERROR, error="the engine died")
    traces[2], rewards[2] = Trace(traces[2].query_ids, (failed,), TraceStop.ERROR), None
    trainer = train(tmp_path, tokenizer, traces, rewards)
    assert_as_the_formula(trainer, traces, rewards)
    (sampled,) = trainer.sampled
    assert sampled.rewards[2] == {"<lambda>": None}
    assert sampled.advantages[2] == 0.0
    assert sampled.in_loss == [True, True, False] + [True] * 5


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("options", [{}, {"num_iterations": 2, "max_steps": 2}])
def test_masked_traces_leave_numerator_and_denominator(
    tmp_path: Path, tokenizer: Any, options: dict[str, int]
) -> None:
    traces, rewards = random_batch(6, [2] * 8)
    traces[3], traces[4] = out_of_budget(traces[3]), out_of_budget(traces[4])
    trainer = train(tmp_path, tokenizer, traces, rewards, mask_out_of_budget=True, **options)
    assert_as_the_formula(trainer, traces, rewards, replace(SETTINGS, mask_budget=True))
    left = sum(trace.length for i, trace in enumerate(traces) if i not in (3, 4))
    assert trainer.pop_statistics().total["trained_tokens"] == left * options.get(
        "num_iterations", 1
    )


def test_a_step_of_masked_traces_alone_moves_nothing(tmp_path: Path, tokenizer: Any) -> None:
    traces, rewards = random_batch(8, [2] * 8)
    trainer = train(
        tmp_path,
        tokenizer,
        [out_of_budget(trace) for trace in traces],
        rewards,
        mask_out_of_budget=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    assert trainer.pop_statistics().total["trained_tokens"] == 0
    assert all(change.abs().max() == 0 for change in gradient(trainer).values())


@pytest.mark.usefixtures("in_float64")
def test_a_group_of_equal_rewards_moves_nothing(tmp_path: Path, tokenizer: Any) -> None:
    traces, rewards = random_batch(5, UNEQUAL)
    equal: list[float | None] = [*rewards[:4], 1.0, 1.0, 1.0, 1.0]
    trainer = train(tmp_path, tokenizer, traces, equal)
    assert trainer.sampled[0].advantages[4:] == [0.0] * 4
    assert_as_the_formula(trainer, traces, equal)
    alone = train(tmp_path, tokenizer, traces, [1.0] * 4 + [0.0] * 4)
    assert all(change.abs().max() == 0 for change in gradient(alone).values())


def test_too_many_failures_stop_the_run(tmp_path: Path, tokenizer: Any) -> None:
    traces, rewards = random_batch(4, [1] * 8)
    failed = Chunk((5,), (), (), StopReason.ERROR, error="the engine died")
    traces[:2] = [Trace((5,), (failed,), TraceStop.ERROR)] * 2
    with pytest.raises(RolloutError, match="2 of 8 traces failed.*the engine died"):
        train(tmp_path, tokenizer, traces, rewards, max_failed_share=0.1)


# -- checks and statistics ---------------------------------------------------------------------


def test_a_dropped_trace_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    class Repeating(Spy):
        def _prepare_inputs(self, generation_batch: Any) -> Any:
            inputs = super()._prepare_inputs(generation_batch)
            inputs.traces[1] = inputs.traces[0]
            return inputs

    traces, rewards = random_batch(1, [1] * 8)
    with pytest.raises(RuntimeError, match=r"trace 0 .* times|tokens of trace 0 are in the loss"):
        train(tmp_path, tokenizer, traces, rewards, trainer_class=Repeating)


@pytest.mark.usefixtures("in_float64")
def test_statistics_by_index_of_the_chunk(tmp_path: Path, tokenizer: Any) -> None:
    traces, rewards = random_batch(9, UNEQUAL)
    seen = train(tmp_path, tokenizer, traces, rewards).pop_statistics()
    model = make_model()
    assert len(seen.by_chunk) == max(UNEQUAL)
    for place, means in enumerate(seen.by_chunk):
        chunks = [t.chunks[place] for t in traces if len(t.chunks) > place]
        with torch.no_grad():
            now = [reference.chunk_logprobs(model, chunk, TEMPERATURE) for chunk in chunks]
        engine = [torch.tensor(chunk.logprobs, dtype=torch.float64) for chunk in chunks]
        off = torch.cat(now) - torch.cat(engine)
        assert means["trained_tokens"] == len(off)
        assert means["logprob_difference"] == pytest.approx(off.abs().mean().item())
        assert means["logprob_difference_max"] == pytest.approx(off.abs().max().item())
        assert means["logprob_outside_share"] == pytest.approx(
            ((off.exp() - 1).abs() > 0.1).double().mean().item()
        )
        assert means["importance_correction"] == pytest.approx(
            off.exp().clamp(max=2.0).mean().item()
        )
        assert (means["importance_ratio"], means["clip_fraction"]) == (1.0, 0.0)
        assert means["entropy"] > 0
    assert seen.total["trained_tokens"] == sum(means["trained_tokens"] for means in seen.by_chunk)


# -- precision and adapters --------------------------------------------------------------------


def test_bfloat16_computes_log_probs_in_float32(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()

    def record(tokens: TokenBatch, *args: Any) -> Any:
        seen.add(tokens.logprobs.dtype)
        return token_losses(tokens, *args)

    token_losses = grpo.token_losses
    monkeypatch.setattr(grpo, "token_losses", record)
    traces, rewards = random_batch(4, UNEQUAL)
    small = make_qwen2(3, scale=4, vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32)
    trainer = train(tmp_path, tokenizer, traces, rewards, model=small, bf16=True)
    assert seen == {torch.float32}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    exact = {n: c.float() for n, c in gradient(train(tmp_path, tokenizer, traces, rewards)).items()}
    rounded = gradient(trainer)
    flat = [torch.cat([g[name].float().flatten() for name in exact]) for g in (exact, rounded)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.99
    assert not torch.equal(*flat)


def test_adapters_alone_are_trained_and_their_gradient_is_the_formulas(
    tmp_path: Path, tokenizer: Any
) -> None:
    peft = pytest.importorskip("peft")
    traces, rewards = random_batch(4, UNEQUAL)
    settings = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    trainer = train(tmp_path, tokenizer, traces, rewards, peft_config=peft.LoraConfig(**settings))
    adapted = dict(trainer.model.named_parameters())
    first = make_model().state_dict()
    for name, parameter in trainer.model.get_base_model().named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, first[name.replace(".base_layer", "")])
    moved = [name for name in adapted if "lora_B" in name and adapted[name].abs().max() > 0]
    assert len(moved) == sum("lora_B" in name for name in adapted)


def test_adapters_are_merged_under_the_names_of_the_checkpoint() -> None:
    peft = pytest.importorskip("peft")
    model = make_model()
    names = set(model.state_dict())
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = merged_state_dict(model)
    assert set(weights) == names
    plain = make_model()
    plain.load_state_dict(weights)
    ids = torch.tensor([[3, 5, 7, 2, 9]])
    torch.testing.assert_close(plain(ids).logits, adapted(ids).logits)
    assert not torch.allclose(plain(ids).logits, make_model()(ids).logits)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# -- randomness --------------------------------------------------------------------------------


def test_every_kind_of_dropout_is_removed(tmp_path: Path, tokenizer: Any) -> None:
    traces, rewards = random_batch(4, UNEQUAL)
    model = make_qwen2(
        3,
        scale=4,
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        attention_dropout=0.4,
    )
    model.model.layers[0].mlp.down_proj = torch.nn.Sequential(
        model.model.layers[0].mlp.down_proj, torch.nn.Dropout(0.5)
    )
    trainer = train(tmp_path, tokenizer, traces, rewards, model=model)
    assert {layer.self_attn.attention_dropout for layer in trainer.model.model.layers} == {0.0}
    assert trainer.model.model.layers[0].mlp.down_proj[1].p == 0.0


def test_a_random_model_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    class Noise(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.randn_like(x) if self.training else x

    traces, rewards = random_batch(4, UNEQUAL)
    model = make_qwen2(3, scale=4, vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32)
    model.model.norm = torch.nn.Sequential(model.model.norm, Noise())
    with pytest.raises(ConfigError, match="random in training mode.*logits.*differ by"):
        train(tmp_path, tokenizer, traces, rewards, model=model)
