"""Held-out evaluation during training: answers without a grade, and traces without a mark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from delethink.chunking import ChunkSpec
from delethink.envs.spaces import CharacterTokenizer
from delethink.errors import ConfigError
from delethink.evaluation.heldout import Evaluator, HeldOutResult
from delethink.policy import ScriptedPolicy
from delethink.scoring.reward import Reward
from delethink.scoring.scorer import Scorer
from delethink.types import Problem

SPEC = ChunkSpec(context_size=64, carryover_size=32, max_chunks=2, head_size=0)


def result_of(
    reward: Callable[..., Any], answers: Sequence[str], said: str = "0</think>4<eos>"
) -> HeldOutResult:
    """Evaluate on one problem per gold answer; every trace is the text ``said``."""
    tokenizer = CharacterTokenizer()
    problems = [Problem(f"2:2:{i}", answer) for i, answer in enumerate(answers)]
    ids = tuple(tokenizer(said)["input_ids"])
    with Scorer([Reward("correct", reward, isolate=False)]) as scorer:
        evaluator = Evaluator(problems, scorer, tokenizer, temperature=1.0, seed=0)
        return evaluator.run(ScriptedPolicy([ids] * len(problems)), SPEC, "held-out")


def none_without_gold(text: str, answer: str) -> float | None:
    return None if answer == "?" else float(text.endswith(f"</think>{answer}"))


def test_none_is_unscored_and_not_wrong() -> None:
    found = result_of(none_without_gold, ["4", "?", "5", "?"])
    assert (found.accuracy, found.ungraded, found.unscored) == (0.5, 2, 0)
    assert found.num_problems == 4
    low, high = found.accuracy_interval
    wide_low, wide_high = result_of(none_without_gold, ["4", "5"] * 8).accuracy_interval
    assert low < wide_low < 0.5 < wide_high < high  # the interval counts graded traces only
    assert found.accuracy_text("-").startswith("0.500 (")
    assert HeldOutResult.from_dict(found.as_dict()) == found


def test_without_any_grade_there_is_no_accuracy() -> None:
    found = result_of(none_without_gold, ["?", "?"])
    assert (found.accuracy, found.ungraded) == (None, 2)
    assert found.accuracy_interval == (0.0, 1.0)
    assert found.accuracy_text(" to ") == "none"
    assert HeldOutResult.from_dict(found.as_dict()) == found


def test_a_failed_reward_still_counts_as_wrong() -> None:
    def fails(text: str, answer: str) -> float:
        return 1.0 if answer == "4" else 1 / 0

    found = result_of(fails, ["4", "5"])
    assert (found.accuracy, found.unscored, found.ungraded) == (0.5, 1, 0)
    assert "ZeroDivisionError" in str(found.first_error)


def test_a_share_is_no_accuracy() -> None:
    with pytest.raises(ConfigError, match=r"gave 0\.5, and an accuracy needs 0 or 1"):
        result_of(lambda text: 0.5, ["4", "4"])


@pytest.mark.parametrize(("said", "share"), [("0</think>4<eos>", 1.0), ("04<eos>", 0)])
def test_the_share_of_marked_traces_is_known(said: str, share: float) -> None:
    assert result_of(none_without_gold, ["4", "4"], said).marked == share


def test_rows_of_earlier_releases_are_read() -> None:
    row = result_of(none_without_gold, ["4", "5"]).as_dict()
    for key in ("ungraded", "marked"):
        del row[key]
    assert HeldOutResult.from_dict(row).accuracy == 0.5
