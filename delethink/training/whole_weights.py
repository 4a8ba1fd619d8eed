"""The whole weights of a model whose parameters are sharded over processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    import torch


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
