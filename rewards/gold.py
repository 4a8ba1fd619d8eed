"""Check of gold answers: whether a reward can ever be 1 for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from delethink.rewards.code import can_read_tests, passes_tests
from delethink.rewards.match import can_read_crossword, choice_letter, crossword, multiple_choice
from delethink.rewards.math import can_read_math, math_equal
from delethink.rewards.numeric import can_read_number, numeric


def can_read(reward: Callable[..., Any], answer: str, metadata: Mapping[str, Any]) -> bool:
    """Return whether a reward can read the gold answer of a problem.

    A problem with another gold answer scores 0 or ``None`` for ever, so a task leaves it out and
    counts it. Rewards that this module does not know can read everything.
    """
    if reward is passes_tests:
        return can_read_tests(metadata)
    if reward is multiple_choice:
        return choice_letter(answer) is not None
    checks: dict[Any, Callable[[str], bool]] = {
        math_equal: can_read_math,
        numeric: can_read_number,
        crossword: can_read_crossword,
    }
    return checks[reward](answer) if reward in checks else True
