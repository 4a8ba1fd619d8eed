"""The weights that an engine serves, under the names of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    import torch


def served_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole state of a model; adapters are added to the weights that they adapt.

    The model itself is left as it is: adding adapters in place and taking them off again would
    round its weights a little at every update.
    """
    state = model.state_dict()
    adapted = {name: module for name, module in model.named_modules() if _is_adapted(module)}
    if not adapted:
        return state
    weights = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if ".lora_" not in name
    }
    with torch.no_grad():
        for name, module in adapted.items():
            weights[f"{name}.weight"] = _merged(module)
    return weights


def has_adapters(model: torch.nn.Module) -> bool:
    """Whether low-rank adapters were put into a model."""
    return any(_is_adapted(module) for module in model.modules())


def _is_adapted(module: Any) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "get_delta_weight")


def _merged(module: Any) -> torch.Tensor:
    merged: torch.Tensor = module.base_layer.weight.clone()
    for adapter in module.active_adapters:
        merged += module.get_delta_weight(adapter).to(merged.dtype)
    return merged


class WholeWeights(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Gathers sharded weights on the CPU of the first process, for whoever asks there.

    Gathering takes all processes, and only the first knows when an engine wants weights, so all do
    it at points that they know: before the first step and after each.

    Attributes:
        trainer: whose model it is.
        weights: of the checkpoint's names; ``None`` where nothing is sharded and the model itself
            can be asked.
    """

    def __init__(self) -> None:
        self.trainer: Any = None
        self.weights: Mapping[str, torch.Tensor] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run that goes on from a checkpoint has other weights than its engine."""
        if state.global_step:
            self._gather()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Those of the next batch."""
        self._gather()

    def _gather(self) -> None:
        if self.trainer.is_fsdp_enabled:
            self.weights = self.trainer.accelerator.get_state_dict(self.trainer.model)
