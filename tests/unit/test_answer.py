"""The final answer of a trace is found across boundaries and never in the query."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delethink.chunking import ChunkSpec
from delethink.envs.thinking import ThinkingEnv
from delethink.policy import Sampling, ScriptedPolicy
from delethink.rewards.match import normalized_match
from delethink.rollout import replay_trace, run_rollout
from delethink.scoring.answer import extract_answer, last_box
from delethink.scoring.rollouts import make_attempt
from delethink.tokenization import query_ids
from delethink.types import Problem, Trace

EOS = 1


class Characters:
    """Tokenizer with one token per character and a template that opens the thinking."""

    chat_template = "opens <think>"

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [2 + ord(c) for c in text]}

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        return self("".join(m["content"] for m in conversation) + "<think>")

    def decode(self, token_ids: Any, **options: Any) -> str:
        return "".join(chr(i - 2) for i in token_ids if i > EOS)


TOKENIZER = Characters()


def play(text: str, spec: ChunkSpec, problem: Problem) -> Trace:
    """Return a trace of ``text`` and EOS, with full chunks."""
    stream = iter([*TOKENIZER(text)["input_ids"], EOS])

    def speak(prompt: tuple[int, ...], limit: int) -> tuple[int, ...]:
        said: list[int] = []
        for token in stream:
            said.append(token)
            if len(said) == limit:
                break
        return tuple(said)

    policy = ScriptedPolicy(speak)
    return asyncio.run(run_rollout(policy, spec, query_ids(TOKENIZER, problem), Sampling()))


def rewarded(text: str, spec: ChunkSpec, answer: str = "42", prompt: str = "6 x 7?") -> float:
    """Return the environment's reward, and check it against the reward of the scorer's text."""
    problem = Problem(prompt, answer)
    trace = play(text, spec, problem)
    task = {"name": "automaton", "args": {"min_steps": 1, "max_steps": 2}}
    env = ThinkingEnv(task, normalized_match, TOKENIZER, spec, [EOS], 2 + 0x110000)
    paid = replay_trace(env, problem, trace)
    assert normalized_match(make_attempt(problem, trace, TOKENIZER, spec).text, answer) == paid
    return paid


TEXT = "six times seven</think>It is \\boxed{42}."
SIZES = range(12, len(TEXT) + 2)


@pytest.mark.parametrize("context", SIZES)
def test_a_boundary_at_any_place_hides_nothing(context: int) -> None:
    """Over all context sizes, boundaries fall on every token of the mark and of the box."""
    assert rewarded(TEXT, ChunkSpec(context, 5, 40, 0)) == 1.0
    assert rewarded(TEXT, ChunkSpec(context, 5, 40, 3)) == 1.0
    assert rewarded(TEXT.replace("42", "43"), ChunkSpec(context, 5, 40, 0)) == 0.0


def boundaries(text: str, spec: ChunkSpec) -> list[str]:
    trace = play(text, spec, Problem("q", "42"))
    return [TOKENIZER.decode(chunk.output_ids) for chunk in trace.chunks]


def test_the_box_may_be_split_over_a_boundary() -> None:
    text = "0123456789</think>\\boxed{42}"
    spec = ChunkSpec(22, 4, 5, 0)
    assert boundaries(text, spec) == ["0123456789</think>\\box", "ed{42}"]
    assert rewarded(text, spec) == 1.0


def test_the_end_of_thinking_may_be_split_over_a_boundary() -> None:
    text = "0123456789</think>\\boxed{42}"
    spec = ChunkSpec(14, 4, 5, 0)
    assert boundaries(text, spec)[:2] == ["0123456789</th", "ink>\\boxed"]
    assert rewarded(text, spec) == 1.0


def test_the_answer_may_lie_in_tokens_that_were_carried() -> None:
    """The box is whole in the first chunk and carried into the second, where nothing follows."""
    text = "</think>\\boxed{42}" + "."
    spec = ChunkSpec(18, 10, 5, 0)
    trace = play(text, spec, Problem("q", "42"))
    carried = TOKENIZER.decode(trace.chunks[1].prompt_ids[-trace.chunks[1].carried :])
    assert carried.endswith("boxed{42}")
    assert rewarded(text, spec) == 1.0


def test_an_answer_that_was_thrown_away_with_its_context_still_counts() -> None:
    text = "</think>\\boxed{42}" + " and so on and so on" * 3
    assert rewarded(text, ChunkSpec(20, 2, 40, 0)) == 1.0


def test_carried_tokens_are_not_read_twice() -> None:
    text = "</think>\\boxed{4" + "2}"
    spec = ChunkSpec(16, 8, 5, 0)
    problem = Problem("q", "42")
    attempt = make_attempt(problem, play(text, spec, problem), TOKENIZER, spec)
    assert attempt.text == text
    assert attempt.length == len(text) + 1  # and EOS


@pytest.mark.parametrize("prompt", ["\\boxed{42}", "</think>\\boxed{42}", "Answer: 42</think>"])
def test_nothing_is_found_in_the_query(prompt: str) -> None:
    assert rewarded("I do not know", ChunkSpec(8, 4, 9, 0), prompt=prompt) == 0.0
    assert rewarded("</think>I do not know", ChunkSpec(8, 4, 9, 0), prompt=prompt) == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{1}</think>\\boxed{2}", "2"),
        ("</think>\\boxed{1} \\boxed{2}", "2"),
        ("</think>\\boxed{1} </think> \\boxed{2}", "2"),
        ("</think>\\boxed{1} </think> and", "1"),
        ("</think>\\boxed{1} \\boxed{2", "1"),
        ("</think>\\boxed{1 \\boxed{2}", "2"),
        ("</think>\\boxed{{1}}", "1"),
        ("</think>\\boxed{\\boxed{1}}", "1"),
        ("</think>\\boxed{1}+\\boxed{2}", "2"),
        ("</think>\\boxed{\\boxed{1}+\\boxed{2}}", "{1}+{2}"),
        ("</think>\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("</think>\\boxed{\\{1\\}}", "\\{1\\}"),
        ("</think>\\boxed{\\{1}", "\\{1"),
        ("</think>\\boxed{}", None),
        ("\\boxed{1}", None),
        ("</think>1", None),
        ("</think>The answer is 1.", "1"),
        ("</think>Answer: $1$", "1"),
        ("</think>#### 1", "1"),
        ("</think><answer>1\n2</answer>", "1\n2"),
        ("</think><answer>the answer is 2</answer>", "the answer is 2"),
    ],
)
def test_the_last_complete_answer_after_the_end_of_thinking(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_a_model_that_does_not_think_is_read_from_the_start() -> None:
    assert extract_answer("\\boxed{1}", end=None) == "1"


contents = st.text(st.characters(exclude_characters="{}\\")).filter(lambda t: t.strip() == t != "")
noise = st.text(alphabet="ab {}\\\n$<>/think.boxed", max_size=60)


@given(noise, contents)
def test_a_box_at_the_end_is_found_whatever_comes_before(before: str, content: str) -> None:
    assert extract_answer(f"{before}</think>{before}.\\boxed{{{content}}}") == content


@given(noise)
def test_an_unclosed_box_never_counts(before: str) -> None:
    text = before.replace("}", "") + "\\boxed{1"
    assert last_box(text) is None


@given(st.recursive(contents, lambda inner: inner.map(lambda t: "{" + t + "}"), max_leaves=5))
def test_braces_around_an_answer_come_off(content: str) -> None:
    assert extract_answer(f"</think>\\boxed{{{content}}}") == content.strip("{}").strip()


@given(st.text(max_size=400))
def test_an_answer_is_a_part_of_the_text_and_not_empty(text: str) -> None:
    found = extract_answer(text, end=None)
    assert found is None or (found.strip() == found != "")
    assert extract_answer(text.replace("</think>", "")) is None


@given(noise, st.integers(0, 60))
def test_what_is_before_the_end_of_thinking_does_not_matter(text: str, place: int) -> None:
    thinking = text.replace("</think>", "")[:place]
    tail = "</think>" + text
    assert extract_answer(thinking + tail) == extract_answer(tail)
