"""Check of gold answers: whether a reward can read them.

A problem whose gold answer the reward cannot read scores 0 or ``None`` for ever. A task leaves such
problems out and counts them. A reward with ``@reads_gold(check)`` has its check as ``can_read``, so
that a task finds it on the registered function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

GradingFunction = TypeVar("GradingFunction", bound=Callable[..., Any])
GoldCheck = Callable[[str, Mapping[str, Any]], bool]


def reads_gold(check: GoldCheck) -> Callable[[GradingFunction], GradingFunction]:
    """Give a reward the check ``can_read(answer, metadata)`` of gold answers."""

    def mark(function: GradingFunction) -> GradingFunction:
        function.can_read = check  # type: ignore[attr-defined]
        return function

    return mark


def can_read(reward: Callable[..., Any], answer: str, metadata: Mapping[str, Any]) -> bool:
    """Return whether a reward can read the gold answer; true for a reward without a check."""
    check: GoldCheck | None = getattr(reward, "can_read", None)
    return check is None or check(answer, metadata)
