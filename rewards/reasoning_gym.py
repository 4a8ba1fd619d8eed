"""Reward by the scorers of reasoning-gym (arXiv 2505.24760)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from delethink.rewards.match import normalize
from delethink.scoring.answer import extract_answer, final_answer
from delethink.scoring.reward import evaluates_output
from delethink.types import END_OF_THINKING

# Tasks with a scorer accepting any answer (reasoning-gym 0.1.25); compared as text instead.
_BROKEN_SCORERS = {"game_of_life_halting"}


def _prepare() -> None:
    import reasoning_gym  # noqa: F401 - takes seconds


def _load_dataset(kwargs: Mapping[str, Any]) -> None:
    if kwargs["metadata"]["dataset"] not in _BROKEN_SCORERS:
        _dataset_of(kwargs["metadata"])


def _with_gold_answer(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call with the gold answer as output."""
    answer = kwargs["metadata"]["entry"].get("answer")
    end = kwargs.get("end", END_OF_THINKING) or ""
    return {**kwargs, "text": f"{end}<answer>{answer}</answer>"}


@evaluates_output(
    "reasoning_gym",
    "tasks",
    _prepare,
    only_expressions=True,
    warm_up=_load_dataset,
    control=_with_gold_answer,
)
def gym_score(
    text: str,
    metadata: Mapping[str, Any],
    partial: bool = False,
    end: str | None = END_OF_THINKING,
) -> float:
    """Return 1.0 if the task's own scorer gives all points, else 0.0.

    With ``partial`` the value is the scorer's number between 0 and 1. Many scorers give points to
    any text containing the right answer, which policies exploit, so full points are the default.
    Some scorers evaluate the answer as Python, so they run inside the isolation.

    The answer is the last ``<answer>`` or box after the end of thinking, else all text after it.

    Args:
        text: the trace.
        metadata: of the problem.
        partial: return the scorer's own number instead of 0 or 1.
        end: the end of thinking.
    """
    final = extract_answer(text, end) or final_answer(text, end)
    if not final:
        return 0.0
    if metadata["dataset"] in _BROKEN_SCORERS:
        return float(normalize(final) == normalize(str(metadata["entry"]["answer"])))
    points = float(_dataset_of(metadata).score_answer(answer=final, entry=metadata["entry"]))
    return points if partial else float(points >= 1.0 - 1e-9)


def _dataset_of(metadata: Mapping[str, Any]) -> Any:
    return _dataset(metadata["dataset"], json.dumps(metadata.get("config", {}), sort_keys=True))


@lru_cache(maxsize=256)
def _dataset(name: str, config: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, **json.loads(config) | {"seed": 0, "size": 1})
