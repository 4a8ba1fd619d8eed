"""The mark of the end of thinking in rewards, votes, forced answers, evaluations, environments."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import pytest

pytest.importorskip("transformers")

from chat_tokenizers import END, make_chat_tokenizer

from delethink.chunking import ChunkSpec
from delethink.cli.evaluate import _hints
from delethink.errors import ConfigError
from delethink.evaluation.models import LoadedModel
from delethink.evaluation.run import Evaluation, ProblemSet, evaluate
from delethink.evaluation.settings import SamplingPlan, Setting
from delethink.policy import ScriptedPolicy
from delethink.registry import names, resolve
from delethink.scoring.answer import answer_span, vote
from delethink.scoring.reward import Reward
from delethink.scoring.rollouts import attempt_from_text, make_attempt, mark_setting
from delethink.scoring.scorer import Scorer
from delethink.thinking_marks import ThinkingMarks, find_thinking_marks, marks_of
from delethink.tokenization import bind_marks, encode
from delethink.types import Chunk, Problem, StopReason, Trace, TraceStop

MARKS = ["</think>", "[/THINK]", "<|channel|>final<|message|>", "Here is my response:", None]
HARMONY_TOKENS = ("<|channel|>", "<|message|>", "<|start|>")


def marks_with(end: str | None) -> ThinkingMarks:
    return find_thinking_marks(make_chat_tokenizer(), end)


def value_of(reward: Reward, problem: Problem, text: str, marks: ThinkingMarks) -> Any:
    attempt = attempt_from_text(problem, text, marks=marks)
    return reward.function(**reward.arguments(attempt))


# -- rewards ---------------------------------------------------------------------------------------


def looks_for_an_end(name: str) -> bool:
    return "end" in inspect.signature(resolve("delethink.rewards", name)).parameters


SHIPPED = [name for name in sorted(names("delethink.rewards")) if looks_for_an_end(name)]


def test_the_rewards_that_look_for_an_end_are_known() -> None:
    known = {
        "exact",
        "normalized",
        "math",
        "numeric",
        "code",
        "multiple_choice",
        "format",
        "crossword",
    }
    assert known <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_reward_gets_the_mark_of_the_model(name: str) -> None:
    reward = Reward(name, resolve("delethink.rewards", name))
    for end in MARKS:
        attempt = attempt_from_text(Problem("?", "4"), "4", marks=marks_with(end))
        assert reward.arguments(attempt)["end"] == end
        assert reward.end_of_thinking(end) == end
        own = replace(reward, args={"end": "<own>"})
        assert own.arguments(attempt)["end"] == own.end_of_thinking(end) == "<own>"
        assert replace(reward, args={"end": "auto"}).arguments(attempt)["end"] == end


CROSSWORD = '{"across 1": "cat"}'
CASES = [
    ("exact", "4", "4", "5"),
    ("normalized", "four", "Four.", "five"),
    ("numeric", "4", "\\boxed{4.0}", "\\boxed{5}"),
    ("multiple_choice", "B", "\\boxed{B}", "\\boxed{A}"),
    ("crossword", CROSSWORD, "Across 1: CAT", "Across 1: DOG"),
    ("format", "4", "\\boxed{4}", "4"),
]


@pytest.mark.parametrize("end", MARKS)
@pytest.mark.parametrize(("name", "gold", "right", "wrong"), CASES)
def test_the_score_does_not_depend_on_the_mark(
    name: str, gold: str, right: str, wrong: str, end: str | None
) -> None:
    reward, problem = Reward(name, resolve("delethink.rewards", name)), Problem("?", gold)
    marks = marks_with(end)
    for answer, score in ((right, 1.0), (wrong, 0.0)):
        text = marks.rewrite(f"Let me see.</think>{answer}")
        assert value_of(reward, problem, text, marks) == score
        if end is not None:  # without an end there is no answer
            assert value_of(reward, problem, text.replace(end, ""), marks) == 0.0


def test_the_format_counts_the_marks_of_the_model() -> None:
    reward, problem = Reward("format", resolve("delethink.rewards", "format")), Problem("?", "4")
    marks = marks_with("[/THINK]")
    for text, score in (
        ("[THINK]a[/THINK]\\boxed{4}", 1.0),
        ("a[/THINK]\\boxed{4}", 1.0),
        ("b[THINK]a[/THINK]\\boxed{4}", 0.0),
        ("a[/THINK]b[/THINK]\\boxed{4}", 0.0),
        ("a</think>\\boxed{4}", 0.0),
        ("<think>a[/THINK]\\boxed{4}", 1.0),  # a word of the text to this model
    ):
        assert value_of(reward, problem, text, marks) == score, text


def test_a_setting_end_with_another_default_is_a_reward_of_its_own() -> None:
    def first_tokens(text: str, end: int = 5) -> float:
        return float(len(text[:end]))

    def after(text: str, end: str | None) -> float:
        return 0.0

    marks = marks_with("[/THINK]")
    assert value_of(Reward("r", first_tokens), Problem("?", "4"), "1234567", marks) == 5.0
    with pytest.raises(ConfigError, match="needs the setting 'end'"):
        Reward("r", after)


def test_a_list_of_yaml_is_the_mark_of_a_reward_and_a_start_is_refused() -> None:
    exact = resolve("delethink.rewards", "exact")
    assert Reward("exact", exact, args={"end": ["/THINK"]}).args["end"] == "[/THINK]"
    with pytest.raises(ConfigError, match="write '</think>'"):
        Reward("exact", exact, args={"end": "<think>"})


def test_the_accuracy_reward_decides_where_the_task_does_not() -> None:
    exact = resolve("delethink.rewards", "exact")
    with Scorer([Reward("exact", exact, args={"end": None})]) as scorer:
        assert mark_setting(scorer, "auto") is None
        assert mark_setting(scorer, "[/THINK]") == "[/THINK]"
    with Scorer([Reward("exact", exact)]) as scorer:
        assert mark_setting(scorer, "auto") == "auto"
    assert mark_setting(None, "auto") == "auto"


@pytest.mark.parametrize("end", MARKS)
def test_a_vote_is_the_answer_after_the_mark(end: str | None) -> None:
    marks = marks_with(end)
    assert vote(marks.rewrite("Is it 5?</think>So \\boxed{4}"), end) == "4"
    assert vote(marks.rewrite("Is it 5?</think> 4 "), end) == "4"
    if end is not None:
        assert vote("Is it \\boxed{5}?", end) is None


@pytest.mark.parametrize("end", MARKS)
def test_the_place_of_the_answer_follows_the_mark(end: str | None) -> None:
    text = marks_with(end).rewrite("Is it \\boxed{5}?</think>So \\boxed{4}!")
    span = answer_span(text, end)
    assert span is not None
    assert text[slice(*span)] == "4"
    if end is not None:
        assert answer_span("Is it \\boxed{5}?", end) is None


# -- tokens ----------------------------------------------------------------------------------------


def trace_of(tokenizer: Any, text: str) -> Trace:
    ids = encode(tokenizer, text)
    return Trace((0,), (Chunk((0,), ids, (), StopReason.EOS),), TraceStop.COMPLETED)


@pytest.mark.parametrize(
    ("tokens", "text", "answer"),
    [
        (("[THINK]", "[/THINK]"), "[THINK]a[/THINK]4", "4"),
        (
            HARMONY_TOKENS,
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>4",
            "4",
        ),
        (("<|channel>", "<channel|>"), "<|channel>thought\na<channel|>4", "4"),
        (("<|inner_prefix|>", "<|inner_suffix|>"), "<|inner_prefix|>a<|inner_suffix|>4", "4"),
        (("<|think|>", "<|content|>", "<|begin|>"), "a<|begin|>assistant<|content|>4", "4"),
    ],
)
def test_a_trace_of_special_tokens_is_scored(
    tokens: tuple[str, ...], text: str, answer: str
) -> None:
    tokenizer = make_chat_tokenizer(None, tokens)
    bind_marks(tokenizer, "auto")
    reward = Reward("exact", resolve("delethink.rewards", "exact"))
    attempt = make_attempt(
        Problem("?", answer),
        trace_of(tokenizer, f"{text}{END}"),
        tokenizer,
        ChunkSpec.longcot(256),
    )
    assert attempt.end_of_thinking == marks_of(tokenizer).end != "</think>"
    assert reward.function(**reward.arguments(attempt)) == 1.0


# -- evaluation ------------------------------------------------------------------------------------


def grading_with(name: str) -> ProblemSet:
    reward = Reward(name, resolve("delethink.rewards", name))

    async def grade(attempt: Any) -> float:
        await asyncio.sleep(0)
        return float(reward.function(**reward.arguments(attempt)))

    return ProblemSet("task", (Problem("1 + 3?", "4"), Problem("2 + 2?", "4")), name, grade)


def run(folder: Path, tokenizer: Any, policy: Any, forced_tokens: int = 0) -> Any:
    @contextlib.contextmanager
    def open_model(model: str) -> Iterator[LoadedModel]:
        yield LoadedModel(policy, tokenizer, None)

    setting = Setting("m", "longcot", ChunkSpec.longcot(40), (40,))
    plan = SamplingPlan(samples=1, forced_answer_tokens=forced_tokens)
    return evaluate(Evaluation(grading_with("exact"), [setting], plan), open_model, folder / "out")


@pytest.mark.parametrize(
    ("tokens", "setting", "forced"),
    [
        (("[THINK]", "[/THINK]"), "auto", "[/THINK]"),
        (HARMONY_TOKENS, "auto", "<|end|><|start|>assistant<|channel|>final<|message|>"),
        ((), "auto", "</think>"),
        ((), "\nAnswer:", "Answer:"),
    ],
)
def test_a_forced_answer_follows_the_tokens_of_the_mark(
    tmp_path: Path, tokens: tuple[str, ...], setting: str, forced: str
) -> None:
    tokenizer = make_chat_tokenizer(None, tokens)
    bind_marks(tokenizer, setting)
    expected, answer = encode(tokenizer, forced), encode(tokenizer, f"4{END}")
    if tokens and setting == "auto":
        assert len(expected) < len(forced)  # tokens, not their letters

    def script(prompt: Any, limit: int) -> Any:
        is_forced = tuple(prompt[-len(expected) :]) == expected
        return answer if is_forced else encode(tokenizer, "x" * limit)

    policy = ScriptedPolicy(script, eos_id=tokenizer.eos_token_id)
    row = run(tmp_path, tokenizer, policy, forced_tokens=4).rows[-1]
    assert (row.avg.value, row.forced, row.marked) == (1.0, 1.0, 0.0)
    assert row.maj_at[1].value == 1.0


@pytest.mark.parametrize(("said", "marked"), [("a[/THINK]4", 1.0), ("the answer is 4", 0.0)])
def test_a_model_that_never_writes_the_mark_is_hinted_at(
    tmp_path: Path, said: str, marked: float
) -> None:
    tokenizer = make_chat_tokenizer(None, ["[THINK]", "[/THINK]"])
    bind_marks(tokenizer, "auto")
    ids = encode(tokenizer, f"{said}{END}")
    policy = ScriptedPolicy([ids] * 2, eos_id=tokenizer.eos_token_id)
    results = run(tmp_path, tokenizer, policy)
    assert results.rows[-1].marked == results.rows[-1].avg.value == marked
    hints = _hints(results, {"m": marks_of(tokenizer)})
    assert len(hints) == (marked == 0.0)
    for hint in hints:
        assert "no trace wrote [/THINK], the end of thinking (the added tokens)" in hint
        assert "--end-of-thinking, to its mark or null" in hint


# -- environments ----------------------------------------------------------------------------------


def play(tokenizer: Any, text: str, **options: Any) -> float:
    """Return the reward of one chunk in the text environment."""
    env = gymnasium.make(
        "delethink.envs:delethink/TextThinking-v0",
        tokenizer=tokenizer,
        reward="exact",
        context_size=256,
        carryover_size=64,
        **options,
    )
    env.reset(seed=0, options={"problem": Problem("1 + 3?", "4")})
    _, reward, terminated, _, _ = env.step(f"{text}{END}")
    assert terminated
    return float(reward)


@pytest.mark.parametrize(
    ("tokens", "setting", "right", "wrong"),
    [
        (("[THINK]", "[/THINK]"), "auto", "a[/THINK]4", "a</think>4"),
        ((), "auto", "a</think>4", "a[/THINK]4"),
        ((), "[/THINK]", "a[/THINK]4", "a</think>4"),
        (("<|sep|>",), "<|sep|>", "a<|sep|>4", "a4"),
        ((), None, "4", "a</think>4"),
    ],
)
def test_an_environment_takes_the_mark(
    tokens: tuple[str, ...], setting: str | None, right: str, wrong: str
) -> None:
    tokenizer = make_chat_tokenizer(None, tokens)
    assert play(tokenizer, right, end_of_thinking=setting) == 1.0
    assert play(tokenizer, wrong, end_of_thinking=setting) == 0.0
    # The setting is the environment's: another one with the same tokenizer has its own.
    assert play(tokenizer, "a==4", end_of_thinking="==") == 1.0
    assert play(tokenizer, right, end_of_thinking=setting) == 1.0


def test_an_environment_without_a_mark_takes_a_closed_template() -> None:
    closed = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}<think></think>{% endif %}"
    tokenizer = make_chat_tokenizer(closed)
    with pytest.raises(Exception, match="closes the thinking"):
        play(tokenizer, "4")
    assert play(tokenizer, "4", end_of_thinking=None) == 1.0
    with pytest.raises(ConfigError, match="write '</think>'"):
        play(tokenizer, "4", end_of_thinking="<think>")
