"""What is random in a model while it trains; sampling had none of it."""

from __future__ import annotations

from typing import Any

import torch

from delethink.errors import ConfigError


def remove_dropout(model: torch.nn.Module) -> None:
    """Sets every dropout of a model to 0, those that are plain numbers on a module included."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def check_repeatable(model: Any, vocabulary: int) -> None:
    """Refuses a model that says different things of the same tokens while it trains.

    Raises:
        ConfigError: two forward passes in training mode, or one of them and one in evaluation mode,
            differ. The loss would compare probabilities of different models.
    """
    ids = torch.arange(32, device=model.device)[None] % vocabulary
    was_training = model.training
    with torch.no_grad():
        model.train()
        first, second = model(ids).logits, model(ids).logits
        model.eval()
        sampled = model(ids).logits
    model.train(was_training)
    for other, where in ((second, "twice in training mode"), (sampled, "in training and sampling")):
        difference = (first - other).abs().max().item()
        if difference > 1e-3:
            raise ConfigError(
                f"the model is random while it trains: its logits for the same tokens differ by "
                f"{difference:.3g} {where}. Its dropouts are set to 0 already; switch off what "
                "else is random in its configuration"
            )
