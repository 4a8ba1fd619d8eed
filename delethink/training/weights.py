"""Weights for the engine and for checkpoints: full and merged, with the names of the checkpoint.

Low-rank adapters reach an engine merged, or as changes that the engine merges itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from delethink.engines.low_rank import LowRankChange


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


class GatherWeights(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Gathers sharded weights on the CPU of the main rank, before the first step and after each.

    Gathering is a collective, and only the main rank knows when the engine needs new weights.
    Therefore all ranks gather at these fixed points.
    """

    def __init__(self) -> None:
        self.trainer: Any = None  # of the model
        # Full state dict on the main rank; None if the model is not sharded.
        self.weights: Mapping[str, torch.Tensor] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gather the weights of a resumed run, which differ from those of the new engine."""
        if state.global_step:
            self._gather()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gather the weights for the next batch."""
        self._gather()

    def _gather(self) -> None:
        if self.trainer.is_fsdp_enabled:
            self.weights = self.trainer.accelerator.get_state_dict(self.trainer.model)
