"""Terms of the predicted time and memory of a recipe, against what the trainer does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from delethink import ChunkSpec, StopReason, start
from delethink.config import Recipe, load_recipe
from delethink.cost.models import model_shape
from delethink.cost.recipe_terms import RecipeTerms, terms_of
from delethink.engines.loading import load_model, load_tokenizer
from delethink.engines.weight_sync import pack
from delethink.errors import ConfigError
from delethink.training.batching import RolloutBatch
from delethink.training.distributed import check_resources
from delethink.training.grpo import DelethinkTrainer
from delethink.training.grpo_config import trl_config
from delethink.training.weights import merged_state_dict
from delethink.types import Chunk, Trace, TraceStop

pytestmark = pytest.mark.integration

RECIPES = Path(__file__).parents[2] / "recipes"
QUERY, GROUP = 15, 4
SMALL = [
    "engine=vllm",
    "training.num_generations=4",
    "training.per_device_train_batch_size=4",
    "training.gradient_accumulation_steps=1",
    "training.forward_tokens=512",
    "thinking.max_chunks=3",
]


def recipe(*overrides: str, name: str = "quickstart") -> Recipe:
    small = SMALL if name == "quickstart" else []
    return load_recipe(RECIPES / name / "recipe.yaml", [*small, *overrides])


def terms(of: Recipe) -> RecipeTerms:
    return terms_of(of, model_shape(of.model), QUERY)


def full_trace(rng: random.Random, spec: ChunkSpec) -> Trace:
    """Return a trace of the whole budget, whose chunks all have the same length."""
    state, chunks = start(spec, (3,) * QUERY), []
    while state.stop is None:
        output = tuple(rng.randrange(3, 16) for _ in range(state.max_new_tokens))
        chunks.append(Chunk(state.prompt_ids, output, (-1.0,) * len(output), StopReason.LENGTH))
        state = state.advance(output, StopReason.LENGTH)
    return Trace(state.query_ids, tuple(chunks), TraceStop.BUDGET)


@pytest.mark.parametrize(
    ("overrides", "passes", "steps"),
    [
        (["training.gradient_checkpointing=true"], 4, 1),
        (["training.steps_per_generation=2"], 4, 2),
        (["training.num_iterations=2", "training.importance_sampling_level=sequence"], 9, 2),
    ],
)
def test_passes_of_training_and_steps_on_a_batch(
    overrides: list[str], passes: int, steps: int, tmp_path: Path
) -> None:
    of = recipe(*overrides, f"training.max_steps={steps}")
    expected, spec = terms(of), of.thinking.spec()
    assert (expected.passes, expected.optimizer_steps) == (passes, steps)
    batches, counted = list[int](), {"forward": 0, "backward": 0}
    rng = random.Random(0)

    def sample(examples: list[dict[str, Any]]) -> RolloutBatch:
        batches.append(len(examples))
        return RolloutBatch(examples, [full_trace(rng, spec) for _ in examples])

    trainer = DelethinkTrainer(
        model=load_model("toy", "float32", False),
        processing_class=load_tokenizer("toy", False),
        args=trl_config(of, spec, tmp_path),
        train_dataset=Dataset.from_list([{"prompt": "00:00000000001"}] * 8),
        reward_funcs=[lambda prompts, **_: [float(i % 2) for i in range(len(prompts))]],
        run_rollouts=sample,
        on_sampled=lambda scored: None,
    )

    def count_forward(module: Any, inputs: Any) -> None:  # a repeated pass ends before its output
        counted["forward"] += inputs[0].shape[0] * inputs[0].shape[1]

    def watch_output(module: Any, inputs: Any, output: Any) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: count_backward(gradient))

    def count_backward(gradient: torch.Tensor) -> None:
        counted["backward"] += gradient.shape[0] * gradient.shape[1]

    layer = trainer.model.model.layers[0]
    layer.register_forward_pre_hook(count_forward)
    layer.register_forward_hook(watch_output)
    trainer.train()
    assert batches == [expected.traces]
    chunk = QUERY + spec.context_size
    whole = expected.traces * spec.max_chunks * chunk
    assert counted["forward"] + 2 * counted["backward"] == passes * whole


def test_bytes_of_an_update_through_the_object_store() -> None:
    weights = pack(merged_state_dict(load_model("toy", "float32", False)))
    assert terms(recipe()).update_bytes == sum(data.nbytes for data, _, _ in weights.values())


def test_bytes_of_an_update_in_shared_memory() -> None:
    from delethink.engines.weight_sync import SharedWeights

    of = recipe("engine.placement=colocated", "engine.dtype=bfloat16")
    state = merged_state_dict(load_model("toy", "float32", False))
    dtype = getattr(torch, of.engine.engine_dtype)
    shared = SharedWeights(state, torch.device("cpu"), dtype)
    try:
        sent = sum(size for _, _, _, _, size in shared.handle.slots)
    finally:
        shared.close()
    assert terms(of).update_bytes == terms(of).copy_bytes == sent


SEPARATE = ["engine.placement=separate", "trainer.num_ranks=4", "engine.gpus_per_engine=1"]


@pytest.mark.parametrize("overrides", [[], [*SEPARATE, "engine.num_engines=3"]])
def test_gpus_are_those_that_ray_is_asked_for(overrides: list[str]) -> None:
    of = recipe(*overrides, name="delethink_24k")
    found = terms(of)
    plenty = {"CPU": 1000.0, "GPU": float(found.gpus)}
    check_resources(of, plenty)
    with pytest.raises(ConfigError, match="GPUs"):
        check_resources(of, plenty | {"GPU": found.gpus - 1.0})
    assert found.ranks == of.trainer.num_ranks
    assert found.sampling_gpus == of.engine.num_engines * of.engine.gpus_per_engine
