"""Rewards of environments: named, written as a mapping or given as a function, called one way."""

from __future__ import annotations

import asyncio
import copy
import functools
import os
import pickle
from typing import Any, ClassVar

import gymnasium
import pytest

import delethink.envs  # noqa: F401 - registers the ids
from delethink.envs.reward import _POOLS, EpisodeReward
from delethink.errors import ConfigError, RewardError
from delethink.scoring.reward import Traits, light
from delethink.scoring.rollouts import attempt_from_text
from delethink.types import Problem

THIS_PROCESS = os.getpid()
SAID = attempt_from_text(Problem("q", "42", {"level": 3}), r"six</think>\boxed{43}", length=5)


def paid(reward: Any) -> float:
    return EpisodeReward(reward)(SAID)


@light
def by_name(answer: str, length: int, metadata: dict[str, Any], scale: float = 1.0) -> float:
    return scale * (length + metadata["level"] + float(answer))


def where_it_runs(text: str) -> float:
    return float(os.getpid() == THIS_PROCESS)


class Grader:
    def __call__(self, text: str, answer: str) -> bool:
        return text > answer

    def method(self, stop: Any) -> float:
        return 2.0 if stop.value == "completed" else 0.0


async def slow(text: str) -> float:
    await asyncio.sleep(0)
    return 3.0


def test_a_function_and_a_name_are_called_alike() -> None:
    assert paid(by_name) == paid(f"{__name__}:{by_name.__name__}") == 50.0


@pytest.mark.parametrize(
    ("reward", "value"),
    [
        (lambda text, answer: text.count(answer), 0.0),
        (functools.partial(by_name, scale=2), 100.0),
        (Grader(), 1.0),
        (Grader().method, 2.0),
        (slow, 3.0),
        (lambda answer, text="?", **other: float(len(other) + len(text) > 9), 1.0),
        ({"name": "closes_thinking"}, 1.0),
        ({"name": "numeric", "args": {"relative": 0.5}}, 1.0),
        ({"name": "numeric", "args": None}, 0.0),
    ],
)
def test_every_way_to_give_a_reward(reward: Any, value: float) -> None:
    assert paid(reward) == value


def test_a_function_that_a_recipe_isolates_is_isolated_here_too() -> None:
    """A function without a mark runs in the process of whoever passes it."""
    name = f"{__name__}:{where_it_runs.__name__}"
    reward = EpisodeReward(name)
    try:
        assert reward(SAID) == 0.0
        assert copy.deepcopy(reward)._scorer is None
        assert pickle.loads(pickle.dumps(reward))._scorer is None
        other = EpisodeReward(name)
        assert other(SAID) == 0.0
        assert other._scorer is not None
        assert other._scorer.pool is reward._scorer.pool, "environments share the verifiers"  # type: ignore[union-attr]
        other.close()
        assert reward(SAID) == 0.0, "one that is closed stops no verifier of another"
    finally:
        reward.close()
    assert not _POOLS, "the last one stops them"
    assert paid(where_it_runs) == 1.0

    @functools.wraps(where_it_runs)
    def marked(text: str) -> float:
        return where_it_runs(text)

    marked.__delethink_traits__ = Traits("isolated")  # type: ignore[attr-defined]
    assert EpisodeReward(marked).reward.kind == "isolated"


def test_verifiers_run_beside_the_processes_of_a_vector() -> None:
    """Those processes are daemons, which ``multiprocessing`` forbids to have children."""
    envs = gymnasium.make_vec(
        "delethink/Thinking-v0",
        num_envs=1,
        vectorization_mode="async",
        reward=f"{__name__}:{where_it_runs.__name__}",
    )
    envs.reset(seed=0)
    assert envs.step(([1],))[1].tolist() == [0.0]
    envs.close()


def test_a_reward_works_where_an_event_loop_runs() -> None:
    async def notebook() -> float:
        return paid(slow)

    assert asyncio.run(notebook()) == 3.0


@pytest.mark.parametrize(
    ("reward", "text"),
    [
        (lambda txt, answer: 1.0, "needs 'txt', which is no input. Did you mean 'text'?"),
        (lambda text, gold: 1.0, "needs 'gold', which is no input"),
        (lambda *both: 1.0, "names no input"),
        (lambda **everything: 1.0, "names no input"),
        (eval("lambda text, /: 1.0"), "takes 'text' by position"),
        (lambda text, correct: 1.0, "cannot score a single trace"),
        (lambda completions: [1.0], "cannot score a single trace"),
        (max, "does not say its parameters"),
        (
            {"name": "numeric", "args": {"relativ": 1}},
            "no setting 'relativ'. Did you mean 'relative'?",
        ),
        ({"nam": "math"}, "unknown key 'nam' of a reward. Did you mean 'name'?"),
        ({"name": "exakt"}, "unknown reward 'exakt'. Did you mean 'exact'?"),
        (
            {"name": "exact", "args": [1]},
            "a reward must be a name, or a mapping with name and args",
        ),
        ({"name": 3}, "a reward must be a name, or a mapping with name and args"),
        ({}, "a reward must be a name, or a mapping with name and args"),
        ({"name": "exact", "weight": 2}, "unknown key 'weight' of a reward"),
        (3, "a reward must be a registered name, a mapping with name and args, or a function"),
    ],
)
def test_a_wrong_reward_is_told_when_it_is_given(reward: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        gymnasium.make("delethink/Thinking-v0", reward=reward)
    assert text in str(caught.value)


class Counting:
    """A task with a reward of its own."""

    rewards: ClassVar = {"numeric": 1.0, "exact": 0.5}

    def problem(self, split: str, index: int) -> Problem:
        return Problem("01:0", "0.5")


def test_the_reward_of_the_task_is_the_default() -> None:
    def reward_name(**options: Any) -> str:
        env: Any = gymnasium.make("delethink/Thinking-v0", **options).unwrapped
        return str(env.reward.reward.name)

    class Plain:
        def problem(self, split: str, index: int) -> Problem:
            return Problem("01:0", "1")

    assert reward_name(task=Counting()) == "numeric"
    assert reward_name(task=Counting(), reward="exact") == "exact"
    assert reward_name(task=Plain()) == reward_name() == "exact"


def test_a_function_declared_to_return_none_is_refused() -> None:
    def forgets(text: str) -> None:
        """Return nothing."""

    with pytest.raises(ConfigError, match="'forgets' is declared to return None"):
        EpisodeReward(forgets)


@pytest.mark.parametrize("value", [None, "much", float("nan"), float("inf"), [1.0], 10**400, 1j])
def test_a_value_that_is_no_finite_number_is_never_a_zero(value: Any) -> None:
    def odd(text: str) -> Any:
        return value

    env = gymnasium.make("delethink/Thinking-v0", reward=odd)
    env.reset(seed=0)
    env.step([6])
    with pytest.raises(RewardError, match="'odd' returned .* needs a finite number"):
        env.step([1])
    env.reset(seed=0)
    env.step([6])


def test_a_verifier_that_fails_says_why() -> None:
    async def breaks(text: str) -> float:
        raise RuntimeError("no luck")

    with pytest.raises(RewardError, match=r"no value for this trace \(.*no luck \(test_env_"):
        paid(breaks)


def test_the_error_of_a_function_is_its_own() -> None:
    @light
    def breaks(text: str) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        paid(breaks)
