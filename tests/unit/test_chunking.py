"""The chunk rule: golden vectors worked out by hand, then laws that hold for any sizes.

In the golden vectors the query is ``(90, 91)`` and the t-th sampled token of a trace is t, so that
a carryover reads as the positions it came from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delethink.chunking import ChunkSpec, ThinkingState, start
from delethink.errors import ConfigError, PolicyError, QueryTooLongError
from delethink.types import StopReason, TokenIds, TraceStop

QUERY = (90, 91)
EOS_ID = 0


def span(first: int, last: int) -> TokenIds:
    return tuple(range(first, last + 1))


def boundaries(spec: ChunkSpec) -> list[tuple[int, TokenIds]]:
    """(new tokens allowed, tokens carried) of each chunk, where every chunk is filled."""
    state, seen = start(spec, QUERY), []
    while state.stop is None:
        assert state.prompt_ids == QUERY + state.carried
        seen.append((state.max_new_tokens, state.carried))
        first = state.num_sampled + 1
        full = span(first, first + state.max_new_tokens - 1)
        state = state.advance(full, StopReason.LENGTH)
    assert state.stop is TraceStop.BUDGET
    return seen


# -- golden vectors: what is carried ---------------------------------------------------------------


def test_the_head_counts_within_the_carryover() -> None:
    assert boundaries(ChunkSpec(context_size=8, carryover_size=4, max_chunks=4, head_size=2)) == [
        (8, ()),
        (4, (1, 2, 7, 8)),
        (4, (1, 2, 11, 12)),
        (4, (1, 2, 15, 16)),
    ]


def test_a_head_outside_comes_on_top_of_the_carryover() -> None:
    spec = ChunkSpec(8, 4, 4, head_size=2, head_outside=True)
    assert boundaries(spec) == [
        (8, ()),
        (4, (1, 2, 5, 6, 7, 8)),
        (4, (1, 2, 9, 10, 11, 12)),
        (4, (1, 2, 13, 14, 15, 16)),
    ]


def test_a_carryover_below_half_of_the_context() -> None:
    assert boundaries(ChunkSpec(8, 3, 3, head_size=1)) == [
        (8, ()),
        (5, (1, 7, 8)),
        (5, (1, 12, 13)),
    ]


def test_carried_tokens_are_material_for_the_next_carryover() -> None:
    """A chunk alone (C - m = 2) could not fill the carryover (m = 6), and yet it stays full."""
    assert boundaries(ChunkSpec(8, 6, 5, head_size=2)) == [
        (8, ()),
        (2, (1, 2, 5, 6, 7, 8)),
        (2, (1, 2, 7, 8, 9, 10)),
        (2, (1, 2, 9, 10, 11, 12)),
        (2, (1, 2, 11, 12, 13, 14)),
    ]


def test_a_token_may_be_carried_over_several_boundaries() -> None:
    assert boundaries(ChunkSpec(10, 8, 6, head_size=1)) == [
        (10, ()),
        (2, (1, 4, 5, 6, 7, 8, 9, 10)),
        (2, (1, 6, 7, 8, 9, 10, 11, 12)),
        (2, (1, 8, 9, 10, 11, 12, 13, 14)),
        (2, (1, 10, 11, 12, 13, 14, 15, 16)),
        (2, (1, 12, 13, 14, 15, 16, 17, 18)),
    ]


def test_carried_tokens_are_material_with_a_head_outside_too() -> None:
    assert boundaries(ChunkSpec(8, 6, 4, head_size=1, head_outside=True)) == [
        (8, ()),
        (2, (1, 3, 4, 5, 6, 7, 8)),
        (2, (1, 5, 6, 7, 8, 9, 10)),
        (2, (1, 7, 8, 9, 10, 11, 12)),
    ]


def test_a_head_outside_and_the_tail_never_hold_a_token_twice() -> None:
    """If h + m > C, the tail comes from the tokens after the head."""
    spec = ChunkSpec(8, 6, 4, head_size=4, head_outside=True)
    state = start(spec, QUERY).advance(span(1, 8), StopReason.LENGTH)
    assert state.carried == span(1, 8)


def test_without_a_head_the_latest_tokens_are_carried() -> None:
    expected = [(6, ()), (4, (5, 6)), (4, (9, 10))]
    assert boundaries(ChunkSpec(6, 2, 3, head_size=0)) == expected
    assert boundaries(ChunkSpec(6, 2, 3, head_size=0, head_outside=True)) == expected


def test_a_head_as_large_as_the_carryover_leaves_no_tail() -> None:
    assert boundaries(ChunkSpec(6, 2, 3, head_size=2)) == [(6, ()), (4, (1, 2)), (4, (1, 2))]


def test_nothing_is_carried_where_the_carryover_is_zero() -> None:
    assert boundaries(ChunkSpec(3, 0, 3, head_size=0)) == [(3, ()), (3, ()), (3, ())]


def test_only_the_head_is_carried_where_it_is_outside_a_carryover_of_zero() -> None:
    spec = ChunkSpec(3, 0, 3, head_size=1, head_outside=True)
    assert boundaries(spec) == [(3, ()), (3, (1,)), (3, (1,))]


def test_the_sizes_that_trained_the_published_model() -> None:
    """C = 8192, m = 4096 and the default head of 100: a tail of 3996."""
    seen = boundaries(ChunkSpec(8192, 4096, 5))
    assert [new for new, _ in seen] == [8192, 4096, 4096, 4096, 4096]
    assert seen[1][1] == span(1, 100) + span(8192 - 3996 + 1, 8192)
    assert seen[4][1] == span(1, 100) + span(20_480 - 3996 + 1, 20_480)


# -- golden vectors: budgets -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context_size", "carryover_size", "max_chunks", "budget"),
    [
        pytest.param(8192, 4096, 5, 24_576, id="24K"),
        pytest.param(8192, 4096, 23, 98_304, id="96K"),
        pytest.param(4096, 2048, 11, 24_576, id="24K in contexts of 4K"),
        pytest.param(2048, 1024, 23, 24_576, id="24K in contexts of 2K"),
        pytest.param(8192, 1024, 6, 44_032, id="m=1K: 8K + 5 x 7K = 43K"),
        pytest.param(8192, 2048, 7, 45_056, id="m=2K: 8K + 6 x 6K = 44K"),
        pytest.param(8192, 3072, 8, 44_032, id="m=3K: 8K + 7 x 5K = 43K"),
        pytest.param(8192, 4096, 10, 45_056, id="m=4K: 8K + 9 x 4K = 44K"),
        pytest.param(8192, 5120, 13, 45_056, id="m=5K: 8K + 12 x 3K = 44K"),
        pytest.param(8192, 6144, 19, 45_056, id="m=6K: 8K + 18 x 2K = 44K"),
        pytest.param(8192, 7168, 37, 45_056, id="m=7K: 8K + 36 x 1K = 44K"),
    ],
)
def test_the_budgets_of_the_paper(
    context_size: int, carryover_size: int, max_chunks: int, budget: int
) -> None:
    spec = ChunkSpec(context_size, carryover_size, max_chunks)
    assert spec.budget == budget
    new_tokens = [new for new, _ in boundaries(spec)]
    assert sum(new_tokens) == budget
    assert new_tokens == [context_size] + [context_size - carryover_size] * (max_chunks - 1)


@pytest.mark.parametrize(
    ("spec", "most"),
    [
        (ChunkSpec(8192, 4096, 5), 8192),
        (ChunkSpec(8192, 4096, 5, head_outside=True), 8292),
        (ChunkSpec(8192, 4096, 1, head_outside=True), 8192),
        (ChunkSpec.longcot(24_576), 24_576),
    ],
)
def test_the_most_thinking_that_a_context_holds(spec: ChunkSpec, most: int) -> None:
    assert spec.max_thinking_context == most


# -- golden vectors: how a trace ends --------------------------------------------------------------

SMALL = ChunkSpec(context_size=4, carryover_size=2, max_chunks=3, head_size=1)


def after_one_boundary() -> ThinkingState:
    return start(SMALL, QUERY).advance((1, 2, 3, 4), StopReason.LENGTH)


def before_the_last_chunk() -> ThinkingState:
    return after_one_boundary().advance((5, 6), StopReason.LENGTH)


@pytest.mark.parametrize(
    ("state", "output_ids", "sampled"),
    [
        pytest.param(start(SMALL, QUERY), (EOS_ID,), 1, id="first token of the trace"),
        pytest.param(start(SMALL, QUERY), (1, EOS_ID), 2, id="inside the first chunk"),
        pytest.param(start(SMALL, QUERY), (1, 2, 3, EOS_ID), 4, id="on the first boundary"),
        pytest.param(after_one_boundary(), (EOS_ID,), 5, id="first token after a boundary"),
        pytest.param(after_one_boundary(), (5, EOS_ID), 6, id="on the second boundary"),
        pytest.param(before_the_last_chunk(), (EOS_ID,), 7, id="first token of the last chunk"),
        pytest.param(before_the_last_chunk(), (7, EOS_ID), 8, id="last token of the budget"),
    ],
)
def test_eos_completes_the_trace_wherever_it_falls(
    state: ThinkingState, output_ids: TokenIds, sampled: int
) -> None:
    end = state.advance(output_ids, StopReason.EOS)
    assert end.stop is TraceStop.COMPLETED
    assert end.num_sampled == sampled
    assert end.max_new_tokens == 0


def test_the_budget_ends_after_the_last_chunk() -> None:
    end = before_the_last_chunk().advance((7, 8), StopReason.LENGTH)
    assert end.stop is TraceStop.BUDGET
    assert (end.num_chunks, end.num_sampled, end.max_new_tokens) == (3, 8, 0)


@pytest.mark.parametrize(
    ("stop", "trace_stop"),
    [(StopReason.ABORT, TraceStop.ABORTED), (StopReason.ERROR, TraceStop.ERROR)],
)
@pytest.mark.parametrize("output_ids", [(), (1,), (1, 2, 3, 4)])
def test_an_abort_or_an_error_never_leads_to_a_next_chunk(
    stop: StopReason, trace_stop: TraceStop, output_ids: TokenIds
) -> None:
    end = start(SMALL, QUERY).advance(output_ids, stop)
    assert end.stop is trace_stop
    assert end.num_sampled == len(output_ids)
    assert end.max_new_tokens == 0


@pytest.mark.parametrize("stop", [StopReason.ABORT, StopReason.ERROR])
def test_a_failure_that_fills_the_last_chunk_is_no_budget_end(stop: StopReason) -> None:
    assert before_the_last_chunk().advance((7, 8), stop).stop is not TraceStop.BUDGET


@pytest.mark.parametrize("stop", ["stop", "tool_calls", None])
def test_a_stop_reason_that_is_unknown_never_leads_to_a_next_chunk(stop: object) -> None:
    with pytest.raises((PolicyError, ValueError)):
        start(SMALL, QUERY).advance((1, 2, 3, 4), stop)  # type: ignore[arg-type]


def test_longcot_is_chunking_with_one_chunk() -> None:
    spec = ChunkSpec.longcot(20)
    state = start(spec, QUERY)
    assert (spec.context_size, spec.max_chunks, spec.budget, spec.is_longcot) == (20, 1, 20, True)
    assert (state.prompt_ids, state.max_new_tokens) == (QUERY, 20)
    assert state.advance(span(1, 20), StopReason.LENGTH).stop is TraceStop.BUDGET
    assert state.advance((1, EOS_ID), StopReason.EOS).stop is TraceStop.COMPLETED


# -- what is refused -------------------------------------------------------------------------------


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(PolicyError, match=r"5 tokens.* at most 4"):
        start(SMALL, QUERY).advance(span(1, 5), StopReason.LENGTH)
    with pytest.raises(PolicyError, match=r"3 tokens.* at most 2"):
        after_one_boundary().advance((5, 6, EOS_ID), StopReason.EOS)


@pytest.mark.parametrize("stop", [StopReason.EOS, StopReason.LENGTH])
def test_no_token_at_all_is_refused(stop: StopReason) -> None:
    with pytest.raises(PolicyError):
        after_one_boundary().advance((), stop)


@pytest.mark.parametrize("stop", list(StopReason))
def test_a_chunk_after_the_end_is_refused(stop: StopReason) -> None:
    end = start(SMALL, QUERY).advance((EOS_ID,), StopReason.EOS)
    for output_ids in [(1,), ()]:
        with pytest.raises(PolicyError):
            end.advance(output_ids, stop)


@pytest.mark.parametrize(
    ("spec", "thinking"),
    [
        (ChunkSpec(100, 50, 4, head_size=10), 100),
        (ChunkSpec(100, 50, 4, head_size=10, head_outside=True), 110),
        (ChunkSpec.longcot(500), 500),
    ],
)
def test_a_query_too_long_is_told_how_long_it_may_be(spec: ChunkSpec, thinking: int) -> None:
    limit = thinking + 3
    assert start(spec, (90, 91, 92), limit).max_new_tokens == spec.context_size
    with pytest.raises(QueryTooLongError) as caught:
        start(spec, (90, 91, 92, 93), limit)
    assert "3" in re.findall(r"\d+", str(caught.value))


def test_a_query_of_any_length_starts_where_no_limit_is_known() -> None:
    assert start(SMALL, span(1, 1000)).max_new_tokens == 4


def test_an_empty_query_is_refused() -> None:
    with pytest.raises(QueryTooLongError, match="empty"):
        start(SMALL, ())


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ({"context_size": 0, "carryover_size": 0}, "context_size"),
        ({"max_chunks": 0}, "max_chunks"),
        ({"carryover_size": 8}, "carryover_size"),
        ({"carryover_size": 9}, "carryover_size"),
        ({"carryover_size": -1}, "carryover_size"),
        ({"head_size": 5}, "head_size"),
        ({"head_size": -1}, "head_size"),
        ({"head_size": 100}, "head_size"),
        ({"head_size": -1, "head_outside": True}, "head_size"),
    ],
)
def test_sizes_that_make_no_sense_are_refused_by_name(sizes: dict[str, Any], names: str) -> None:
    sound: dict[str, Any] = {
        "context_size": 8,
        "carryover_size": 4,
        "max_chunks": 3,
        "head_size": 2,
    }
    ChunkSpec(**sound)
    with pytest.raises(ConfigError, match=names):
        ChunkSpec(**(sound | sizes))


@pytest.mark.parametrize(("carryover", "head"), [(4096, 100), (32, 8), (3, 0), (0, 0)])
def test_an_unset_head_is_a_quarter_of_the_carryover_up_to_100(carryover: int, head: int) -> None:
    assert ChunkSpec(2 * carryover + 1, carryover, 3).head_size == head


# -- laws ------------------------------------------------------------------------------------------

law = settings(max_examples=60, deadline=None, database=None)


@st.composite
def specs(draw: st.DrawFn, head_outside: bool | None = None) -> ChunkSpec:
    context_size = draw(st.integers(1, 10))
    carryover_size = draw(st.integers(0, context_size - 1))
    outside = draw(st.booleans()) if head_outside is None else head_outside
    head_size = draw(st.integers(0, context_size if outside else carryover_size))
    return ChunkSpec(context_size, carryover_size, draw(st.integers(1, 6)), head_size, outside)


@dataclass(frozen=True)
class Play:
    """A trace of arbitrary chunks: the states between them, and all that was sampled."""

    states: list[ThinkingState]  # before the first chunk, ..., after the last one
    outputs: list[TokenIds]

    @property
    def spec(self) -> ChunkSpec:
        return self.states[0].spec

    def sampled_before(self, chunk: int) -> TokenIds:
        return tuple(token for output in self.outputs[:chunk] for token in output)


tokens = st.integers(1, 50)


@st.composite
def plays(
    draw: st.DrawFn, full: bool = False, head_outside: bool | None = None, eos: bool = False
) -> Play:
    """Chunks of any legal length, or only full ones, without EOS, or perhaps with it."""
    query = tuple(draw(st.lists(tokens, min_size=1, max_size=3)))
    states, outputs = [start(draw(specs(head_outside)), query)], []
    while states[-1].stop is None:
        most = states[-1].max_new_tokens
        output = tuple(draw(st.lists(tokens, min_size=most if full else 1, max_size=most)))
        stop = StopReason.EOS if eos and draw(st.booleans()) else StopReason.LENGTH
        outputs.append(output)
        states.append(states[-1].advance(output, stop))
    return Play(states, outputs)


@law
@given(plays())
def test_a_context_never_holds_more_than_the_query_and_its_bound(play: Play) -> None:
    spec = play.spec
    bound = spec.context_size + (spec.head_size if spec.head_outside else 0)
    for state in play.states[:-1]:
        assert len(state.prompt_ids) + state.max_new_tokens <= len(state.query_ids) + bound
        assert state.max_new_tokens >= 1


@law
@given(plays())
def test_no_more_than_the_carryover_is_carried(play: Play) -> None:
    spec = play.spec
    most = spec.carryover_size + (spec.head_size if spec.head_outside else 0)
    assert all(len(state.carried) <= most for state in play.states)


@law
@given(plays(full=True, head_outside=False))
def test_full_chunks_carry_exactly_the_carryover(play: Play) -> None:
    assert all(len(state.carried) == play.spec.carryover_size for state in play.states[1:-1])


@law
@given(plays())
def test_the_carryover_is_the_first_h_and_the_last_tokens_of_all_that_was_sampled(
    play: Play,
) -> None:
    """Tagged by position, so that equal tokens cannot stand in for each other."""
    spec = play.spec
    state, head = start(spec, (99,)), min(spec.head_size, len(play.outputs[0]))
    room = spec.carryover_size - (0 if spec.head_outside else head)
    for output in play.outputs:
        first = state.num_sampled
        positions = span(first, first + len(output) - 1)
        state = state.advance(positions, StopReason.LENGTH)
        if state.stop is None:
            sampled = state.num_sampled
            tail = range(max(head, sampled - room), sampled)
            assert state.carried == tuple(range(head)) + tuple(tail)


@law
@given(plays(eos=True))
def test_never_more_is_sampled_than_the_budget(play: Play) -> None:
    end = play.states[-1]
    assert end.num_sampled == len(play.sampled_before(len(play.outputs)))
    assert end.num_sampled <= play.spec.budget


@law
@given(plays(full=True))
def test_the_whole_budget_is_sampled_where_no_eos_comes(play: Play) -> None:
    spec = play.spec
    assert play.states[-1].num_sampled == spec.budget
    assert spec.budget == spec.context_size + (spec.max_chunks - 1) * (
        spec.context_size - spec.carryover_size
    )


@law
@given(plays(eos=True))
def test_a_trace_never_has_more_than_max_chunks(play: Play) -> None:
    assert play.states[-1].num_chunks == len(play.outputs) <= play.spec.max_chunks


@law
@given(plays(full=True, head_outside=False))
def test_full_chunks_use_up_all_chunks(play: Play) -> None:
    assert len(play.outputs) == play.spec.max_chunks


@law
@given(plays())
def test_the_next_prompt_is_the_query_and_the_carryover_alone(play: Play) -> None:
    for state in play.states[:-1]:
        assert state.prompt_ids == state.query_ids + state.carried


@law
@given(plays(full=True, head_outside=False), st.data())
def test_what_was_dropped_at_a_boundary_has_no_further_effect(
    play: Play, data: st.DataObject
) -> None:
    """Two pasts that agree on what is carried have the same future."""
    first = play.outputs[0]
    if play.spec.max_chunks == 1:
        return
    kept = play.states[1]
    head = len(kept.head or ())
    tail = play.spec.carryover_size - head
    other = tuple(
        token if i < head or i >= len(first) - tail else data.draw(tokens)
        for i, token in enumerate(first)
    )
    state = play.states[0].advance(other, StopReason.LENGTH)
    for before, output in zip(play.states[1:], play.outputs[1:], strict=False):
        assert state == before
        state = state.advance(output, StopReason.LENGTH)
    assert state == play.states[-1]


@law
@given(specs(), st.lists(tokens, min_size=1, max_size=10))
def test_the_cut_has_no_effect_on_a_trace_of_one_chunk(spec: ChunkSpec, output: list[int]) -> None:
    output_ids = tuple(output[: spec.context_size])
    cut, whole = start(spec, QUERY), start(ChunkSpec.longcot(spec.context_size), QUERY)
    assert (cut.prompt_ids, cut.max_new_tokens) == (whole.prompt_ids, whole.max_new_tokens)
    after = [state.advance(output_ids, StopReason.EOS) for state in (cut, whole)]
    assert replace(after[0], spec=whole.spec) == after[1]


@law
@given(specs())
def test_carryover_and_head_have_no_effect_where_there_is_one_chunk(spec: ChunkSpec) -> None:
    single, longcot = replace(spec, max_chunks=1), ChunkSpec.longcot(spec.context_size)
    assert single.budget == longcot.budget
    assert single.max_thinking_context == longcot.max_thinking_context
    assert boundaries(single) == boundaries(longcot)


@law
@given(plays(eos=True))
def test_advancing_leaves_the_state_alone_and_gives_the_same_each_time(play: Play) -> None:
    for before, output, after in zip(play.states, play.outputs, play.states[1:], strict=False):
        copy = replace(before)
        stop = StopReason.EOS if after.stop is TraceStop.COMPLETED else StopReason.LENGTH
        assert before.advance(output, stop) == before.advance(output, stop) == after
        assert before == copy
