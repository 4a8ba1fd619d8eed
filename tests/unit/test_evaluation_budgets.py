"""A trace cut to a smaller budget equals a trace sampled with that budget and the same seeds."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delethink import (
    ChunkSpec,
    Completion,
    ConfigError,
    RolloutError,
    Sampling,
    ScriptedPolicy,
    StopReason,
    TokenIds,
    Trace,
    run_rollout,
)
from delethink.evaluation.settings import (
    cut_to_budget,
    make_settings,
    spread_chunks,
    with_budget,
)

EOS = 1


class SeededPolicy(ScriptedPolicy):
    """Draws tokens from (seed, prompt), so a longer limit continues the same sequence."""

    def __init__(self, ends: float) -> None:
        super().__init__([])
        self._ends = ends

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        rng = random.Random(f"{sampling.seed} {prompt_ids}")
        ids: list[int] = []
        while len(ids) < max_new_tokens:
            ids.append(EOS if rng.random() < self._ends else rng.randrange(2, 50))
            if ids[-1] == EOS:
                break
        stop = StopReason.EOS if ids[-1] == EOS else StopReason.LENGTH
        return Completion(tuple(ids), (0.0,) * len(ids), stop)


def sample(spec: ChunkSpec, seed: int, ends: float) -> Trace:
    query = (2, 3, seed % 7 + 2)
    return asyncio.run(run_rollout(SeededPolicy(ends), spec, query, Sampling(1.0, seed)))


@st.composite
def specs(draw: st.DrawFn) -> ChunkSpec:
    context = draw(st.integers(2, 20))
    carry = draw(st.integers(0, context - 1))
    outside = draw(st.booleans())
    head = draw(st.integers(0, context if outside else carry))
    return ChunkSpec(context, carry, draw(st.integers(1, 8)), min(head, carry), outside)


@given(specs(), st.integers(0, 10**6), st.sampled_from([0.0, 0.02, 0.1]), st.data())
def test_a_cut_trace_is_the_trace_of_a_run_with_the_smaller_budget(
    spec: ChunkSpec, seed: int, ends: float, data: st.DataObject
) -> None:
    whole = sample(spec, seed, ends)
    chunks = data.draw(st.integers(1, spec.max_chunks))
    small = replace(spec, max_chunks=chunks)
    assert cut_to_budget(whole, small) == sample(small, seed, ends)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 10**6), st.sampled_from([0.0, 0.05]))
def test_longcot_too(budget: int, less: int, seed: int, ends: float) -> None:
    less = min(less, budget)
    whole = sample(ChunkSpec.longcot(budget), seed, ends)
    assert cut_to_budget(whole, ChunkSpec.longcot(less)) == sample(
        ChunkSpec.longcot(less), seed, ends
    )


def test_a_trace_of_another_rule_is_refused() -> None:
    whole = sample(ChunkSpec(10, 5, 4, 0), 1, 0.0)
    with pytest.raises(RolloutError, match="another prompt"):
        cut_to_budget(whole, ChunkSpec(10, 4, 3, 0))


def test_a_budget_that_no_number_of_chunks_has_is_refused() -> None:
    spec = ChunkSpec(90, 45, 9, 0)
    assert with_budget(spec, 180).max_chunks == 3
    for budget in (100, 495):
        with pytest.raises(ConfigError, match=str(budget)):
            with_budget(spec, budget)


@given(st.integers(1, 300), st.integers(2, 9))
def test_spread_chunks_has_both_ends_and_rises(most: int, number: int) -> None:
    chunks = spread_chunks(most, number)
    assert chunks[0] == 1
    assert chunks[-1] == most
    assert len(chunks) == min(most, number)
    assert list(chunks) == sorted(set(chunks))


def test_longcot_gets_the_budgets_of_the_delethink_settings() -> None:
    settings = make_settings(["a", "b"], ["delethink", "longcot"], [8192], [4096], [5, 12, 23])
    assert [s.budgets for s in settings] == [(24_576, 53_248, 98_304)] * 4
    assert len({s.key for s in settings}) == 4
    capped = make_settings(["a"], ["longcot"], [8192], [], [5, 12], longcot_cap=30_000)
    assert capped[0].budgets == (24_576, 30_000)
