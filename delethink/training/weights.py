"""Weights for the engine and for checkpoints: full and merged, with the names of the checkpoint.

Low-rank adapters reach an engine merged, or as changes that the engine merges itself. The weights
of several ranks come together in ``RankWeights``.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch

from delethink.config import EngineConfig
from delethink.engines.low_rank import LowRankChange
from delethink.engines.weight_sync import SharedHandle, SharedWeights
from delethink.training.data_parallel import RankGroup


def merged_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the full state dict, with low-rank adapters merged into the weights they adapt.

    The model is unchanged. Merging in place and unmerging would round its weights at every update.
    """
    state, adapted = model.state_dict(), _adapted_modules(model)
    if not adapted:
        return state
    weights = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if ".lora_" not in name
    }
    with torch.no_grad():
        for name, module in adapted.items():
            merged = module.base_layer.weight.clone()
            for adapter in module.active_adapters:
                merged += module.get_delta_weight(adapter).to(merged.dtype)
            weights[f"{name}.weight"] = merged
    return weights


def low_rank_changes(model: torch.nn.Module) -> dict[str, LowRankChange]:
    """Return the changes that the adapters make to weights, under the names of the checkpoint.

    The tensors are the model's own. See ``merge_obstacle`` for adapters of other kinds.
    """
    changes = {}
    for name, module in _adapted_modules(model).items():
        (adapter,) = module.active_adapters
        changes[f"{name}.weight"] = LowRankChange(
            module.lora_A[adapter].weight.detach(),
            module.lora_B[adapter].weight.detach(),
            float(module.scaling[adapter]),
        )
    return changes


def merge_obstacle(model: torch.nn.Module) -> str | None:
    """Return why the trained parameters are more than low-rank changes of weights, or ``None``."""
    from peft.tuners.lora import Linear

    parameters, adapted = set[int](), _adapted_modules(model)
    for name, module in adapted.items():
        adapters = list(module.active_adapters)
        if not isinstance(module, Linear) or len(adapters) != 1:
            return f"{name} has another adapter than one of a linear layer"
        (adapter,) = adapters
        if module.fan_in_fan_out or module.lora_variant or module.lora_bias[adapter]:
            return f"the adapter of {name} does more than add a product of two matrices"
        parameters |= {id(m[adapter].weight) for m in (module.lora_A, module.lora_B)}
    others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in parameters]
    if others:
        return f"{others[0]} is trained too"
    beneath = {id(module.base_layer.weight) for module in adapted.values()}
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in beneath]
    if len(names) > len(beneath):
        return "an adapted layer shares its weight with another one"
    return None


def _adapted_modules(model: torch.nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if _is_adapted(module)}


def has_adapters(model: torch.nn.Module) -> bool:
    """Return whether the model has low-rank adapters."""
    return any(_is_adapted(module) for module in model.modules())


def _is_adapted(module: Any) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "get_delta_weight")


class RankWeights:
    """The weights of all ranks on their way to the engine; most methods are collectives.

    Ranks with sharded weights gather them on the CPU of the main rank. Ranks with an engine beside
    each of them (``engine.placement=colocated``) share a copy each with it, and the main rank gets
    the handles. Only the main rank knows when the engine needs new weights. Therefore all ranks
    collect them at fixed points: at the start, before a batch is sampled, before an evaluation, and
    at the end.

    Args:
        model: the model of this rank, whose parameters are trained in place.
        engine: the section ``engine:`` of the recipe.
        ranks: all ranks that train together.

    Attributes:
        trainer: the trainer of the model, once there is one.
        weights: full state dict, on the main rank; ``None`` if the model is not sharded.
        handles: shared copies, by rank, on the main rank; ``None`` without engines beside ranks.
    """

    def __init__(self, model: Any, engine: EngineConfig, ranks: RankGroup | None = None) -> None:
        self.trainer: Any = None
        self.weights: Mapping[str, torch.Tensor] | None = None
        self.handles: list[SharedHandle] | None = None
        self._model, self._engine, self._ranks = model, engine, ranks or RankGroup()
        self._copy: SharedWeights | None = None
        self._collected = -1  # version of ``weights`` or ``handles``

    @property
    def version(self) -> int:
        """Weight updates in the trainer's weights."""
        return 0 if self.trainer is None else int(self.trainer.state.global_step)

    @property
    def is_colocated(self) -> bool:
        """True if each rank has an engine beside it."""
        return self._engine.placement == "colocated"

    def collect(self) -> None:
        """Make the current weights ready for the engine, unless they are. A collective."""
        if self._engine.sleep:
            give_back_memory()  # the engine is about to take it
        if self._collected == self.version:
            return
        if self.is_colocated:
            self._ranks.gather(None)  # until then, an engine may read the copy of before
            self._close_copy()
            state = merged_state_dict(self._model)
            device = next(iter(state.values())).device
            if not self._engine.gpus_per_engine:
                device = torch.device("cpu")
            dtype: torch.dtype = getattr(torch, self._engine.engine_dtype)
            self._copy = SharedWeights(state, device, dtype)
            self.handles = self._ranks.gather(self._copy.handle)
        elif self.trainer is not None and self.trainer.is_fsdp_enabled:
            self.weights = self.trainer.accelerator.get_state_dict(self.trainer.model)
        self._collected = self.version

    def release(self) -> None:
        """Give memory that is shared with sleeping engines back to training. A collective."""
        if self.is_colocated and self._engine.sleep:
            self._ranks.gather(None)  # when the main rank has put the engines to sleep
            self.handles, self._collected = None, -1
            self._close_copy()

    def close(self) -> None:
        """Keep the weights until the main rank needs no engine any more. A collective."""
        if self.is_colocated:
            self._ranks.gather(None)
            self._close_copy()

    def _close_copy(self) -> None:
        if self._copy is not None:
            self._copy.close()
            self._copy = None


def give_back_memory() -> None:
    """Give memory that this process has freed, and keeps for later, back to its GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
