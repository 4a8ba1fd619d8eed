"""Terms of a recipe that decide the memory and the time of a batch.

A batch is what is sampled at once: its rollouts, the optimizer steps on it, and new weights for the
engines. Each term is what the trainer does; ``tests/integration/test_recipe_terms.py`` compares
them with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from delethink.chunking import ChunkSpec
from delethink.cost.flops import Cut
from delethink.cost.shape import ModelShape

if TYPE_CHECKING:
    from delethink.config import Recipe, TrainingConfig

_ENGINE_BATCH = 128  # chunks: vLLM's SchedulerConfig.DEFAULT_MAX_NUM_SEQS
_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class RecipeTerms:
    """Terms of a recipe on GPUs, with the shape of its model."""

    shape: ModelShape
    spec: ChunkSpec  # chunk sizes
    query: int  # longest query in tokens
    engine_context: int  # longest sequence of an engine in tokens; LongCoT's in the table too

    # the batch
    traces: int
    group: int  # traces of a query
    optimizer_steps: int  # on a batch
    passes: float  # forward passes of training on a trace; a backward pass counts as two

    # sampling
    engines: int
    engine_gpus: float  # GPUs of each engine
    engine_batch: int  # most chunks that an engine samples at once
    engine_share: float  # share of its GPUs' memory
    engine_bytes: int  # bytes of a weight and a cached value
    sleeps: bool  # engines give their memory back while the trainer trains
    batches_ahead: int  # batches sampled while another one is trained on; 0: in turn

    # training
    ranks: int
    is_sharded: bool  # FSDP2
    is_distributed: bool  # gradients are reduced over ranks
    adapters: int | None  # trained parameters of adapters; ``None``: all weights are trained
    has_reference: bool  # a copy of the initial weights
    autocast: bool  # computes in bfloat16
    recomputes: bool  # gradient checkpointing
    forward_tokens: int  # tokens of a forward pass

    # new weights
    shares_gpus: bool  # each engine is on the GPU of a rank
    transfer: str  # "store", "nccl" or "ipc"
    update_bytes: float  # sent to one engine in an update
    copy_bytes: float  # a rank's copy for the engines, on its GPU
    gathered_bytes: float  # copied to the host of rank 0 before an update

    @property
    def gpus(self) -> int:
        """GPUs of ranks and engines together."""
        return self.ranks if self.shares_gpus else self.ranks + round(self.sampling_gpus)

    @property
    def sampling_gpus(self) -> float:
        """GPUs that sample."""
        return self.engines * self.engine_gpus

    @property
    def cut(self) -> Cut:
        """Sizes of chunks."""
        return Cut.of(self.spec)

    @property
    def longest_context(self) -> int:
        """Longest sequence of a chunk, prompt and output, in tokens."""
        return self.query + self.spec.max_thinking_context

    @property
    def trained_parameters(self) -> int:
        """Parameters with a gradient."""
        return self.shape.parameters if self.adapters is None else self.adapters


def terms_of(
    recipe: Recipe,
    shape: ModelShape,
    query: int,
    adapters: int = 0,
    engine_context: int | None = None,
) -> RecipeTerms:
    """Return the terms of a recipe whose trainer and engines run on GPUs.

    Args:
        recipe: the recipe.
        shape: shape of its model.
        query: longest query in tokens.
        adapters: parameters of ``training.lora``.
        engine_context: longest sequence of an engine; ``None``: the longest chunk.
    """
    training, engine, trainer = recipe.training, recipe.engine, recipe.trainer
    spec = recipe.thinking.spec()
    longest = query + spec.max_thinking_context
    micro_batch = training.per_device_train_batch_size * spec.max_chunks * longest
    update = _update_bytes(recipe, shape, adapters)
    gathers = trainer.strategy == "fsdp2" and engine.placement == "separate"
    lora = training.lora is not None
    return RecipeTerms(
        shape=shape,
        spec=spec,
        query=query,
        engine_context=max(longest, engine_context or 0),
        traces=training.traces_per_batch,
        group=training.num_generations,
        optimizer_steps=training.steps_per_batch,
        passes=_passes(training),
        engines=engine.num_engines,
        engine_gpus=engine.gpus_per_engine,
        engine_batch=engine.max_batch_size or _ENGINE_BATCH,
        engine_share=engine.gpu_memory_utilization,
        engine_bytes=_engine_bytes(recipe),
        sleeps=engine.sleep,
        batches_ahead=training.max_staleness // training.steps_per_batch,
        ranks=trainer.num_ranks,
        is_sharded=trainer.strategy == "fsdp2",
        is_distributed=trainer.num_ranks > 1,
        adapters=adapters if lora else None,
        has_reference=training.beta > 0 and not lora,
        autocast=training.bf16,
        recomputes=training.gradient_checkpointing,
        forward_tokens=max(longest, min(training.forward_tokens, micro_batch)),
        # Without a GPU of its own in Ray, the trainer uses one that an engine is given too.
        shares_gpus=engine.placement == "colocated" or not trainer.gpus_per_rank,
        transfer=engine.weight_transfer,
        update_bytes=update,
        copy_bytes=0.0 if engine.weight_transfer == "store" else update,
        gathered_bytes=_FLOAT32_BYTES * shape.parameters if gathers else 0.0,
    )


def _passes(training: TrainingConfig) -> float:
    """Return the forward passes on a trace of a batch; a backward pass counts as two."""
    each = 3.0 + training.gradient_checkpointing
    each += training.importance_sampling_level == "sequence"  # means over traces come first
    # Log-probs before the first of several steps, and those of the reference.
    return training.num_iterations * each + (training.steps_per_batch > 1) + (training.beta > 0)


def _update_bytes(recipe: Recipe, shape: ModelShape, adapters: int) -> float:
    """Return the bytes of an update of one engine; a tied head counts twice, under two names.

    Shared memory has the engine's data type. The other ways take float32, and the object store the
    adapters alone.
    """
    transfer = recipe.engine.weight_transfer
    if recipe.training.lora is not None and transfer == "store":
        return float(_FLOAT32_BYTES * adapters)
    size = _engine_bytes(recipe) if transfer == "ipc" else _FLOAT32_BYTES
    tied = shape.head_weights if shape.tied_embeddings else 0
    return float(size * (shape.parameters + tied))


def _engine_bytes(recipe: Recipe) -> int:
    """Return the bytes of a weight of an engine."""
    return _FLOAT32_BYTES if recipe.engine.engine_dtype == "float32" else 2
