"""Scoring goes on while others are sampled."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from delethink.chunking import ChunkSpec
from delethink.errors import UserError
from delethink.policy import Sampling, ScriptedPolicy
from delethink.scoring.reward import Reward
from delethink.scoring.rollouts import run_scored_rollouts
from delethink.scoring.scorer import Scorer
from delethink.types import Problem

EOS = 1


class Letters:
    chat_template = None

    def __call__(self, text: str) -> Any:
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        raise AssertionError

    def decode(self, token_ids: Any, **options: Any) -> str:
        return "".join(chr(i) for i in token_ids if i != EOS)


def play(policy: ScriptedPolicy, scorer: Scorer, number: int, spec: ChunkSpec) -> Any:
    problems = [Problem(f"p{i}", str(i)) for i in range(number)]
    queries = [tuple(map(ord, p.prompt)) for p in problems]
    samplings = [Sampling()] * number
    return asyncio.run(
        run_scored_rollouts(policy, spec, problems, queries, samplings, Letters(), scorer)
    )


def test_a_trace_is_scored_while_others_are_sampled() -> None:
    """The second trace waits, chunk after chunk, until the first one's reward has been paid."""
    paid: list[str] = []

    async def reward(answer: str) -> float:
        paid.append(answer)
        return float(answer)

    def speak(prompt: tuple[int, ...], limit: int) -> tuple[int, ...]:
        ends = prompt[1] == ord("0") or "0" in paid
        return (65, EOS) if ends else (65,) * limit

    with Scorer([Reward("reward", reward)]) as scorer:
        played = play(ScriptedPolicy(speak), scorer, 2, ChunkSpec(4, 2, 1000, 0))
    assert paid == ["0", "1"]
    assert [score.total for score in played.scores] == [0.0, 1.0]
    assert len(played.traces[1].chunks) < 1000


def test_scores_keep_the_order_of_the_problems() -> None:
    async def reward(answer: str) -> float:
        for _ in range(10 - int(answer)):
            await asyncio.sleep(0)
        return float(answer)

    with Scorer([Reward("reward", reward)]) as scorer:
        played = play(ScriptedPolicy(lambda p, n: (65, EOS)), scorer, 9, ChunkSpec(4, 2, 3, 0))
    assert [score.total for score in played.scores] == list(map(float, range(9)))


def test_a_users_mistake_in_a_reward_gives_up_the_rest() -> None:
    async def reward(text: str) -> float:
        raise UserError("mend me")

    with Scorer([Reward("reward", reward)]) as scorer, pytest.raises(UserError, match="mend me"):
        play(ScriptedPolicy(lambda p, n: (65, EOS)), scorer, 3, ChunkSpec(4, 2, 3, 0))
