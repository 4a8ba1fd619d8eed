"""Predicted memory against a training step of the shipped toy reasoner."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from datasets import Dataset
from tiny_training import make_config
from torch.profiler import ProfilerActivity, profile

from delethink import ChunkSpec, StopReason, start
from delethink.cost.memory import training_bytes
from delethink.cost.models import model_shape
from delethink.engines.loading import load_model, load_tokenizer
from delethink.training.batching import RolloutBatch
from delethink.training.grpo import DelethinkTrainer
from delethink.types import Chunk, Trace, TraceStop

pytestmark = pytest.mark.integration

GROUP = 8


def long_trace(rng: random.Random, spec: ChunkSpec) -> Trace:
    """Return a trace of the full budget."""
    state, chunks = start(spec, (3,) * 15), []
    while state.stop is None:
        output = tuple(rng.randrange(3, 16) for _ in range(state.max_new_tokens))
        chunks.append(Chunk(state.prompt_ids, output, (-1.0,) * len(output), StopReason.LENGTH))
        state = state.advance(output, StopReason.LENGTH)
    return Trace(state.query_ids, tuple(chunks), TraceStop.BUDGET)


def peak_bytes(tmp_path: Path, spec: ChunkSpec, forward_tokens: int) -> int:
    """Return the peak bytes of live tensors in an optimizer step, weights included."""
    rng, seen = random.Random(0), list[object]()
    traces = [long_trace(rng, spec) for _ in range(GROUP)]
    model, tokenizer = load_model("toy", "float32", False), load_tokenizer("toy", False)
    trainer = DelethinkTrainer(
        model=model,
        processing_class=tokenizer,
        args=make_config(
            tmp_path,
            per_device_train_batch_size=GROUP,
            num_generations=GROUP,
            max_steps=1,
            forward_tokens=forward_tokens,
        ),
        train_dataset=Dataset.from_list([{"prompt": "00:00000000001"}]),
        reward_funcs=[lambda prompts, **_: [float(i % 2) for i in range(GROUP)]],
        run_rollouts=lambda examples: RolloutBatch(examples, traces),
        on_sampled=seen.append,
    )
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    assert seen
    return weights + peak


@pytest.mark.parametrize("forward_tokens", [2048, 8192])
def test_memory_of_a_training_step(tmp_path: Path, forward_tokens: int) -> None:
    measured = peak_bytes(tmp_path, ChunkSpec(90, 45, 30, 0), forward_tokens)
    predicted = training_bytes(model_shape("toy"), forward_tokens, 1, 4, by_layer=False)
    assert measured == pytest.approx(float(predicted), rel=0.1)


def test_memory_does_not_grow_with_thinking(tmp_path: Path) -> None:
    short, long = (peak_bytes(tmp_path, ChunkSpec(90, 45, n, 0), 2048) for n in (10, 60))
    assert long < 1.1 * short
