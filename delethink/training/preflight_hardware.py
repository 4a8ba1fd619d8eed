"""Checks of a recipe on GPUs that need not be here: number, memory, time of a batch, disk.

Nothing is loaded but the configuration of the model: the queries count as long as the recipe
allows.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from delethink.chunking import ChunkSpec
from delethink.config import Recipe
from delethink.cost.batch_time import BatchTime, batch_interval, predict_batch, usual_lengths
from delethink.cost.gpu_memory import GpuUse, engine_needs, gpu_uses, largest_share, savings
from delethink.cost.hardware import ACCELERATORS, Accelerator
from delethink.cost.memory import weight_bytes
from delethink.cost.models import config_of, model_shape
from delethink.cost.recipe_terms import RecipeTerms, terms_of
from delethink.errors import ConfigError, ModelError, UserError
from delethink.training.preflight_check import Check, gib
from delethink.training.system import Memory

_ASSUMED_QUERY = 1024  # tokens, where the recipe has no limit
_SAMPLED_TOKEN_BYTES, _PROMPT_TOKEN_BYTES = 36, 7  # in traces/
_FULL = 0.97  # a GPU fuller than this share may run out of memory


class HardwareReport(NamedTuple):
    """Checks of a recipe on hardware, and the figures behind them."""

    checks: list[Check]
    prediction: dict[str, Any]  # JSON values; empty if the recipe cannot be read


def check_on_hardware(
    recipe: Recipe, device: Accelerator, gpus: int, mean: float | None = None
) -> HardwareReport:
    """Check a recipe on a number of GPUs of one kind.

    Args:
        recipe: the recipe.
        device: kind of the GPUs.
        gpus: their number.
        mean: mean sampled tokens of a trace; ``None``: as in the paper's 24K run.
    """
    try:
        terms = read_terms(recipe)
    except UserError as error:
        return HardwareReport([Check("recipe", "problem", str(error))], {})
    query = f"queries of up to {terms.query} tokens"
    if recipe.task.max_query_tokens is None:
        query = f"{query}, an assumption (task.max_query_tokens)"
    name = Check("recipe", "ok", f"{recipe.name}: {terms.shape.name}; {query}; no problem was read")
    uses = gpu_uses(terms, device)
    checks = [name, check_gpus(terms, device.name, gpus), *check_uses(terms, device, uses)]
    prediction: dict[str, Any] = {
        "gpu": device.name,
        "gpus": terms.gpus,
        "memory": {use.name: {"needed": use.needed, "parts": use.parts} for use in uses},
    }
    time, figures = check_batch_time(terms, device, mean)
    checks.append(time)
    disk, sizes = _check_disk(recipe, terms, mean)
    return HardwareReport([*checks, disk], prediction | {"batch": figures, "disk": sizes})


def read_terms(recipe: Recipe) -> RecipeTerms:
    """Return the terms of a recipe, with the longest queries that it allows.

    Raises:
        UserError: the model is unknown, or its chunks are of no known size.
    """
    name, _, _ = recipe.model.partition("@")  # shapes do not depend on the revision
    model = recipe.model if Path(recipe.model).exists() else name
    shape, adapters = model_shape(model), 0
    if recipe.training.lora is not None:
        from transformers import AutoConfig

        from delethink.training.lora import adapter_parameters

        config = AutoConfig.for_model(**config_of(model))
        adapters = adapter_parameters(config, recipe.training.lora)
    query = recipe.task.max_query_tokens or _ASSUMED_QUERY
    longcot = query + recipe.thinking.spec().budget
    window = config_of(model).get("max_position_embeddings") or 0
    if not recipe.evaluation.num_problems or longcot > window:
        longcot = 0  # the table has no row for it
    longest = recipe.engine.max_model_tokens or longcot
    return terms_of(recipe, shape, query, adapters, longest)


def local_accelerator(memory: Memory) -> Accelerator | None:
    """Return a GPU of this machine by its name, with its own memory; ``None`` if not known."""
    name = memory.name.lower().replace(" ", "").replace("-", "")
    for key, known in ACCELERATORS.items():
        if key in name:
            return dataclasses.replace(known, name=memory.name, memory=float(memory.total))
    return None


def check_here(terms: RecipeTerms, memory: Memory) -> list[Check]:
    """Check memory, and the time of a batch where the GPU is a known one."""
    known = local_accelerator(memory)
    device = known or dataclasses.replace(ACCELERATORS["a100"], memory=float(memory.total))
    checks = check_uses(terms, device, gpu_uses(terms, device))
    return [*checks, check_batch_time(terms, known, None)[0]] if known else checks


def check_gpus(terms: RecipeTerms, name: str, gpus: int) -> Check:
    """Compare the GPUs that a recipe takes with those that are there."""
    if not terms.engine_gpus:
        found = "engine.gpus_per_engine=0 samples on the CPU, for hours where GPUs take minutes"
        advice = "set engine.gpus_per_engine=1, or engine.placement=colocated"
        return Check("devices", "problem", found, advice)
    if terms.shares_gpus:
        found = f"{terms.ranks} for ranks and their engines alike"
    else:
        found = f"{terms.ranks} for ranks and {terms.sampling_gpus:g} for engines"
    found = f"the recipe takes {_number(terms.gpus, 'GPU')}, {found}; there are {gpus} x {name}"
    if terms.gpus > gpus:
        return Check("devices", "problem", found, _fewer(terms, gpus))
    if terms.gpus < gpus:
        return Check("devices", "warning", found, f"{gpus - terms.gpus} would be idle")
    return Check("devices", "ok", found)


def _fewer(terms: RecipeTerms, gpus: int) -> str:
    """Return the settings with which a recipe takes at most so many GPUs."""
    if terms.shares_gpus:
        return f"set trainer.num_ranks={gpus}"
    if gpus == 1:
        return "share the GPU: set engine.placement=colocated and trainer.num_ranks=1"
    ranks = max(1, gpus * terms.ranks // terms.gpus)
    engines = max(1, int((gpus - ranks) / max(1.0, terms.engine_gpus)))
    return (
        f"set trainer.num_ranks={ranks} and engine.num_engines={engines}, or "
        f"engine.placement=colocated with trainer.num_ranks={gpus}"
    )


def check_uses(terms: RecipeTerms, device: Accelerator, uses: list[GpuUse]) -> list[Check]:
    """Compare the fullest moments of GPUs with their memory."""
    checks = [_check_use(terms, device, use) for use in uses]
    needed, share = engine_needs(terms), terms.engine_share * device.memory
    if needed > share:
        found = (
            f"an engine needs {gib(needed)} for weights and a cache of {terms.engine_context} "
            f"tokens, and engine.gpu_memory_utilization={terms.engine_share:g} of a GPU is "
            f"{gib(share)}"
        )
        least = -(-int(100 * needed) // int(device.memory)) / 100
        advice = (
            f"set engine.gpu_memory_utilization={least:g}"
            if least < 1
            else "set engine.tensor_parallel_size=2, or use a smaller model or context"
        )
        checks.append(Check("engine", "problem", found, advice))
    return checks


def _check_use(terms: RecipeTerms, device: Accelerator, use: GpuUse) -> Check:
    parts = ", ".join(f"{name} {gib(size)}" for name, size in use.parts.items() if size)
    found = f"{gib(use.needed)} of {gib(device.memory)} ({use.name}): {parts}"
    if use.needed <= _FULL * device.memory:
        return Check("memory", "ok", found)
    status: Any = "problem" if use.needed > device.memory else "warning"
    if use.name in ("sampling", "GPU of an engine"):
        share = largest_share(terms, device) if terms.shares_gpus else 0.9
        advice = f"set engine.gpu_memory_utilization={share:g}"
        lower = dataclasses.replace(terms, engine_share=share)
        if engine_needs(lower) > share * device.memory:
            advice = "the rank leaves too little: train adapters (training.lora) or use more GPUs"
        return Check("memory", status, found, advice)
    settings, least = savings(terms, device, use.name)
    advice = f"set {' and '.join(settings)}: {gib(least)}" if settings else ""
    if least > device.memory:
        more = "use more memory: train adapters (training.lora), a smaller model or a larger GPU"
        advice = f"{advice}; still too much, so {more}" if advice else more
    return Check("memory", status, found, advice)


def check_batch_time(
    terms: RecipeTerms, device: Accelerator, mean: float | None
) -> tuple[Check, dict[str, Any]]:
    """Predict the time of a batch; return the check and the figures behind it."""
    try:
        time = predict_batch(terms, device, mean)
        low, high = batch_interval(terms, device, mean)
        length = float(usual_lengths(terms.spec.budget, 1, mean).mean)
    except (ConfigError, ModelError) as error:
        return Check("time", "not checked", str(error)), {}
    figures: dict[str, Any] = {
        **time.as_dict(),
        "interval_5_95": [low, high],
        "mean_tokens": length,
        "traces": terms.traces,
        "optimizer_steps": terms.optimizer_steps,
    }
    return Check("time", "ok", _time_text(terms, time, (low, high), length)), figures


def _time_text(
    terms: RecipeTerms, time: BatchTime, interval: tuple[float, float], length: float
) -> str:
    phases = {
        f"sampling on {_number(terms.sampling_gpus, 'GPU')}": time.sampling,
        "scoring": time.scoring,
        f"training on {_number(terms.ranks, 'rank')}": time.training,
        "trace files": time.recording,
        "weight update": time.update,
        "sleep and wake": time.switching,
    }
    listed = ", ".join(f"{name} {size:.1f}" for name, size in phases.items() if size >= 0.05)
    order = "sampling overlaps training" if time.overlaps else "in turn"
    return (
        f"{time.total:.0f} s a batch ({interval[0]:.0f} to {interval[1]:.0f}), {order}: {listed}; "
        f"{terms.traces} traces of {length:,.0f} tokens on average, "
        f"{_number(terms.optimizer_steps, 'optimizer step')}"
    )


def _number(number: float, noun: str) -> str:
    return f"{number:g} {noun}" + ("" if number == 1 else "s")


def _check_disk(
    recipe: Recipe, terms: RecipeTerms, mean: float | None
) -> tuple[Check, dict[str, float]]:
    """State the size of checkpoints and traces; the disk is not here."""
    training = recipe.training
    # Weights and the state of Adam in float32; adapters alone if only they are trained.
    one = 12.0 * terms.trained_parameters
    final = weight_bytes(terms.shape, 2)
    kept = training.save_total_limit + 1 if training.save_steps else 0
    length = float(usual_lengths(terms.spec.budget, 1, mean).mean)
    prompts = _prompt_tokens(terms.spec, terms.query, length)
    trace = length * _SAMPLED_TOKEN_BYTES + prompts * _PROMPT_TOKEN_BYTES
    traces = training.num_batches * training.traces_per_batch * trace
    sizes = {"checkpoints": kept * one + final, "traces": traces}
    found = (
        f"checkpoints take {gib(sizes['checkpoints'])} ({gib(one)} each), traces about "
        f"{gib(traces)}: {gib(sum(sizes.values()))} in the run directory"
    )
    return Check("disk", "ok", found), sizes


def _prompt_tokens(spec: ChunkSpec, query: int, length: float) -> float:
    """Return the prompt tokens of a trace of so many sampled tokens."""
    step = max(1, spec.context_size - spec.carryover_size)
    later = max(0.0, (length - spec.context_size) / step)
    return query * (1 + later) + later * spec.carryover_size
