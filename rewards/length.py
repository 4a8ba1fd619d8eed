"""Rewards that shape how long a trace is. None of them reads the text.

``length`` counts sampled tokens, carried ones once. What depends on being right gets ``correct``,
the value of the recipe's accuracy reward for the same trace, and does not apply where that has
none.
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
    """Short right traces earn most, short wrong ones lose most (arXiv 2502.03373, C.1).

    Half a cosine from the first value, at no tokens, to the second, at the whole budget:
    end + (start - end) (1 + cos(pi length / budget)) / 2.
    """
    if correct is None:
        return None
    start, end = right if correct >= 0.5 else wrong
    done = min(1.0, length / budget)
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


@light
def overlong(length: int, budget: int, cache: int) -> float:
    """The soft overlong punishment of DAPO (arXiv 2503.14476, equation 13).

    0 up to ``budget - cache`` tokens, then linearly down to -1 at ``budget``.
    """
    if not 0 < cache <= budget:
        raise ConfigError(f"overlong needs 0 < cache <= {budget}, the budget; got {cache}")
    return -min(1.0, max(0.0, length - (budget - cache)) / cache)


@light
def chunks(
    num_chunks: int, max_chunks: int, correct: float | None = None, only_right: bool = True
) -> float | None:
    """Encourages thinking on over boundaries: (chunks - 1) / (max_chunks - 1), from 0 to 1.

    By default for right traces alone: paid to wrong ones too, it teaches to ramble.
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
    """Three values: right, wrong, and out of budget without being right."""
    if correct is None:
        return None
    if correct >= 0.5:
        return right
    return budget_score if stop is TraceStop.BUDGET else wrong
