"""Thinking as events: the same tokens as a rollout, an answer always, and whole characters."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("transformers")

from chat_tokenizers import make_chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_reasoner import EOS, MARK, MARK_IDS, TOKENIZER, MadeUpReasoner

from delethink import (
    ChunkSpec,
    Completion,
    ModelError,
    PolicyError,
    QueryTooLongError,
    Sampling,
    ScriptedPolicy,
    StopReason,
    TokenIds,
    TraceStop,
    run_rollout,
)
from delethink.carryover import Boundary, Full, Nothing, SinkWindow, Summary, Tail
from delethink.serve.events import (
    BoundaryCrossed,
    EndReason,
    Phase,
    SampledText,
    ThinkingEnded,
    TraceEnded,
)
from delethink.serve.loops import LoopRule
from delethink.serve.reader import ReadingRule
from delethink.serve.thinking import ThinkingLimits, ThinkingModel, think
from delethink.thinking_marks import ThinkingMarks
from delethink.tokenization import reward_text

GREEDY = Sampling(temperature=0.0)
QUERY = (3, 1, 4, 1, 5)


def model_of(policy: Any, **options: Any) -> ThinkingModel:
    given = {"eos_ids": (EOS,), **options}
    return ThinkingModel(policy, TOKENIZER, **given)


@dataclass
class Played:
    """Events of a trace, sorted."""

    events: list[Any]
    thinking: TokenIds = ()
    answer: TokenIds = ()
    logprobs: list[float] = field(default_factory=list)
    text: dict[Phase, str] = field(default_factory=lambda: dict.fromkeys(Phase, ""))

    def __post_init__(self) -> None:
        for event in self.events:
            if isinstance(event, SampledText):
                self.text[event.phase] += event.text
                self.logprobs += event.logprobs
                if event.phase is Phase.THINKING:
                    self.thinking += tuple(event.token_ids)
                else:
                    self.answer += tuple(event.token_ids)

    def only(self, kind: type) -> Any:
        (event,) = (event for event in self.events if isinstance(event, kind))
        return event

    @property
    def end(self) -> TraceEnded:
        return self.only(TraceEnded)  # type: ignore[no-any-return]


def play(model: ThinkingModel, spec: ChunkSpec, query: Any = QUERY, **options: Any) -> Played:
    async def all_events() -> list[Any]:
        options.setdefault("sampling", GREEDY)
        return [event async for event in think(model, spec, query, **options)]

    return Played(asyncio.run(all_events()))


def expected(policy: MadeUpReasoner, spec: ChunkSpec, limits: ThinkingLimits) -> Any:
    """Thinking and answer by the library's own rollout, and a greedy answer after it."""
    trace = asyncio.run(run_rollout(policy, spec, QUERY, GREEDY))
    assert not trace.stop.is_failure
    room = len(QUERY) + spec.max_thinking_context + len(MARK_IDS) + limits.answer_tokens
    thinking: TokenIds = ()
    for chunk in trace.chunks:
        for i, _ in enumerate(chunk.output_ids, start=1):
            if MARK in reward_text(TOKENIZER, thinking + chunk.output_ids[:i]):
                answer = chunk.output_ids[i:]
                if chunk.stop is StopReason.LENGTH:
                    context = chunk.prompt_ids + chunk.output_ids
                    answer += policy.complete(context, room - len(context))
                return thinking + chunk.output_ids[:i], answer, EndReason.MARK
        thinking += tuple(chunk.output_ids)
    last = trace.chunks[-1]
    ended = trace.stop is TraceStop.COMPLETED
    context = last.prompt_ids + (last.output_ids[:-1] if ended else last.output_ids) + MARK_IDS
    answer = policy.complete(context, room - len(context))
    return thinking, answer, EndReason.EOS if ended else EndReason.BUDGET


specs = st.builds(
    lambda carried, new, chunks, head: ChunkSpec(
        carried + new, carried, chunks, head % (carried + 1)
    ),
    st.integers(0, 20),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(0, 20),
)
reasoners = st.builds(
    MadeUpReasoner,
    st.integers(0, 10_000),
    st.integers(0, 6),
    st.integers(0, 8),
    st.lists(st.integers(1, 9), max_size=3),
)


