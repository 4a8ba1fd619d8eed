"""Memory of a GPU of a run, trainer and engine together, by part.

Sizes of weights, states, activations and caches are arithmetic (``delethink.cost.memory``). Those
of the CUDA context, NCCL and CUDA graphs are the constants of this module, which are assumptions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from delethink.cost.hardware import Accelerator
from delethink.cost.memory import activation_bytes, cache_bytes
from delethink.cost.recipe_terms import RecipeTerms

GIB = 2**30
_CONTEXT_BYTES = 0.6 * GIB  # CUDA context and kernels of the libraries, for each process
_COLLECTIVE_BYTES = 0.5 * GIB  # NCCL's buffers, for each rank
_GRAPH_BYTES = 1.0 * GIB  # CUDA graphs, for each engine
_FRAGMENTATION = 0.05  # share of a trainer's peak lost between blocks of the allocator
_BATCHED_TOKENS = 8192  # longest prefill: vLLM's largest default for an asynchronous engine
_LOGIT_COPIES = 2  # float32 logits of a batch, and a copy while a token is drawn

Parts = dict[str, float]  # part -> bytes


@dataclass(frozen=True)
class GpuUse:
    """The fullest moment of a kind of GPU, by part."""

    name: str  # the phase or kind of GPU
    parts: Parts = field(default_factory=dict)

    @property
    def needed(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())


def trainer_parts(terms: RecipeTerms) -> Parts:
    """Return the parts of a rank in the backward pass."""
    shape, trained = terms.shape, terms.trained_parameters
    shards = terms.ranks if terms.is_sharded else 1
    frozen = 0 if terms.adapters is None else shape.parameters
    parts = {
        "weights": 4.0 * (trained + frozen) / shards,
        "gradients": 4.0 * trained / shards,
        "Adam": 8.0 * trained / shards,
    }
    if terms.has_reference:
        parts["reference weights"] = 4.0 * shape.parameters / shards
    if terms.is_distributed and not terms.is_sharded:
        parts["DDP buckets"] = 4.0 * trained  # copies of all gradients
    if terms.is_sharded:
        layers = [layer.mixer.weights + layer.feed_forward.weights for layer in shape.layers]
        size = 2 if terms.autocast else 4
        # The layer at work and the next one, and the embedding; gradients of a layer in float32.
        parts["gathered layers"] = size * (2.0 * max(layers) + shape.head_weights)
        parts["gathered layers"] += 4.0 * max(layers)
    elif terms.autocast:
        # Without adapters autocast caches its copies until the forward pass ends. With them the
        # graph holds the copies, unless layers are computed again.
        kept = terms.adapters is None or not terms.recomputes
        linear = shape.parameters - (0 if shape.tied_embeddings else shape.head_weights)
        largest = max(layer.feed_forward.weights for layer in shape.layers)
        parts["bfloat16 copies"] = 2.0 * (linear if kept else largest)
    if not terms.sleeps:  # otherwise given back before training
        parts["copy for engines"] = terms.copy_bytes
    parts["activations"] = float(
        activation_bytes(
            shape,
            terms.forward_tokens,
            2 if terms.autocast else 4,
            by_layer=terms.recomputes,
            stream_bytes=4 if terms.autocast else None,
        )
    )
    parts["allocator"] = _FRAGMENTATION * sum(parts.values())
    return parts | _processes(terms)


def resting_parts(terms: RecipeTerms) -> Parts:
    """Return the parts of a rank while engines sample: without gradients and activations."""
    kept = ("weights", "Adam", "reference weights", "DDP buckets", "runtime")
    parts = {name: size for name, size in trainer_parts(terms).items() if name in kept}
    return parts | {"copy for engines": terms.copy_bytes}


def _processes(terms: RecipeTerms) -> Parts:
    return {"runtime": _CONTEXT_BYTES + (_COLLECTIVE_BYTES if terms.is_distributed else 0.0)}


def engine_parts(terms: RecipeTerms) -> Parts:
    """Return the parts of an engine on one of its GPUs, with a cache for the longest sequence.

    The cache takes the rest of the engine's share.
    """
    shape, size = terms.shape, terms.engine_bytes
    parallel = max(1.0, terms.engine_gpus)
    widest = max(layer.feed_forward.width for layer in shape.layers)
    prefill = _BATCHED_TOKENS * (2 * widest + 4 * shape.hidden_size) * size
    logits = _LOGIT_COPIES * 4.0 * terms.engine_batch * shape.vocabulary_size
    cache = float(cache_bytes(shape, terms.engine_context, size, block=16))
    return {
        "engine weights": shape.parameters * size / parallel,
        "engine batch": (prefill + logits) / parallel,
        "CUDA graphs": _GRAPH_BYTES,
        "engine runtime": _CONTEXT_BYTES,
        "cache of the longest sequence": cache / parallel,
    }


def asleep_parts() -> Parts:
    """Return the parts of a sleeping engine, which gives weights and cache back."""
    return {"CUDA graphs": _GRAPH_BYTES, "engine runtime": _CONTEXT_BYTES}


def gpu_uses(terms: RecipeTerms, device: Accelerator) -> list[GpuUse]:
    """Return the fullest moments of the GPUs of a run."""
    engine = engine_parts(terms)
    share = max(terms.engine_share * device.memory, sum(engine.values()))
    awake = engine | {"rest of the cache": share - sum(engine.values())}
    if not terms.shares_gpus:
        return [
            GpuUse("GPU of a rank", trainer_parts(terms)),
            GpuUse("GPU of an engine", awake),
        ]
    beside = asleep_parts() if terms.sleeps else awake
    return [
        GpuUse("training", trainer_parts(terms) | beside),
        GpuUse("sampling", resting_parts(terms) | awake),
    ]


def cache_share(terms: RecipeTerms, device: Accelerator) -> float:
    """Return the share of an engine's GPU for weights and caches."""
    engine = engine_parts(terms)
    beside = sum(engine[name] for name in ("engine batch", "CUDA graphs", "engine runtime"))
    return max(0.0, terms.engine_share - beside / device.memory)


