"""The grader accepts its own gold answer, and no wrong one: over every shipped task, model-free."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from delethink.config import RewardConfig, ScoringConfig
from delethink.envs.gym import GymTask
from delethink.errors import ConfigError
from delethink.registry import make_task, names
from delethink.rewards.reasoning_gym import gym_score
from delethink.scoring.pool import VerifierPool, VerifierSettings
from delethink.tasks import Task, demonstrations_of, rewards_of, task_size
from delethink.training.preflight import make_scorer
from delethink.types import Attempt, Problem, TraceStop

pytest.importorskip("math_verify")
pytest.importorskip("reasoning_gym")
pytestmark = pytest.mark.integration

# Of reasoning-gym's tasks: two of each kind of scorer here, all of them in the slow test.
SOME = ["chain_sum", "countdown", "game_of_life_halting", "prime_factorization", "spiral_matrix"]
WITHOUT_GOLD = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
WITHOUT_PROBLEMS = {"composite"}  # made of other tasks, which its config has to name


def scores(task: Task, problems: list[Problem]) -> list[tuple[str, float | None]]:
    configs = {name: RewardConfig(weight=weight) for name, weight in rewards_of(task).items()}
    scorer = make_scorer(configs, next(iter(configs)), ScoringConfig(num_verifiers=1))
    said = [
        (kind, problem, text)
        for problem in problems
        for kind, text in zip(("right", "wrong"), demonstrations_of(task, problem), strict=True)
        if text is not None
    ]
    attempts = [Attempt(p, text, TraceStop.COMPLETED, 9, 1, 9, 1) for _, p, text in said]
    try:
        found = scorer.score_now(attempts)
    finally:
        scorer.close()
    return [(kind, score.total) for (kind, *_), score in zip(said, found, strict=True)]


def arguments(name: str, folder: Path, hub_copy: Callable[[str], str]) -> dict[str, Any]:
    if name == "automaton":
        return {"min_steps": 2, "max_steps": 9}
    if name == "dataset":
        rows = [{"problem": str(i), "answer": f"\\frac{{{i}}}{{7}}"} for i in range(9)]
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"dataset": str(folder / "a.jsonl")}
    return {"dataset": hub_copy(name)}


TASKS = {stands_for: name for name, stands_for in reversed(names("delethink.tasks").items())}


@pytest.mark.parametrize("name", sorted(set(TASKS.values()) - {"reasoning_gym"}))
def test_gold_scores_one_and_wrong_scores_zero(
    name: str, tmp_path: Path, hub_copy: Callable[[str], str]
) -> None:
    task = make_task(name, arguments(name, tmp_path, hub_copy), 0)
    problems = []
    for split in ("train", "heldout"):
        size = task_size(task, split)
        problems += [task.problem(split, i) for i in range(10 if size is None else min(size, 10))]
    found = scores(task, problems)
    assert {kind for kind, _ in found} == {"right", "wrong"}
    assert all(total == float(kind == "right") for kind, total in found), found


def check(name: str, pool: VerifierPool) -> None:
    task = GymTask(name, seed=3)
    for split in ("train", "heldout"):
        problem = task.problem(split, 1)
        assert task.problem(split, 1).prompt == problem.prompt
        right, wrong = task.demonstrations(problem)
        assert (right is None) == (name in WITHOUT_GOLD)
        for text, value in ((right, 1.0), (wrong, 0.0)):
            if text is not None:
                verdict = pool.call(gym_score, text=text, metadata=problem.metadata)
                assert verdict.value == value, (name, problem.answer, verdict.reason)


@pytest.fixture(scope="module")
def pool() -> Any:
    with VerifierPool(VerifierSettings(num_verifiers=1, timeout=60.0)) as pool:
        yield pool


@pytest.mark.parametrize("name", SOME)
def test_a_task_of_reasoning_gym_takes_its_own_answers(name: str, pool: VerifierPool) -> None:
    check(name, pool)


@pytest.mark.slow
def test_every_task_of_reasoning_gym_takes_its_own_answers(pool: VerifierPool) -> None:
    from reasoning_gym.factory import DATASETS

    for name in sorted(set(DATASETS) - WITHOUT_PROBLEMS):
        check(name, pool)


def test_questions_of_the_two_splits_are_different() -> None:
    task = GymTask("chain_sum")
    train = {task.problem("train", i).prompt for i in range(60)}
    assert not train & {task.problem("heldout", i).prompt for i in range(60)}
    assert task.problem("train", 0) != GymTask("chain_sum", seed=1).problem("train", 0)


def test_a_scorer_cannot_run_what_it_is_told(pool: VerifierPool, tmp_path: Path) -> None:
    """Several of the scorers evaluate the answer as Python."""
    problem = GymTask("spiral_matrix").problem("train", 0)
    target = tmp_path / "escaped"
    said = f"[__import__('pathlib').Path({str(target)!r}).write_text('x')]"
    pool.call(gym_score, text=f"</think><answer>{said}</answer>", metadata=problem.metadata)
    assert not target.exists()


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        ("reasoning_gym/chain_sums", {}, "Did you mean 'chain_sum'"),
        ("reasoning_gym", {}, "write reasoning_gym/chain_sum"),
        ("reasoning_gym/chain_sum", {"config": {"min_term": 3}}, "min_term"),
        ("reasoning_gym/chain_sum", {"config": {"min_terms": -3}}, "config of"),
        ("reasoning_gym/composite", {}, "at least one dataset"),
        ("automaton/chain_sum", {"min_steps": 1, "max_steps": 2}, "has no members"),
    ],
)
def test_mistakes_are_explained(name: str, args: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make_task(name, args, 0)