@settings(max_examples=80)
@given(reasoners, specs, st.integers(1, 30))
def test_a_greedy_trace_has_the_tokens_of_the_rollout(
    policy: MadeUpReasoner, spec: ChunkSpec, room: int
) -> None:
    limits = ThinkingLimits(answer_tokens=room)
    thinking, answer, reason = expected(policy, spec, limits)
    played = play(model_of(policy), spec, limits=limits)
    assert (played.thinking, played.answer) == (thinking, answer)
    assert played.logprobs == [-float(token) for token in thinking + answer]
    ended, end = played.only(ThinkingEnded), played.end
    assert (ended.reason, end.reason) == (reason, reason)
    assert end.is_cut == (answer[-1:] != (EOS,))
    usage = end.usage
    assert (usage.reasoning_tokens, usage.answer_tokens) == (len(thinking), len(answer))
    assert played.events[-1] is end
    # Text: no gap, no repeat, no half of a character.
    forced = () if reason is EndReason.MARK else MARK_IDS
    whole = reward_text(TOKENIZER, thinking)
    text = played.text[Phase.THINKING] + ended.mark + played.text[Phase.ANSWER]
    if not whole.endswith("\ufffd") and not reward_text(TOKENIZER, answer).endswith("\ufffd"):
        assert text == reward_text(TOKENIZER, (*thinking, *forced, *answer))
        assert "\ufffd" not in text or "\ufffd" in whole + reward_text(TOKENIZER, answer)


@settings(max_examples=30)
@given(reasoners, specs)
def test_boundaries_say_what_was_carried_and_encoded_again(
    policy: MadeUpReasoner, spec: ChunkSpec
) -> None:
    trace = asyncio.run(run_rollout(policy, spec, QUERY, GREEDY))
    played = play(model_of(policy), spec, limits=ThinkingLimits(30))
    boundaries = [event for event in played.events if isinstance(event, BoundaryCrossed)]
    usage = played.end.usage
    assert usage.boundaries == len(boundaries) == usage.chunks - 1 <= len(trace.chunks) - 1
    for boundary, chunk in zip(boundaries, trace.chunks[1:], strict=False):
        assert boundary.reencoded_tokens == len(chunk.prompt_ids)
        assert boundary.carried_tokens == chunk.carried
    assert usage.carried_tokens == sum(boundary.carried_tokens for boundary in boundaries)


@settings(max_examples=30)
@given(reasoners, specs, st.integers(0, 60), st.integers(1, 80))
def test_limits_hold_and_an_answer_is_always_asked_for(
    policy: MadeUpReasoner, spec: ChunkSpec, budget: int, total: int
) -> None:
    limits = ThinkingLimits(answer_tokens=20, thinking_tokens=budget, total_tokens=total)
    played = play(model_of(policy), spec, limits=limits)
    usage = played.end.usage
    assert usage.completion_tokens <= total
    assert usage.answer_tokens >= 1
    if played.end.reason.is_forced:
        assert usage.reasoning_tokens <= budget


def test_without_a_budget_the_answer_follows_the_query() -> None:
    policy = ScriptedPolicy([(7, 8, EOS)], EOS)
    played = play(model_of(policy), ChunkSpec(9, 3, 4), limits=ThinkingLimits(4, 0))
    assert policy.calls == [((*QUERY, *MARK_IDS), 4 + 9)]
    assert (played.thinking, played.answer) == ((), (7, 8, EOS))
    assert played.end.usage.chunks == 0


def test_an_answer_of_its_own_drops_what_follows_the_mark() -> None:
    thought = (*TOKENIZER("ab")["input_ids"], *MARK_IDS)
    thinker = ScriptedPolicy([(*thought, 9, 9, EOS)], EOS)
    answerer = ScriptedPolicy([(8, EOS)], EOS)
    played = play(model_of(thinker), ChunkSpec(30, 3, 4), answer_policy=answerer)
    assert answerer.calls[0][0] == (*QUERY, *thought)
    assert (played.thinking, played.answer) == (thought, (8, EOS))