def engine_needs(terms: RecipeTerms) -> float:
    """Return the bytes without which an engine does not start."""
    return sum(engine_parts(terms).values())


# Settings that lower the memory of a GPU, and the terms with each; the cheapest in time first.
_SAVINGS: list[tuple[str, Callable[[RecipeTerms], RecipeTerms | None]]] = [
    (
        "engine.sleep=true",
        lambda t: None if t.sleeps or not t.shares_gpus else dataclasses.replace(t, sleeps=True),
    ),
    (
        "training.gradient_checkpointing=true",
        lambda t: None if t.recomputes else dataclasses.replace(t, recomputes=True),
    ),
    ("training.bf16=true", lambda t: None if t.autocast else dataclasses.replace(t, autocast=True)),
    (
        "training.forward_tokens={forward_tokens}",
        lambda t: (
            None
            if t.forward_tokens <= t.longest_context
            else dataclasses.replace(t, forward_tokens=t.longest_context)
        ),
    ),
    (
        "trainer.strategy=fsdp2",
        lambda t: (
            None
            if t.is_sharded or not t.is_distributed or t.adapters is not None
            else dataclasses.replace(t, is_sharded=True)
        ),
    ),
]


def savings(terms: RecipeTerms, device: Accelerator, use: str) -> tuple[list[str], float]:
    """Return settings with which a use of a GPU fits, and the bytes needed with all of them.

    The settings are those that help most cheaply; if none suffices, all that help.
    """

    def needed(changed: RecipeTerms) -> float:
        return next(u.needed for u in gpu_uses(changed, device) if u.name == use)

    chosen, best = list[str](), needed(terms)
    for setting, change in _SAVINGS:
        changed = change(terms)
        if changed is None or needed(changed) >= best:
            continue
        terms, best = changed, needed(changed)
        chosen.append(setting.format(forward_tokens=terms.forward_tokens))
        if best <= device.memory:
            break
    return chosen, best


def largest_share(terms: RecipeTerms, device: Accelerator) -> float:
    """Return the largest share of a GPU for an engine beside a resting rank, in hundredths."""
    free = device.memory - sum(resting_parts(terms).values())
    return max(0.0, int(100 * free / device.memory) / 100)
