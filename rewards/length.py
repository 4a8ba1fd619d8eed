"""Rewards for the length of a trace. None of them reads the text.

``length`` counts sampled tokens, carried ones once. ``correct`` is the value of the recipe's
accuracy reward for the same trace. Without a value, rewards that need ``correct`` do not apply.
"""

from __future__ import annotations

import math

from delethink.errors import ConfigError
from delethink.scoring.reward import light
from delethink.types import TraceStop


@light
def cosine(
    length: int,
    budget: int,
    correct: float | None,
    right: tuple[float, float] = (1.0, 0.5),
    wrong: tuple[float, float] = (-1.0, -0.5),
) -> float | None:
    """Return most for short right traces, least for short wrong ones (arXiv 2502.03373, C.1).

    Formula: end + (start - end) (1 + cos(pi length / budget)) / 2.

    Args:
        length: sampled tokens of the trace.
        budget: most tokens of a trace.
        correct: the accuracy reward.
        right: values of a right trace at length 0 and at the whole budget.
        wrong: the same for a wrong trace.
    """
    if correct is None:
        return None
    start, end = right if correct >= 0.5 else wrong
    done = min(1.0, length / budget)
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


@light
def overlong(length: int, budget: int, cache: int) -> float:
    """Return the soft overlong punishment of DAPO (arXiv 2503.14476, equation 13).

    The value is 0 up to ``budget - cache`` tokens, then falls linearly to -1 at ``budget``.

    Args:
        length: sampled tokens of the trace.
        budget: most tokens of a trace.
        cache: tokens before the budget over which the value falls.
    """
    if not 0 < cache <= budget:
        raise ConfigError(f"overlong needs 0 < cache <= {budget} (the budget), got cache={cache}")
    return -min(1.0, max(0.0, length - (budget - cache)) / cache)


@light
def chunks(
    num_chunks: int, max_chunks: int, correct: float | None = None, only_right: bool = True
) -> float | None:
    """Return (chunks - 1) / (max_chunks - 1), to encourage thinking across boundaries.

    By default only right traces get the reward, because rewards for wrong ones teach rambling.

    Args:
        num_chunks: chunks of the trace.
        max_chunks: most chunks of a trace.
        correct: the accuracy reward.
        only_right: reward right traces only.
    """
    if only_right and correct is None:
        return None
    if max_chunks == 1 or (only_right and (correct or 0.0) < 0.5):
        return 0.0
    return (num_chunks - 1) / (max_chunks - 1)


@light
def ternary(
    correct: float | None,
    stop: TraceStop,
    right: float = 1.0,
    wrong: float = 0.0,
    budget_score: float = -1.0,
) -> float | None:
    """Return one of three values: right, wrong, or wrong with the budget used up.

    Args:
        correct: the accuracy reward.
        stop: end of the trace.
        right: value of a right trace.
        wrong: value of a wrong trace.
        budget_score: value of a wrong trace that used up its budget.
    """
    if correct is None:
        return None
    if correct >= 0.5:
        return right
    return budget_score if stop is TraceStop.BUDGET else wrong
