"""An ordinary agent of a well-known library learns to think across boundaries, unmodified.

The problem is a number, the answer the countdown from below it. A context holds three tokens of
thinking and one is carried, so the agent must learn to go on from a single token wherever a
boundary falls; without a carryover the last problems cannot be solved by anybody.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import pytest

import delethink.envs  # noqa: F401 - registers the ids
from delethink.envs.spaces import CharacterTokenizer
from delethink.types import Problem

pytestmark = [pytest.mark.integration, pytest.mark.slow]

LARGEST, SEED = 5, 0
STEPS, ROUNDS = 8_192, 25  # it is solved after a few rounds


class Countdown:
    def problem(self, split: str, index: int) -> Problem:
        number = index % LARGEST + 1
        return Problem(str(number), "".join(map(str, range(number - 1, -1, -1))))


def progress(text: str, answer: str) -> float:
    """The share of the answer that is right from its start; a text that goes on loses some."""
    pairs = zip(text, answer, strict=False)
    right = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(answer)))
    return right / len(answer) - 0.25 * (len(text) > len(answer))


def make(carryover_size: int = 1) -> Any:
    return gymnasium.make(
        "delethink/TokenThinking-v0",
        task=Countdown(),
        reward=progress,
        tokenizer=CharacterTokenizer("012345", before_thinking=""),
        max_query_tokens=1,
        context_size=3,
        carryover_size=carryover_size,
        max_chunks=4,
    )


def solved(agent: Any, carryover_size: int = 1) -> list[int]:
    """The numbers that are counted down from without a fault, the end of the answer included."""
    env, right = make(carryover_size), []
    for number in range(1, LARGEST + 1):
        problem = Countdown().problem("train", number - 1)
        observation, _ = env.reset(options={"problem": problem})
        terminated = truncated = False
        while not (terminated or truncated):
            action, _ = agent.predict(observation, deterministic=True)
            observation, reward, terminated, truncated, _ = env.step(action)
        right += [number] if terminated and reward == 1.0 else []
    return right


def test_ppo_of_stable_baselines3_solves_it() -> None:
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    agent = stable_baselines3.PPO(
        "MultiInputPolicy",
        make(),
        n_steps=1024,
        batch_size=256,
        n_epochs=8,
        learning_rate=1e-3,
        gamma=0.95,
        ent_coef=0.005,
        seed=SEED,
        device="cpu",
    )
    assert len(solved(agent)) < LARGEST, "there was nothing to learn"
    for _ in range(ROUNDS):
        agent.learn(STEPS)
        if len(solved(agent)) == LARGEST:
            break
    assert solved(agent) == list(range(1, LARGEST + 1))
    assert max(solved(agent, carryover_size=0), default=0) <= 3, "without a carryover it forgets"


def test_the_checker_of_stable_baselines3_finds_no_fault() -> None:
    pytest.importorskip("stable_baselines3")
    import warnings

    from stable_baselines3.common.env_checker import check_env

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make().unwrapped)
