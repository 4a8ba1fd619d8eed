"""The scorers that come with reasoning-gym's tasks (arXiv 2505.24760)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from delethink.rewards.exact import normalize
from delethink.scoring.answer import extract_answer, final_answer
from delethink.scoring.reward import isolated
from delethink.types import END_OF_THINKING

# Tasks whose scorer, as of reasoning-gym 0.1.25, gives all points to whatever is not empty.
_TAKE_ANYTHING = {"game_of_life_halting"}


@isolated("reasoning_gym", "tasks")
def gym_score(
    text: str,
    metadata: Mapping[str, Any],
    partial: bool = False,
    end: str | None = END_OF_THINKING,
) -> float:
    """What the task's own scorer says: 1.0 where it gives all points, else 0.0.

    With ``partial`` its own number between 0 and 1. Many of the scorers pay for an answer that
    merely contains the right one, which a policy finds out soon; so that is not the default. Some
    evaluate the answer as an expression: they run in a worker that has no rights left.

    The answer is what stands in the last ``<answer>`` or box after the end of thinking, else all
    that follows it.
    """
    said = extract_answer(text, end) or final_answer(text, end)
    if not said:
        return 0.0
    if metadata["dataset"] in _TAKE_ANYTHING:
        return float(normalize(said) == normalize(str(metadata["entry"]["answer"])))
    dataset = _dataset(metadata["dataset"], json.dumps(metadata.get("config", {}), sort_keys=True))
    points = _points(dataset, said, metadata["entry"])
    return points if partial else float(points >= 1.0 - 1e-9)


def _points(dataset: Any, said: str, entry: Mapping[str, Any]) -> float:
    """Several scorers raise at an answer out of form: no points, if they take the gold one."""
    try:
        return float(dataset.score_answer(answer=said, entry=entry))
    except MemoryError:
        raise
    except Exception:  # the boundary to graders of others
        gold = entry.get("answer")
        if isinstance(gold, str) and dataset.score_answer(answer=gold, entry=entry) > 0:
            return 0.0
        raise


@lru_cache(maxsize=256)
def _dataset(name: str, config: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, **json.loads(config) | {"seed": 0, "size": 1})
