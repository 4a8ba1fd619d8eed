"""What each sampled token weighs in the loss.

The loss of an optimizer step is a sum over all sampled tokens of its traces, each term (clipped
ratio times advantage, TRL's own) times a weight. For the method that weight is 1/(N l(tau)): a
trace is divided by its own number of sampled tokens and the traces are averaged (arXiv 2510.06557,
equation 3). N counts the traces of the optimizer step that have a place in it, so the scale moves
neither with the number of chunks nor with micro-batches or processes.
"""

from __future__ import annotations

from typing import Literal

LossType = Literal["grpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"]


def token_weight(
    loss_type: LossType, length: int, *, traces: int, tokens: int, budget: int
) -> float:
    """Weight of each sampled token of a trace in the loss of its optimizer step.

    Args:
        loss_type: under TRL's names.
        length: sampled tokens of the trace, l(tau).
        traces: in the optimizer step, N; those left out of the loss do not count.
        tokens: sampled in all of them.
        budget: the most sampled tokens of a trace, n.
    """
    if loss_type in ("grpo", "sapo"):
        return 1 / (traces * length)
    if loss_type == "dr_grpo":
        return 1 / (traces * budget)
    if loss_type in ("dapo", "cispo"):
        return 1 / tokens
    return 1 / traces  # luspo: a trace weighs as much as it is long