def test_a_stop_string_across_a_boundary_ends_the_trace() -> None:
    ids = tuple(TOKENIZER("abcabcxyz!")["input_ids"])
    policy = ScriptedPolicy(lambda prompt, limit: ids[:limit])
    rule = ReadingRule((MARK,), {EOS}, ("cca",), stops_in_thinking=True)
    policy = ScriptedPolicy(
        [tuple(TOKENIZER("abc")["input_ids"]), tuple(TOKENIZER("cab")["input_ids"])]
    )
    played = play(model_of(policy), ChunkSpec(3, 0, 4), rule=rule)
    assert played.text[Phase.THINKING] == "ab"
    assert (played.end.reason, played.end.stop_string) == (EndReason.STOP, "cca")
    assert not played.end.is_cut
    assert played.answer == ()


def test_a_stop_string_of_the_answer_does_not_end_the_thinking() -> None:
    text = TOKENIZER(f"a.b{MARK}c.d")["input_ids"]
    rule = ReadingRule((MARK,), {EOS}, (".",))
    played = play(model_of(ScriptedPolicy([tuple(text)])), ChunkSpec(30, 0, 1), rule=rule)
    assert (played.text[Phase.THINKING], played.text[Phase.ANSWER]) == ("a.b", "c")
    assert not played.end.is_cut


def test_a_loop_is_ended_and_answered() -> None:
    pattern = TOKENIZER("abc")["input_ids"] * 20
    policy = ScriptedPolicy([tuple(pattern), (9, EOS)], EOS)
    rule = ReadingRule((MARK,), {EOS}, loop=LoopRule(4, 1, 5))
    played = play(model_of(policy), ChunkSpec(60, 0, 3), rule=rule)
    assert played.end.reason is EndReason.LOOP
    assert len(played.thinking) == 15
    assert policy.calls[1][0] == (*QUERY, *pattern[:15], *MARK_IDS)
    plain = play(
        model_of(ScriptedPolicy([tuple(pattern)] * 3 + [(9, EOS)], EOS)), ChunkSpec(60, 0, 3)
    )
    assert plain.end.reason is EndReason.BUDGET


def test_a_loop_ends_its_chunk_and_its_repeats_are_not_carried() -> None:
    first, loop, nudge = (tuple(TOKENIZER(text)["input_ids"]) for text in ("xyz", "abc", "no"))
    rest = (*TOKENIZER(f"d{MARK}e")["input_ids"], EOS)
    policy = ScriptedPolicy([first + loop * 17, rest], EOS)
    rule = ReadingRule((MARK,), {EOS}, loop=LoopRule(4, 1, 5), nudge_ids=nudge)
    played = play(model_of(policy), ChunkSpec(60, 20, 3, 0), rule=rule)
    carried = first + loop + nudge
    assert policy.calls[1] == ((*QUERY, *carried), 60 - len(carried))
    assert (played.text[Phase.THINKING], played.text[Phase.ANSWER]) == (f"xyz{'abc' * 5}d", "e")
    usage = played.end.usage
    assert played.end.reason is EndReason.MARK
    assert (usage.chunks, usage.boundaries, usage.nudges) == (2, 1, 1)
    assert usage.carried_tokens == len(carried)  # the nudge included
    assert usage.reasoning_tokens == len(played.thinking) == len(first + loop * 5 + rest) - 2
    assert played.only(BoundaryCrossed).is_nudge


@pytest.mark.parametrize("nudge", [(), (9,) * 3, (9,) * 50], ids=len)
@pytest.mark.parametrize(
    "spec",
    [
        ChunkSpec(40, 20, 4),
        ChunkSpec(40, 20, 4, 8, head_outside=True),
        ChunkSpec(40, 20, 4, carryover=Tail()),
        ChunkSpec(40, 20, 4, carryover=SinkWindow(4)),
        ChunkSpec(40, 20, 4, carryover=Full()),
        ChunkSpec(40, 0, 4, carryover=Nothing()),
        ChunkSpec(40, 20, 4, carryover=Summary("?", "!", ".")).bind(TOKENIZER),
    ],
    ids=["head", "head outside", "tail", "sink", "full", "nothing", "summary"],
)
def test_a_nudge_keeps_every_limit_of_the_chunks(spec: ChunkSpec, nudge: TokenIds) -> None:
    """A model that always repeats itself is nudged in all chunks but the last."""
    policy = ScriptedPolicy(lambda prompt, limit: ((5, 6) * limit)[:limit])
    rule = ReadingRule((MARK,), {EOS}, loop=LoopRule(4, 2, 5), nudge_ids=nudge)
    played = play(model_of(policy), spec, rule=rule)
    usage = played.end.usage
    assert played.end.reason is EndReason.LOOP
    assert (usage.chunks, usage.nudges, usage.boundaries) == (4, 3, 3)
    assert len(played.thinking) == 4 * 10
    *thinking, (prompt, _) = policy.calls
    assert prompt[-len(MARK_IDS) :] == MARK_IDS
    longest = len(QUERY) + spec.max_thinking_context
    assert all(len(prompt) + limit <= longest for prompt, limit in thinking)


