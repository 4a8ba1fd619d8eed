"""No update from numbers that are not numbers.

A loss, a gradient or a log-prob of the trainer that is NaN or infinite would ruin every weight at
once. Before each optimizer step the guard looks at all three; where one is not finite, the
gradients are thrown away, so that weights and the optimizer's state stay as they are, and whoever
owns the run is told and may stop it. (An engine's log-prob that is not finite fails its trace
already, in ``delethink.policy``.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import Trainer


class NonFinite(NamedTuple):
    """What was not finite in an optimizer step.

    Args:
        step: of the optimizer, from 1.
        what: ``"loss"``, ``"log-prob"`` or ``"gradient"``, the first that was found.
        traces: places of the traces with such a log-prob in the batch that was sampled last, on
            this process; none where only a sum is known to be wrong.
    """

    step: int
    what: str
    traces: list[int]


class Guarded(Trainer):  # type: ignore[misc]  # transformers' trainer is untyped
    """A trainer that takes no step with what is not finite, to be mixed into one.

    Args:
        on_nonfinite: told of a step that is not taken; may raise to stop the run.
    """

    def __init__(
        self, *args: Any, on_nonfinite: Callable[[NonFinite], None], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._on_nonfinite = on_nonfinite
        self._what: str | None = None  # was not finite, since the last optimizer step
        self._guilty: set[int] = set()
        self._places: list[int] = []  # of the micro-batch's traces in the batch

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a micro-batch, looked at."""
        self._places = inputs["place"]
        loss: torch.Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        if not bool(torch.isfinite(loss)):
            self._what = self._what or "loss"
        return loss

    def _complete(self, part: Any, logprobs: torch.Tensor, entropies: Any) -> None:
        broken = ~torch.isfinite(logprobs.detach()).all(1)  # [K], chunks of a forward batch
        if bool(broken.any()):
            self._what = "log-prob"
            rows = broken.nonzero()[:, 0].tolist()
            self._guilty |= {self._places[part.rows[row].trace] for row in rows}
        super()._complete(part, logprobs, entropies)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A micro-batch; what it adds to the mean loss that is logged is finite."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        # The trainer zeroes its sum by taking it away from itself, which NaN would outlive.
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # The last word before the optimizer's step; the norm is that before clipping.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self._any_process_found(norm):
            what, guilty = self._what or "gradient", sorted(self._guilty)
            self._what, self._guilty = None, set()
            model.zero_grad(set_to_none=True)  # an optimizer leaves alone what has no gradient
            self._on_nonfinite(NonFinite(self.state.global_step + 1, what, guilty))
        return norm

    def _any_process_found(self, norm: Any) -> bool:
        value = float(norm) if norm is not None else 0.0
        found = self._what is not None or not math.isfinite(value)
        if self.accelerator.num_processes == 1:
            return found
        flag = torch.tensor(float(found), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)
