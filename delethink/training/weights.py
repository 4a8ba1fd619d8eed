"""Weights for the engine and for checkpoints: full and merged, with the names of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback


def merged_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the full state dict, with low-rank adapters merged into the weights they adapt.

    The model is unchanged. Merging in place and unmerging would round its weights at every update.
    """
    state = model.state_dict()
    adapted: dict[str, Any] = {
        name: module for name, module in model.named_modules() if _is_adapted(module)
    }
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
