"""Laws of thinking that hold for any tokenizer, sizes, carryover, boundary and outputs.

The same random tokens are played through the chunk-level environment, the token-level one, the text
interface and a rollout, and each is held against the others.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traced_memory import traced_memory

from delethink.carryover import (
    Boundary,
    Carryover,
    Full,
    LineBreak,
    Nothing,
    SinkWindow,
    StateBlock,
    Summary,
    Tail,
)
from delethink.chunking import ChunkSpec
from delethink.envs.thinking import ThinkingEnv
from delethink.envs.token_thinking import TokenThinkingEnv
from delethink.errors import ActionError
from delethink.policy import Sampling, ScriptedPolicy
from delethink.rollout import cut_trace, extend_trace, replay_trace, retrace, run_rollout
from delethink.tokenization import retokenized_at
from delethink.types import ChunkRole, Problem, StopReason, Trace, TraceStop

EOS = 0
law = settings(max_examples=60, deadline=None, database=None)


class Pieces:
    """A tokenizer of random pieces; text becomes the longest pieces, sampled ids may be others."""

    chat_template = None
    eos_token_id = EOS

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = ("$", "a", "b", "\n", *pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        ids = []
        while text:
            piece = max((p for p in self.pieces if text.startswith(p)), key=len)
            ids.append(self.pieces.index(piece))
            text = text[len(piece) :]
        return {"input_ids": ids}

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        raise AssertionError("there is no chat template")

    def decode(self, token_ids: Any, **options: Any) -> str:
        return "".join(self.pieces[i] for i in token_ids)


class OneProblem:
    def __init__(self, problem: Problem) -> None:
        self.only = problem

    def problem(self, split: str, index: int) -> Problem:
        return self.only


def score(text: str, answer: str) -> float:
    return float(text.count(answer)) / (1 + len(text))


tokenizers = st.lists(st.text("ab\n", min_size=2, max_size=3), unique=True, max_size=5).map(Pieces)


@st.composite
def specs(draw: st.DrawFn) -> ChunkSpec:
    context_size = draw(st.integers(1, 9))
    size = draw(st.integers(0, context_size - 1))
    boundary: Boundary | None = draw(st.sampled_from([None, None, LineBreak(1), LineBreak(3)]))
    chunks = draw(st.integers(1, 5))
    policies: list[Carryover | None] = [None, Tail(), Nothing(), Full(), StateBlock("a", "b")]
    policies += [SinkWindow(min(2, size))]
    policies += [Summary("a", "", "b")] if size >= 2 else []
    carryover = draw(st.sampled_from(policies))
    if carryover is not None:
        return ChunkSpec(context_size, size, chunks, carryover=carryover, boundary=boundary)
    outside = draw(st.booleans())
    head = draw(st.integers(0, context_size if outside else size))
    return ChunkSpec(context_size, size, chunks, head, outside, boundary=boundary)


@dataclass
class Play:
    """A rollout with random tokens, and what it was played with."""

    tokenizer: Pieces
    spec: ChunkSpec
    problem: Problem
    trace: Trace

    @property
    def options(self) -> dict[str, Any]:
        return {
            "task": OneProblem(self.problem),
            "reward": score,
            "tokenizer": self.tokenizer,
            "chunk_spec": self.spec,
            "max_query_tokens": 8,
        }


@st.composite
def plays(draw: st.DrawFn) -> Play:
    tokenizer, spec = draw(tokenizers), draw(specs())
    problem = Problem(draw(st.text("ab", min_size=1, max_size=4)), "a")
    eos_after = draw(st.integers(0, 40))
    stream = draw(st.lists(st.integers(1, len(tokenizer) - 1), min_size=60, max_size=60))
    lengths = draw(st.lists(st.integers(1, 12), min_size=12, max_size=12))
    said: list[int] = []

    def speak(prompt: tuple[int, ...], limit: int) -> tuple[int, ...]:
        length = min(limit, lengths[len(policy.calls) % 12])
        output = tuple(stream[(len(said) + i) % 60] for i in range(length))
        said.extend(output)
        return (*output[:-1], EOS) if len(said) > eos_after else output

    policy = ScriptedPolicy(speak, eos_id=EOS)
    spec = spec.bind(tokenizer)
    query = tuple(tokenizer(problem.prompt)["input_ids"])
    trace = asyncio.run(run_rollout(policy, spec, query, Sampling()))
    assert trace.error is None
    return Play(tokenizer, spec, problem, trace)


# -- the trace by itself ---------------------------------------------------------------------------


@law
@given(plays())
def test_the_state_is_never_larger_than_its_bound(play: Play) -> None:
    spec, query = play.spec, play.trace.query_ids
    for chunk in play.trace.chunks:
        assert chunk.prompt_ids[: len(query)] == query
        held = len(chunk.prompt_ids) - len(query)
        assert held + len(chunk.output_ids) <= spec.max_thinking_context
        if chunk.role is ChunkRole.THINKING and spec.max_carried is not None:
            assert held <= spec.max_carried


@law
@given(plays())
def test_the_budget_holds(play: Play) -> None:
    trace, spec = play.trace, play.spec
    assert trace.length <= spec.budget
    assert len(trace.output_ids) <= spec.thinking_budget
    assert len(trace.thinking) <= spec.max_chunks
    if trace.stop is TraceStop.BUDGET:
        full = len(trace.output_ids) == spec.thinking_budget
        assert full or len(trace.thinking) == spec.max_chunks


@law
@given(plays())
def test_every_sampled_token_is_in_exactly_one_chunk(play: Play) -> None:
    trace = play.trace
    stitched = tuple(token for chunk in trace.chunks for token in chunk.output_ids)
    assert len(stitched) == trace.length
    thinking = (c.output_ids for c in trace.chunks if c.role is ChunkRole.THINKING)
    assert tuple(token for output in thinking for token in output) == trace.output_ids
    assert all(len(chunk.logprobs) == len(chunk.output_ids) for chunk in trace.chunks)


@law
@given(plays())
def test_the_answer_ends_exactly_once(play: Play) -> None:
    trace = play.trace
    ends = [i for i, token in enumerate(trace.output_ids) if token == EOS]
    completed = trace.stop is TraceStop.COMPLETED
    assert ends == ([len(trace.output_ids) - 1] if completed else [])
    for chunk in trace.chunks:
        assert chunk.output_ids.count(EOS) == (chunk.stop is StopReason.EOS)


# -- the rollout and the environments --------------------------------------------------------------


@law
@given(plays())
def test_a_recorded_trace_goes_through_the_environment_prompt_for_prompt(play: Play) -> None:
    for keep in (True, False):
        env = ThinkingEnv(keep_trace=keep, **play.options)
        reward = replay_trace(env, play.problem, play.trace)
        if keep:
            assert reward == score(play.tokenizer.decode(play.trace.output_ids), "a")
            assert [c.prompt_ids for c in env.trace.chunks] == [
                c.prompt_ids for c in play.trace.chunks
            ]
            assert env.trace.output_ids == play.trace.output_ids
            assert env.trace.stop is play.trace.stop


@law
@given(plays())
def test_the_environment_says_what_the_rule_says(play: Play) -> None:
    env, trace = ThinkingEnv(**play.options), play.trace
    observation, info = env.reset(seed=0)
    sampled = 0
    for chunk in trace.chunks:
        assert info["prompt_ids"] == chunk.prompt_ids == tuple(observation.tolist())
        assert (info["role"], info["stop"]) == (chunk.role.value, None)
        assert len(chunk.output_ids) <= info["max_new_tokens"] <= info["budget_left"]
        observation, reward, terminated, truncated, info = env.step(np.array(chunk.output_ids))
        sampled += len(chunk.output_ids)
        assert (info["num_sampled"], info["ignored"]) == (sampled, 0)
        assert info["output_ids"] == chunk.output_ids
        assert reward == 0.0 or terminated or truncated
        assert observation in env.observation_space
    assert (terminated, truncated) == (
        trace.stop is TraceStop.COMPLETED,
        trace.stop is TraceStop.BUDGET,
    )
    assert (info["stop"], info["budget_left"], info["max_new_tokens"]) == (trace.stop.value, 0, 0)
    with pytest.raises(ActionError, match="has ended"):
        env.step([1])


@law
@given(plays())
def test_token_by_token_is_chunk_by_chunk(play: Play) -> None:
    """Chunks are full here or end at a boundary: a token cannot say that a chunk ends early."""
    env, chunks = TokenThinkingEnv(**play.options), ThinkingEnv(**play.options)
    observation, info = env.reset(seed=0)
    prompt, facts = chunks.reset(seed=0)
    ended, stream = False, iter([*play.trace.output_ids, *[1] * 200])
    while not ended:
        chunk: list[int] = []
        while True:
            seen = tuple(observation["ids"][observation["mask"] == 1].tolist())
            assert seen == (*prompt.tolist(), *chunk)
            assert observation in env.observation_space
            assert info["max_new_tokens"] == facts["max_new_tokens"] - len(chunk)
            assert info["num_sampled"] == facts["num_sampled"] + len(chunk)
            assert info["budget_left"] == facts["budget_left"] - len(chunk)
            token = next(stream)
            chunk.append(token)
            observation, reward, terminated, truncated, info = env.step(token)
            if info["chunk"] > facts["chunk"] or info["role"] != facts["role"]:
                break
            assert (reward, terminated, truncated) == (0.0, False, False)
        prompt, earned, *ends, facts = chunks.step(chunk)
        assert (reward, terminated, truncated) == (earned, *ends)
        assert {key: info[key] for key in ("role", "stop", "carried", "chunk")} == {
            key: facts[key] for key in ("role", "stop", "carried", "chunk")
        }
        ended = terminated or truncated
    assert env.trace == chunks.trace
    with pytest.raises(ActionError, match="has ended"):
        env.step(1)


@law
@given(plays())
def test_text_and_tokens_agree_or_say_where_they_differ(play: Play) -> None:
    """The text of sampled ids may be other ids; the first such place is told beforehand."""
    tokens, text = ThinkingEnv(**play.options), ThinkingEnv(interface="text", **play.options)
    observation, info = tokens.reset(seed=0)
    seen, said = text.reset(seed=0)
    for chunk in play.trace.chunks:
        assert seen == play.tokenizer.decode(observation.tolist())
        place = retokenized_at(play.tokenizer, chunk.prompt_ids)
        assert said["retokenized_at"] == (-1 if place is None else place)
        differs = retokenized_at(play.tokenizer, chunk.output_ids)
        if differs is not None:
            before = min(differs, said["max_new_tokens"])
            again = play.tokenizer(play.tokenizer.decode(chunk.output_ids))["input_ids"]
            assert tuple(again[:before]) == chunk.output_ids[:before]
            return
        observation, reward, terminated, truncated, info = tokens.step(chunk.output_ids)
        output = play.tokenizer.decode(chunk.output_ids)
        seen, earned, *ends, said = text.step(output)
        assert said["output_ids"] == chunk.output_ids
        assert said["prompt_ids"] == info["prompt_ids"]
        assert (reward, terminated, truncated) == (earned, *ends)


@pytest.mark.parametrize("kind", [ThinkingEnv, TokenThinkingEnv])
def test_memory_does_not_grow_with_the_chunks_where_no_trace_is_kept(kind: type) -> None:
    def held(chunks: int, keep_trace: bool) -> int:
        env = kind(context_size=64, carryover_size=32, max_chunks=2000, keep_trace=keep_trace)
        action = 6 if kind is TokenThinkingEnv else [6] * 32

        def run() -> None:
            env.reset(seed=0)
            while env.step(action)[4]["chunk"] < chunks:
                pass

        return traced_memory(run).held

    assert held(300, keep_trace=False) < held(10, keep_trace=False) + 20_000
    assert held(300, keep_trace=True) > held(10, keep_trace=True) + 290 * 32 * 8


# -- traces ----------------------------------------------------------------------------------------


@law
@given(plays(), st.data())
def test_a_trace_that_is_cut_and_gone_on_with_is_the_same_again(
    play: Play, data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, len(play.trace.chunks) - 1))
    cut = cut_trace(play.trace, count)
    assert (cut.stop, len(cut.chunks)) == (TraceStop.CUT, count)
    assert retrace(play.spec, cut).prompt_ids == play.trace.chunks[count].prompt_ids
    rest = iter([chunk.output_ids for chunk in play.trace.chunks[count:]])
    policy = ScriptedPolicy(lambda prompt, limit: next(rest), eos_id=EOS)
    assert asyncio.run(extend_trace(policy, play.spec, cut, Sampling())) == play.trace


@law
@given(plays())
def test_longcot_is_the_same_environment_with_one_chunk(play: Play) -> None:
    """Both interfaces, the carryover without a say, and one context of the whole budget."""
    budget = play.spec.context_size
    options = {**play.options, "chunk_spec": None, "context_size": budget, "max_chunks": 1}
    sizes = {"carryover_size": 0, "carryover": play.spec.carryover, "boundary": None}
    one = ThinkingEnv(**options, **sizes)
    longcot = ThinkingEnv(**{**play.options, "chunk_spec": ChunkSpec.longcot(budget)})
    single = TokenThinkingEnv(**{**play.options, "chunk_spec": ChunkSpec.longcot(budget)})
    output = (play.trace.output_ids * budget)[:budget]
    seen = [env.reset(seed=1)[1]["max_new_tokens"] for env in (one, longcot)]
    assert seen == [budget, budget]
    _, reward, *ends, info = one.step(output)
    _, other, *other_ends, facts = longcot.step(output)
    assert (reward, ends, info["stop"]) == (other, other_ends, facts["stop"])
    single.reset(seed=1)
    for token in info["output_ids"]:
        _, earned, *token_ends, last = single.step(token)
    assert (earned, token_ends, last["stop"]) == (reward, ends, info["stop"])
    assert single.trace.output_ids == one.trace.output_ids
