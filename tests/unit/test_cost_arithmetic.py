"""FLOP and memory formulas against slow sums that follow the definitions."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delethink import ChunkSpec, StopReason, start
from delethink.carryover import (
    CarriedLength,
    Carryover,
    Full,
    LineBreak,
    Nothing,
    SinkWindow,
    StateBlock,
    Tail,
    last,
)
from delethink.cost.estimate import crossing
from delethink.cost.flops import (
    CACHE_BLOCK_TOKENS,
    LONGCOT,
    Cut,
    cut_traces,
    decode_flops,
    forward_flops,
    sampling_flops,
    training_flops,
    visible_pairs,
)
from delethink.cost.memory import cache_bytes, longest_context, longest_thinking, read_bytes
from delethink.cost.shape import FeedForward, Layer, ModelShape, delta_attention, softmax_attention
from delethink.errors import ConfigError
from delethink.types import TokenIds

FULL = softmax_attention(8, 2, 1, 4)
SLIDING = softmax_attention(8, 2, 2, 4, window=6)
LINEAR = delta_attention(300, 1, 2, 3, 4, 4)
MIXED = ModelShape(
    "mixed",
    hidden_size=8,
    vocabulary_size=13,
    layers=(
        Layer(FULL, FeedForward(100)),
        Layer(SLIDING, FeedForward(20, expert_weights=30, experts=4, experts_per_token=2)),
        Layer(LINEAR, FeedForward(100)),
    ),
)
QUADRATIC = ModelShape("quadratic", 8, 13, (Layer(FULL, FeedForward(100)),) * 2)
SHAPES = pytest.mark.parametrize("shape", [MIXED, QUADRATIC], ids=lambda shape: shape.name)


@st.composite
def specs(draw: st.DrawFn) -> ChunkSpec:
    context = draw(st.integers(2, 30))
    carry = draw(st.integers(0, context - 1))
    head = draw(st.integers(0, carry))
    named = draw(st.sampled_from([None, Tail(), Nothing(), SinkWindow(head)]))
    if named is not None:
        return ChunkSpec(context, carry, 1000, carryover=named)
    outside = head + carry <= context and draw(st.booleans())
    return ChunkSpec(context, carry, 1000, head, outside)


def chunk_sizes(spec: ChunkSpec, query: int, thinking: int) -> list[tuple[int, int]]:
    """Return (prompt, new) of each chunk, from the chunk rule itself."""
    state, chunks, left = start(spec, (7,) * query), [], thinking
    while left:
        new = min(left, state.max_new_tokens)
        chunks.append((len(state.prompt_ids), new))
        left -= new
        state = state.advance((5,) * new, StopReason.LENGTH if left else StopReason.EOS)
    return chunks


@given(specs(), st.integers(1, 40), st.integers(1, 200))
def test_chunks_are_those_of_the_rule(spec: ChunkSpec, query: int, thinking: int) -> None:
    chunks = cut_traces(thinking, query, Cut.of(spec))
    counted = {
        (int(prompt), int(new)): int(count)
        for count, prompt, new in zip(chunks.count[2:], chunks.prompt[2:], chunks.new[2:])  # noqa: B905
        if count
    }
    first = (int(chunks.prompt[0]), int(chunks.new[0]))
    expected = chunk_sizes(spec, query, thinking)
    assert expected[0] == first
    assert chunks.count[:2].sum() == 1
    later = {chunk: len(list(same)) for chunk, same in itertools.groupby(expected[1:])}
    assert counted == later
    assert chunks.per_trace == len(expected)
    longest = max(prompt + new for prompt, new in expected)
    assert longest_context(thinking, query, Cut.of(spec)) == longest


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"carryover": Full()}, "full"),
        ({"carryover": StateBlock()}, "state_block"),
        ({"boundary": LineBreak(4)}, "line_break"),
    ],
)
def test_carryovers_of_varying_length_and_boundaries_are_refused(
    settings: dict[str, Any], name: str
) -> None:
    with pytest.raises(ConfigError, match=name):
        Cut.of(ChunkSpec(32, 16, 4, 0, **settings))


@dataclass(frozen=True)
class EveryOther(Carryover):
    """Carries the first token of the trace, and every other one of the latest 2 (m - 2)."""

    def carry(
        self, head: TokenIds | None, window: TokenIds, size: int
    ) -> tuple[TokenIds, TokenIds]:
        if head is None:
            head, window = window[:1], window[1:]
        return head, last(window, 2 * (size - 2))[::2]

    def carried_length(self, size: int) -> CarriedLength:
        return CarriedLength(size - 1, 1)


def test_a_new_carryover_states_its_own_length() -> None:
    spec = ChunkSpec(32, 10, 1000, carryover=EveryOther())
    assert Cut.of(spec) == (32, 9, 0, 1)
    chunks = cut_traces(200, 7, Cut.of(spec))
    expected = chunk_sizes(spec, 7, 200)
    assert chunks.per_trace == len(expected)
    assert (chunks.prompt[2], chunks.new[2]) == expected[1] == (7 + 9, 32 - 9)


def test_prefix_cache_hits() -> None:
    chunks = cut_traces(100, 40, Cut(32, 16, 0, 10), group=4)
    assert chunks.count.tolist() == [0.25, 0.75, 4, 1]
    assert chunks.cached.tolist() == [0, 32, 48, 48]  # whole blocks of 39, 50 and 50 tokens
    assert CACHE_BLOCK_TOKENS == 16
    nothing = cut_traces(100, 40, Cut(32, 16, 0, 10), group=4, prefix_cache=False)
    assert nothing.cached.tolist() == [0, 0, 0, 0]


@given(st.integers(0, 60), st.integers(0, 60), st.none() | st.integers(1, 70))
def test_visible_pairs(start: int, more: int, window: int | None) -> None:
    seen = [min(p + 1, window or 10**9) for p in range(start, start + more)]
    assert visible_pairs(start, start + more, window) == sum(seen)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 70))
def test_visible_pairs_of_fixed_chunks(start: int, more: int, chunk: int) -> None:
    """A query sees the tokens of its chunk that are not after it."""
    seen = [p - p // chunk * chunk + 1 for p in range(start, start + more)]
    assert visible_pairs(start, start + more, chunk, chunked=True) == sum(seen)


@SHAPES
@given(start=st.integers(0, 40), more=st.integers(1, 40))
def test_a_pass_is_the_sum_of_its_tokens(shape: ModelShape, start: int, more: int) -> None:
    whole = forward_flops(shape, start, start + more, heads=more)
    one_by_one = sum(forward_flops(shape, p, p + 1, heads=1) for p in range(start, start + more))
    assert whole == one_by_one == decode_flops(shape, start, start + more)


def test_masked_accounting_counts_all_pairs() -> None:
    masked = forward_flops(MIXED, 3, 9, 1, masked=True)
    true = forward_flops(MIXED, 3, 9, 1)
    hidden = 6 * 9 - (4 + 5 + 6 + 7 + 8 + 9), 6 * 9 - (4 + 5 + 6 + 6 + 6 + 6)
    assert masked - true == hidden[0] * FULL.pair_flops + hidden[1] * SLIDING.pair_flops


@given(specs(), st.integers(1, 20), st.integers(1, 150))
def test_a_trace_is_the_sum_of_its_chunks(spec: ChunkSpec, query: int, thinking: int) -> None:
    chunks = cut_traces(thinking, query, Cut.of(spec), prefix_cache=False)
    expected = chunk_sizes(spec, query, thinking)
    sampled = sum(
        forward_flops(MIXED, 0, prompt, 1) + decode_flops(MIXED, prompt, prompt + new - 1)
        for prompt, new in expected
    )
    assert sampling_flops(MIXED, chunks) == sampled
    trained = sum(3 * forward_flops(MIXED, 0, prompt + new, new) for prompt, new in expected)
    assert training_flops(MIXED, chunks) == trained


@given(st.integers(1, 150), st.integers(1, 20))
def test_longcot_is_one_chunk_of_the_same_rule(thinking: int, query: int) -> None:
    spec = ChunkSpec.longcot(200)
    assert Cut.of(spec) == LONGCOT
    one = cut_traces(thinking, query, LONGCOT)
    same = cut_traces(thinking, query, Cut(200, 0))
    assert sampling_flops(MIXED, one) == sampling_flops(MIXED, same)


def test_sharing_the_query_costs_its_prefill_once_a_group() -> None:
    alone = sampling_flops(QUADRATIC, cut_traces(50, 33, LONGCOT, group=1))
    shared = sampling_flops(QUADRATIC, cut_traces(50, 33, LONGCOT, group=4))
    saved = forward_flops(QUADRATIC, 0, 33, 1) - forward_flops(QUADRATIC, 32, 33, 1)
    assert alone - shared == pytest.approx(0.75 * saved)


@given(st.integers(0, 40))
def test_a_cache_keeps_windows_and_states(tokens: int) -> None:
    kept = FULL.cache_numbers * tokens + SLIDING.cache_numbers * min(tokens, 6)
    assert cache_bytes(MIXED, tokens, 2) == 2 * (kept + LINEAR.state_numbers)


@given(st.integers(0, 40))
def test_a_layer_without_keys_reads_the_cache_of_another(tokens: int) -> None:
    """It keeps nothing, but a step of decoding reads what the other one keeps again."""
    reader = softmax_attention(8, 2, 1, 4, kv_projections=0)
    part = FeedForward(100)
    shape = ModelShape("shared", 8, 13, (Layer(FULL, part), Layer(reader, part)))
    assert cache_bytes(shape, tokens) == 2 * FULL.cache_numbers * tokens
    assert read_bytes(shape, tokens) == 2 * cache_bytes(shape, tokens)
    assert FULL.weights - reader.weights == 2 * 8 * 4  # the projections of keys and values
    assert reader.pair_flops == FULL.pair_flops


def test_a_state_in_float32_takes_4_bytes_a_number() -> None:
    wide = replace(LINEAR, float32_numbers=10)
    shape = ModelShape("wide", 8, 13, (Layer(wide, FeedForward(100)),))
    assert cache_bytes(shape, 5, 2) == 2 * LINEAR.state_numbers + 40
    assert cache_bytes(shape, 5, 1) == LINEAR.state_numbers + 40


def test_products_beside_the_weights_and_projections_beside_the_layers() -> None:
    more = replace(
        QUADRATIC,
        layers=(Layer(FULL, FeedForward(100, token_flops=7)),) * 2,
        outer_weights=50,
        row_parameters=1000,
        outer_parameters=3,
    )
    plain = decode_flops(QUADRATIC, 4, 5)
    assert decode_flops(more, 4, 5) == plain + 2 * 7 + 2 * 50
    assert training_flops(more, cut_traces(1, 5, LONGCOT)) == (
        training_flops(QUADRATIC, cut_traces(1, 5, LONGCOT)) + 3 * 6 * (2 * 7 + 2 * 50)
    )
    assert more.parameters - QUADRATIC.parameters == 50 + 1000 + 3 - 8


def test_a_cache_in_blocks() -> None:
    assert cache_bytes(QUADRATIC, 17, 2, block=16) == 2 * cache_bytes(QUADRATIC, 16, 2)


@given(st.integers(1, 100), st.integers(0, 10_000))
def test_the_longest_thinking_just_fits(query: int, room: int) -> None:
    room += int(cache_bytes(MIXED, query))
    longest = longest_thinking(MIXED, query, room)
    assert cache_bytes(MIXED, query + longest) <= room < cache_bytes(MIXED, query + longest + 1)


def test_a_cache_that_does_not_grow_fits_any_thinking() -> None:
    bounded = ModelShape("bounded", 8, 13, (Layer(SLIDING, FeedForward(100)),))
    assert longest_thinking(bounded, 1, 1e6) == np.inf
    assert longest_thinking(bounded, 1, 10) == 0


def test_training_flops_of_longcot_are_the_polynomial_derived_by_hand() -> None:
    sympy = pytest.importorskip("sympy")
    n, p = sympy.symbols("n p", positive=True)
    query = 5
    pairs = sympy.summation(p + 1, (p, 0, query + n - 1))
    weights = 2 * QUADRATIC.token_weights * (query + n) + 2 * QUADRATIC.head_weights * n
    derived = sympy.Poly(sympy.expand(3 * (weights + 2 * FULL.pair_flops * pairs)), n)
    assert derived.degree() == 2
    for thinking in range(1, 200):
        exact = training_flops(QUADRATIC, cut_traces(thinking, query, LONGCOT))
        assert exact == int(derived.eval(thinking))


@SHAPES
def test_training_flops_of_delethink_are_linear_at_full_chunks(shape: ModelShape) -> None:
    lengths = 24 + 16 * np.arange(40)
    costs = training_flops(shape, cut_traces(lengths, 5, Cut(24, 8, 0, 2)))
    assert len(set(np.diff(costs))) == 1


def test_crossing_is_the_last_length_at_which_delethink_is_not_cheaper() -> None:
    assert crossing(lambda n: n**2, lambda n: 1000.0 * n, 10, 10**6) == 1000
    assert crossing(lambda n: n, lambda n: n**2, 10, 10**6) is None
    assert crossing(lambda n: n**2, lambda n: n, 10, 10**6) == 10