def test_a_budget_ends_the_thinking_at_a_loop_too() -> None:
    policy = ScriptedPolicy(lambda prompt, limit: ((5, 6) * limit)[:limit])
    rule = ReadingRule((MARK,), {EOS}, loop=LoopRule(4, 2, 5), nudge_ids=())
    limits = ThinkingLimits(thinking_tokens=20)
    played = play(model_of(policy), ChunkSpec(40, 20, 9), rule=rule, limits=limits)
    assert (len(played.thinking), played.end.usage.nudges) == (20, 1)
    assert played.end.reason is EndReason.LOOP


def test_a_written_carryover_is_sampled_and_is_no_text() -> None:
    spec = ChunkSpec(60, 40, 3, carryover=Summary("?", "!", ".")).bind(TOKENIZER)
    policy = MadeUpReasoner(5, 0, 0, [1])
    trace = asyncio.run(run_rollout(policy, spec, QUERY, GREEDY))
    played = play(model_of(policy), spec)
    assert played.thinking == trace.output_ids
    assert played.end.usage.reasoning_tokens == trace.length
    assert played.end.usage.chunks == len(trace.thinking) == 3


class AfterSpace(Boundary):
    """Ends a chunk after a space."""

    within = 20

    def ends(self, output_ids: TokenIds, room: int) -> bool:
        return output_ids[-1] == TOKENIZER(" ")["input_ids"][0]


def test_early_boundaries_are_kept() -> None:
    spec = ChunkSpec(30, 10, 5, boundary=AfterSpace())
    policy = MadeUpReasoner(1, 0, 0, [2])
    trace = asyncio.run(run_rollout(policy, spec, QUERY, GREEDY))
    assert any(len(chunk.output_ids) < 20 for chunk in trace.chunks)
    assert play(model_of(policy), spec).thinking == trace.output_ids


def test_seeds_are_those_of_the_rollout() -> None:
    class Seeded(MadeUpReasoner):
        async def generate(self, prompt_ids: Any, max_new_tokens: int, sampling: Any) -> Completion:
            self._seed = sampling.seed
            return await super().generate(prompt_ids, max_new_tokens, sampling)

    spec, sampling = ChunkSpec(20, 5, 4, 0), Sampling(1.0, seed=3)
    trace = asyncio.run(run_rollout(Seeded(0, 0, 0), spec, QUERY, sampling))
    assert play(model_of(Seeded(0, 0, 0)), spec, sampling=sampling).thinking == trace.output_ids


def test_spaces_before_full_stops_stay() -> None:
    tokenizer = make_chat_tokenizer(clean_up_tokenization_spaces=True)
    said = [tokenizer(letter)["input_ids"] for letter in ("a", " ", ".", " b", MARK)]
    policy = ScriptedPolicy([(*[token for ids in said for token in ids], EOS)], EOS)
    model = ThinkingModel(policy, tokenizer, eos_ids=(EOS,))
    assert play(model, ChunkSpec(30, 3, 2)).text[Phase.THINKING] == "a . b"


def test_messages_are_templated() -> None:
    policy = ScriptedPolicy([(EOS,), (EOS,)], EOS)
    play(model_of(policy), ChunkSpec(9, 3, 2), [{"role": "user", "content": "hi"}])
    assert TOKENIZER.decode(policy.calls[0][0]) == "user: hi\n<think>"


def test_a_query_needs_room_for_thinking_mark_and_answer() -> None:
    spec, limits = ChunkSpec(20, 5, 3), ThinkingLimits(answer_tokens=7)
    needed = len(QUERY) + 20 + len(MARK_IDS) + 7
    policy = MadeUpReasoner(3, 0, 0)
    play(model_of(policy, max_model_tokens=needed), spec, limits=limits)
    with pytest.raises(
        QueryTooLongError, match=r"has 5 tokens and may have at most 4: .* takes 39, .*20"
    ):
        play(model_of(policy, max_model_tokens=needed - 1), spec, limits=limits)


