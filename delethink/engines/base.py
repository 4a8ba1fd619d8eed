"""What training and evaluation need of an engine beyond the policy protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from delethink.policy import Policy

if TYPE_CHECKING:
    import torch


class Engine(Policy, Protocol):
    """A policy with weights that can be replaced.

    Attributes:
        max_model_tokens: the longest sequence (prompt and new tokens) that it takes.
    """

    max_model_tokens: int

    def update_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Take up new weights; when it returns, every later token is sampled from them.

        Args:
            weights: the whole state of the model under the names of its checkpoint.
            version: number of weight updates so far; completions carry it as ``policy_version``.

        Raises:
            WeightSyncError: a worker did not take them up in time, or runs others afterwards.
        """
        ...

    def take_metrics(self) -> dict[str, float]:
        """What the engine has done since this was last asked, by ``engine/<name>``.

        Whatever it can say: the keys are the engine's own.
        """
        ...

    def sleep(self) -> None:
        """Frees the GPU for the trainer, if the engine was made to; the next request wakes it."""
        ...

    def close(self) -> None:
        """Release what the engine holds, worker processes included. Safe to call twice."""
        ...
