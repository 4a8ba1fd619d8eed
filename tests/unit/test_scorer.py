"""The scorer: weights, missing values, failed rewards, and the order of rewards."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from delethink.errors import ConfigError, MissingExtraError
from delethink.rewards.length import cosine, overlong
from delethink.rewards.match import exact_match
from delethink.scoring.reward import Reward, isolated, light
from delethink.scoring.scorer import Scorer, ScoringRules
from delethink.types import Attempt, Problem, Score, TraceStop


def attempt(
    text: str = "</think>1", stop: TraceStop = TraceStop.COMPLETED, length: int = 50, **extra: Any
) -> Attempt:
    problem = Problem("q", "1", extra)
    return Attempt(problem, text, stop, length, 2, 100, 5, (5, 6, 7))


def constant(value: Any) -> Any:
    @light
    def reward(text: str) -> Any:
        return value

    return reward


def score(*rewards: Reward, of: Attempt | None = None, **options: Any) -> Score:
    with Scorer(rewards, **options) as scorer:
        return scorer.score_now([of or attempt()])[0]


def test_the_sum_is_weighted_and_the_parts_are_not() -> None:
    found = score(
        Reward("exact", exact_match, 2.0),
        Reward("long", overlong, 0.5, {"cache": 60}),
        of=attempt(length=70),
    )
    assert found.parts == {"exact": 1.0, "long": -0.5}
    assert found.total == 2.0 * 1.0 + 0.5 * -0.5
    assert found.errors == {}


def test_none_does_not_apply() -> None:
    one, none = Reward("one", constant(1)), Reward("none", constant(None))
    assert score(one, none) == Score(1.0, {"one": 1.0, "none": None})
    assert score(none) == Score(None, {"none": None})


def test_any_accepted_answer_is_right() -> None:
    for text, value in (("</think>1/2", 1.0), ("</think>0.5", 1.0), ("</think>2", 0.0)):
        of = attempt(text, accepted_answers=["1/2", "0.5"])
        assert score(Reward("exact", exact_match), of=of).parts == {"exact": value}

    @light
    def careful(answer: str) -> float | None:
        return {"a": None, "b": 0.5}.get(answer, 0.0) if answer != "broken" else 1 / 0

    def found(*answers: str) -> Score:
        return score(Reward("careful", careful), of=attempt(accepted_answers=[*answers]))

    assert found("a", "b", "c").total == 0.5
    assert found("a", "a").total is None
    assert "division by zero" in found("broken", "b").errors["careful"]


def test_a_weight_of_zero_only_measures() -> None:
    found = score(Reward("exact", exact_match, 1.0), Reward("seen", constant(7), 0.0))
    assert (found.total, found.parts["seen"]) == (1.0, 7.0)


@pytest.mark.parametrize(
    ("policy", "total"), [("score", 1.0), ("mask", 1.0), ("zero", 0.0), ("penalty", 0.75)]
)
def test_running_out_of_budget_is_scored_as_the_recipe_says(policy: str, total: float) -> None:
    out = attempt(stop=TraceStop.BUDGET)
    exact, rules = Reward("exact", exact_match), ScoringRules(out_of_budget=policy, penalty=0.25)
    found = score(exact, of=out, rules=rules)
    assert (found.total, found.parts) == (total, {"exact": 1.0})
    assert score(exact, rules=rules).total == 1.0
    assert score(exact, of=attempt(stop=TraceStop.ERROR), rules=rules).total is None


@pytest.mark.parametrize("stop", [TraceStop.ERROR, TraceStop.ABORTED])
def test_a_trace_that_failed_is_not_scored(stop: TraceStop) -> None:
    failed = attempt(stop=stop)
    assert score(Reward("exact", exact_match), of=failed) == Score(None, {"exact": None})
    assert (
        score(Reward("exact", exact_match), of=failed, rules=ScoringRules(error=-2.0)).total == -2.0
    )


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (float("nan"), "must be finite, got nan"),
        (float("inf"), "must be finite, got inf"),
        ("high", "a number or None, got str"),
        ([1], "a number or None, got list"),
    ],
)
def test_what_is_no_reward_is_an_error_and_not_a_zero(value: Any, reason: str) -> None:
    found = score(Reward("odd", constant(value)))
    assert found.total is None
    assert found.parts == {"odd": None}
    assert reason in found.errors["odd"]


def test_a_reward_that_raises_is_an_error_with_its_reason() -> None:
    @light
    def broken(text: str) -> float:
        raise KeyError("no such key")

    found = score(Reward("fine", constant(1)), Reward("broken", broken))
    assert found.total is None
    assert found.parts == {"fine": 1.0, "broken": None}
    [reason] = found.errors.values()
    assert reason.startswith("error: KeyError: 'no such key' (test_scorer.py, line ")
    assert score(Reward("broken", broken), rules=ScoringRules(error=0.0)).total == 0.0


def test_a_mistake_in_the_settings_stops_the_run() -> None:
    with pytest.raises(ConfigError, match="0 < cache <= 100"):
        score(Reward("overlong", overlong, args={"cache": 0}))


def test_rewards_may_be_asynchronous() -> None:
    async def judge(text: str, answer: str) -> float:
        await asyncio.sleep(0)
        return 0.25

    assert score(Reward("judge", judge)).total == 0.25


def test_an_asynchronous_reward_does_not_hold_up_the_others() -> None:
    order: list[str] = []

    async def waits(text: str) -> float:
        while text == "first" and "second" not in order:
            await asyncio.sleep(0)
        order.append(text)
        return 1.0

    with Scorer([Reward("waits", waits)]) as scorer:
        scorer.score_now([attempt("first"), attempt("second")])
    assert order == ["second", "first"]


def test_a_function_that_no_worker_could_import_runs_in_a_thread() -> None:
    def local(text: str, answer: str) -> float:
        return 0.5

    reward = Reward("local", local)
    assert reward.kind == "thread"
    assert score(reward).total == 0.5


def test_a_shaping_reward_gets_the_accuracy_of_the_same_trace() -> None:
    exact = Reward("exact", exact_match, 0.0)
    shaped = Reward("cosine", cosine)
    assert score(exact, shaped).total == pytest.approx(0.75)
    assert score(exact, shaped, of=attempt("</think>2")).total == pytest.approx(-0.75)
    assert score(Reward("exact", constant(None)), shaped) == Score(
        None, {"exact": None, "cosine": None}
    )


def test_where_accuracy_fails_what_builds_on_it_is_not_computed() -> None:
    found = score(Reward("exact", constant("x")), Reward("cosine", cosine))
    assert found.parts == {"exact": None, "cosine": None}
    assert list(found.errors) == ["exact"]


def test_accuracy_cannot_build_on_itself() -> None:
    with pytest.raises(ConfigError, match="evaluation.reward"):
        Scorer([Reward("cosine", cosine)])


def trl_style(completions: list[Any], solution: list[str], level: list[int], **_: Any) -> Any:
    assert completions[0][0]["role"] == "assistant"
    pairs = zip(completions, solution, level, strict=True)
    return [float(c[0]["content"].endswith(gold)) * n for c, gold, n in pairs]


def test_a_function_of_trls_kind_gets_columns() -> None:
    with Scorer([Reward("theirs", trl_style)]) as scorer:
        found = scorer.score_now(
            [attempt(level=3), attempt("</think>2", level=3), attempt(stop=TraceStop.ERROR)]
        )
    assert [s.total for s in found] == [3.0, 0.0, None]


def test_a_function_of_trls_kind_may_be_asynchronous_and_say_none() -> None:
    async def theirs(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        return [None] * len(completions)

    assert score(Reward("theirs", theirs)).total is None


def test_a_function_of_trls_kind_that_forgets_one_is_an_error() -> None:
    found = score(Reward("theirs", lambda completions, **_: []))
    assert "0 rewards for 1 completions" in found.errors["theirs"]


def test_a_function_of_trls_kind_may_be_the_accuracy() -> None:
    exact = Reward("theirs", lambda completions, **_: [1.0] * len(completions), 0.0)
    assert score(exact, Reward("cosine", cosine)).total == pytest.approx(0.75)


def test_trls_own_rewards_work_here() -> None:
    rewards = pytest.importorskip("trl.rewards")
    found = score(Reward("format", rewards.think_format_reward), of=attempt("<think>a</think>1"))
    assert found.total == 1.0


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Reward("overlong", overlong), "needs the setting 'cache'"),
        (lambda: Reward("overlong", overlong, args={"cash": 3}), "Did you mean 'cache'"),
        (lambda: Reward("mine", lambda words: 1.0), "needs the setting 'words'"),
        (lambda: Scorer([]), "need different names"),
        (lambda: Scorer([Reward("a", exact_match)] * 2), "need different names"),
        (lambda: Scorer([Reward("exact", exact_match)], "exat"), "Did you mean 'exact'"),
    ],
)
def test_mistakes_are_explained(make: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make()


def test_a_missing_package_is_named_before_anything_runs() -> None:
    @isolated("no_such_package", "math")
    def verifier(text: str) -> float:
        return 1.0

    with pytest.raises(MissingExtraError, match=r"pip install -e '\.\[math\]'"):
        Reward("verifier", verifier).check()


def test_the_order_of_attempts_is_kept() -> None:
    texts = [f"</think>{i % 3}" for i in range(30)]
    with Scorer([Reward("exact", exact_match)]) as scorer:
        found = scorer.score_now([attempt(text) for text in texts])
    assert [s.total for s in found] == [float(i % 3 == 1) for i in range(30)]