def test_no_context_is_longer_than_promised() -> None:
    longest = 0

    class Watching(MadeUpReasoner):
        async def generate(self, prompt_ids: Any, max_new_tokens: int, sampling: Any) -> Completion:
            nonlocal longest
            longest = max(longest, len(prompt_ids) + max_new_tokens)
            return await super().generate(prompt_ids, max_new_tokens, sampling)

    spec, limits = ChunkSpec(30, 10, 4), ThinkingLimits(answer_tokens=7)
    for seed in range(40):
        play(model_of(Watching(seed, 1, 6)), spec, limits=limits)
    assert longest == len(QUERY) + 30 + len(MARK_IDS) + 7


def test_a_failed_chunk_is_an_error_with_its_reason() -> None:
    with pytest.raises(PolicyError, match="ValueError: broken"):
        play(model_of(ScriptedPolicy([ValueError("broken")])), ChunkSpec(9, 3, 2))
    aborted = Completion((), (), StopReason.ABORT)
    with pytest.raises(PolicyError, match="aborted"):
        play(model_of(ScriptedPolicy([(EOS,), aborted], EOS)), ChunkSpec(9, 3, 2))


@pytest.mark.parametrize("tokens", [1, 7, 19, 20])
def test_a_broken_stream_goes_on_where_it_broke(tokens: int) -> None:
    class Breaking(MadeUpReasoner):
        broken = 0

        async def stream(self, prompt_ids: Any, limit: int, sampling: Any, on_tokens: Any) -> Any:
            done = await self.generate(prompt_ids, limit, sampling)
            if len(done.token_ids) > tokens or self.broken == 0:
                on_tokens(done.token_ids[:tokens], done.logprobs[:tokens])
                self.broken += 1
                raise PolicyError("the stream broke off")
            on_tokens(done.token_ids, done.logprobs)
            return done

    spec, policy = ChunkSpec(20, 5, 4, 0), Breaking(0, 0, 0)
    trace = asyncio.run(run_rollout(MadeUpReasoner(0, 0, 0), spec, QUERY, GREEDY))
    played = play(model_of(policy), spec, limits=ThinkingLimits(9))
    assert played.thinking == trace.output_ids
    assert policy.broken


def test_a_model_without_a_mark_is_refused() -> None:
    with pytest.raises(ModelError, match="does not mark the end"):
        model_of(MadeUpReasoner(), marks=ThinkingMarks(None, None, "the setting"))


class Endless:
    """Streams one token, then never ends, and says when it was cancelled."""

    def __init__(self) -> None:
        self.cancelled = 0
        self.calls: list[TokenIds] = []

    async def generate(self, prompt_ids: Any, max_new_tokens: int, sampling: Any) -> Completion:
        raise AssertionError("it streams")

    async def stream(
        self, prompt_ids: Any, limit: int, sampling: Any, on_tokens: Any
    ) -> Completion:
        self.calls.append(prompt_ids)
        if prompt_ids[-len(MARK_IDS) :] == MARK_IDS:
            on_tokens((7, EOS), (0.0, 0.0))
            return Completion((7, EOS), (0.0, 0.0), StopReason.EOS)
        on_tokens((5,), (0.0,))
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        raise AssertionError


def test_time_ends_the_thinking_with_what_was_sampled() -> None:
    policy = Endless()
    played = play(model_of(policy), ChunkSpec(9, 3, 2), limits=ThinkingLimits(thinking_time_s=0.05))
    assert (played.thinking, played.answer) == ((5,), (7, EOS))
    assert played.end.reason is EndReason.TIME
    assert policy.calls[1] == (*QUERY, 5, *MARK_IDS)
    assert policy.cancelled == 1


def test_a_closed_stream_cancels_the_chunk() -> None:
    policy = Endless()

    async def leave() -> None:
        async with aclosing(think(model_of(policy), ChunkSpec(9, 3, 2), QUERY)) as events:
            async for event in events:
                assert isinstance(event, SampledText)
                break
        assert policy.cancelled == 1
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(leave())
