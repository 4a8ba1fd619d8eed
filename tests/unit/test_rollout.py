"""Rollouts: what the policy is asked, what becomes of its answers, and what becomes of its faults.

Sampled tokens are 11, 12, ... in order; 1 is EOS.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from delethink.chunking import ChunkSpec
from delethink.errors import ModelError, QueryTooLongError
from delethink.policy import Completion, Policy, Sampling, ScriptedPolicy
from delethink.rollout import derive_seed, run_rollout, run_rollouts
from delethink.tokens import logprob_array, token_array
from delethink.types import StopReason, TokenIds, Trace, TraceStop

EOS = 1
QUERY = (90, 91)
SPEC = ChunkSpec(context_size=8, carryover_size=4, max_chunks=4, head_size=2)
FIRST, SECOND, THIRD = (11, 12, 13, 14, 15, 16, 17, 18), (19, 20, 21, 22), (23, 24, 25, 26)


def play(
    policy: Policy, spec: ChunkSpec = SPEC, query: TokenIds = QUERY, seed: int | None = None
) -> Trace:
    return asyncio.run(run_rollout(policy, spec, query, Sampling(seed=seed)))


def said(
    token_ids: TokenIds, stop: StopReason = StopReason.LENGTH, policy_version: int = 0
) -> Completion:
    logprobs = tuple(-token / 100 for token in token_ids)
    return Completion(token_ids, logprobs, stop, policy_version)


# -- a trace that goes well ------------------------------------------------------------------------


def test_the_policy_sees_the_query_and_the_carryover_only() -> None:
    policy = ScriptedPolicy([FIRST, SECOND, THIRD, (27, 28, EOS)], eos_id=EOS)
    trace = play(policy)
    assert policy.calls == [
        ((90, 91), 8),
        ((90, 91, 11, 12, 17, 18), 4),
        ((90, 91, 11, 12, 21, 22), 4),
        ((90, 91, 11, 12, 25, 26), 4),
    ]
    assert [chunk.prompt_ids for chunk in trace.chunks] == [prompt for prompt, _ in policy.calls]
    assert [chunk.carried for chunk in trace.chunks] == [0, 4, 4, 4]
    assert (trace.stop, trace.error) == (TraceStop.COMPLETED, None)


def test_carried_tokens_count_once_where_they_were_sampled() -> None:
    trace = play(ScriptedPolicy([FIRST, SECOND, (23, EOS)], eos_id=EOS))
    assert trace.length == 8 + 4 + 2
    assert trace.output_ids == (*FIRST, *SECOND, 23, EOS)
    assert trace.query_ids == QUERY


def test_a_chunk_keeps_the_results_of_the_policy() -> None:
    first, second = said(FIRST, policy_version=3), said((19, EOS), StopReason.EOS, policy_version=4)
    chunks = play(ScriptedPolicy([first, second])).chunks
    assert [chunk.output_ids for chunk in chunks] == [first.token_ids, second.token_ids]
    assert [chunk.logprobs for chunk in chunks] == [first.logprobs, second.logprobs]
    assert [chunk.stop for chunk in chunks] == [StopReason.LENGTH, StopReason.EOS]
    assert [chunk.policy_version for chunk in chunks] == [3, 4]


def test_chunks_keep_token_and_log_prob_arrays() -> None:
    plain = [said(FIRST), said(SECOND), said((23, EOS), StopReason.EOS)]
    blocks = [
        replace(c, token_ids=token_array(c.token_ids), logprobs=logprob_array(c.logprobs))
        for c in plain
    ]
    trace = play(ScriptedPolicy(blocks))
    assert trace == play(ScriptedPolicy(plain))
    for chunk, block in zip(trace.chunks, blocks, strict=True):
        assert chunk.output_ids is block.token_ids
        assert type(chunk.logprobs) is type(block.logprobs)
    assert type(trace.chunks[1].prompt_ids) is type(blocks[0].token_ids)


def test_a_policy_that_never_ends_spends_the_budget() -> None:
    policy = ScriptedPolicy(lambda prompt_ids, most: (7,) * most, eos_id=EOS)
    trace = play(policy)
    assert trace.stop is TraceStop.BUDGET
    assert trace.length == SPEC.budget == 8 + 3 * 4
    assert len(policy.calls) == 4


def test_eos_on_the_boundary_asks_for_no_next_chunk() -> None:
    policy = ScriptedPolicy([(11, 12, 13, 14, 15, 16, 17, EOS)], eos_id=EOS)
    trace = play(policy)
    assert (trace.stop, trace.length, len(policy.calls)) == (TraceStop.COMPLETED, 8, 1)


def test_longcot_is_one_call_of_the_whole_budget() -> None:
    policy = ScriptedPolicy(lambda prompt_ids, most: (7,) * most, eos_id=EOS)
    trace = play(policy, ChunkSpec.longcot(20))
    assert policy.calls == [(QUERY, 20)]
    assert (trace.stop, trace.length) == (TraceStop.BUDGET, 20)


# -- a trace that fails is data --------------------------------------------------------------------


async def raises(prompt_ids: TokenIds, most: int, sampling: Sampling) -> Completion:
    raise ConnectionError("worker 3 is gone")


async def returns_nothing(prompt_ids: TokenIds, most: int, sampling: Sampling) -> Any:
    return None


async def too_many(prompt_ids: TokenIds, most: int, sampling: Sampling) -> Completion:
    return said((7,) * (most + 1))


async def no_token(prompt_ids: TokenIds, most: int, sampling: Sampling) -> Completion:
    return said(())


async def log_probs_missing(prompt_ids: TokenIds, most: int, sampling: Sampling) -> Completion:
    return Completion((7, 7), (-0.5,), StopReason.LENGTH)


@dataclass
class FailsAtSecond:
    """One good chunk, then whatever ``fails`` does."""

    fails: Callable[[TokenIds, int, Sampling], Awaitable[Completion]]
    calls: int = 0

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        self.calls += 1
        if self.calls == 1:
            return said(FIRST)
        return await self.fails(prompt_ids, max_new_tokens, sampling)


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        (raises, "ConnectionError: worker 3 is gone"),
        (too_many, "5 tokens"),
        (no_token, "no token"),
        (log_probs_missing, "log-prob"),
        (returns_nothing, ""),
    ],
)
def test_a_fault_mid_trace_is_a_chunk_with_the_reason(fails: Any, reason: str) -> None:
    policy = FailsAtSecond(fails)
    trace = play(policy)
    good, bad = trace.chunks
    assert (trace.stop, trace.stop.is_failure, policy.calls) == (TraceStop.ERROR, True, 2)
    assert (good.output_ids, good.stop, good.error) == (FIRST, StopReason.LENGTH, None)
    assert (bad.prompt_ids, bad.carried) == ((90, 91, 11, 12, 17, 18), 4)
    assert (bad.output_ids, bad.logprobs, bad.stop) == ((), (), StopReason.ERROR)
    assert bad.error
    assert reason in bad.error
    assert trace.error == bad.error
    assert trace.output_ids == FIRST


def test_a_fault_in_the_first_chunk_is_a_trace_too() -> None:
    trace = play(ScriptedPolicy([ConnectionError("worker 3 is gone")]))
    assert (trace.stop, trace.length, len(trace.chunks)) == (TraceStop.ERROR, 0, 1)


@pytest.mark.parametrize("token_ids", [(), (19,), SECOND])
def test_an_abort_ends_the_trace(token_ids: TokenIds) -> None:
    policy = ScriptedPolicy([FIRST, said(token_ids, StopReason.ABORT)])
    trace = play(policy)
    assert (trace.stop, trace.stop.is_failure) == (TraceStop.ABORTED, True)
    assert trace.chunks[-1].stop is StopReason.ABORT
    assert len(policy.calls) == 2


def test_a_failed_trace_leaves_the_others_alone() -> None:
    def script(prompt_ids: TokenIds, most: int) -> TokenIds:
        if prompt_ids[0] == 81:
            raise ConnectionError("worker 3 is gone")
        return (EOS,)

    traces = asyncio.run(
        run_rollouts(ScriptedPolicy(script), SPEC, [(80,), (81,), (82,)], [Sampling()] * 3)
    )
    completed, failed = TraceStop.COMPLETED, TraceStop.ERROR
    assert [trace.stop for trace in traces] == [completed, failed, completed]


def test_a_script_asked_for_more_than_it_has_is_a_fault() -> None:
    trace = play(ScriptedPolicy([FIRST]))
    assert (trace.stop, trace.length) == (TraceStop.ERROR, 8)
    assert trace.error
    assert "script" in trace.error


# -- what is no data -------------------------------------------------------------------------------


def test_a_query_too_long_is_raised_before_anything_is_sampled() -> None:
    policy = ScriptedPolicy([FIRST])
    with pytest.raises(QueryTooLongError):
        asyncio.run(run_rollout(policy, SPEC, QUERY, Sampling(), max_model_tokens=9))
    assert policy.calls == []


def test_a_query_too_long_among_others_is_raised() -> None:
    policy = ScriptedPolicy(lambda prompt_ids, most: (EOS,))
    queries: list[TokenIds] = [(80,), (81, 82, 83)]
    with pytest.raises(QueryTooLongError):
        asyncio.run(run_rollouts(policy, SPEC, queries, [Sampling()] * 2, max_model_tokens=10))


def test_queries_and_samplings_must_match() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        asyncio.run(run_rollouts(ScriptedPolicy([]), SPEC, [QUERY, QUERY], []))


@dataclass
class Hangs:
    """Never answers; notes what became of its calls."""

    started: int = 0
    cancelled: int = 0

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        self.started += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        raise AssertionError("unreachable")


async def cancel(work: Awaitable[Any], policy: Hangs, calls: int) -> None:
    task = asyncio.ensure_future(work)
    while policy.started < calls:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


def test_cancelling_a_trace_cancels_its_chunk() -> None:
    policy = Hangs()
    asyncio.run(cancel(run_rollout(policy, SPEC, QUERY, Sampling()), policy, calls=1))
    assert policy.cancelled == 1


def test_cancelling_traces_cancels_all_of_them() -> None:
    policy = Hangs()
    asyncio.run(cancel(run_rollouts(policy, SPEC, [QUERY] * 3, [Sampling()] * 3), policy, calls=3))
    assert policy.cancelled == 3


# -- many traces -----------------------------------------------------------------------------------


@dataclass
class Slow:
    """Answers a query later the smaller its first token is; counts the calls in flight."""

    in_flight: int = 0
    most_in_flight: int = 0
    finished: list[int] = field(default_factory=list)

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        for _ in range(10 * (90 - prompt_ids[0])):
            await asyncio.sleep(0)
        self.in_flight -= 1
        self.finished.append(prompt_ids[0])
        return said((prompt_ids[0], EOS), StopReason.EOS)


def test_traces_are_sampled_concurrently_and_returned_in_order() -> None:
    policy = Slow()
    queries: list[TokenIds] = [(80,), (85,), (82,), (88,)]
    traces = asyncio.run(run_rollouts(policy, SPEC, queries, [Sampling()] * 4))
    assert [trace.query_ids for trace in traces] == queries
    assert [trace.output_ids[0] for trace in traces] == [80, 85, 82, 88]
    assert policy.finished == [88, 85, 82, 80]
    assert policy.most_in_flight == 4


def test_no_traces_are_asked_of_no_queries() -> None:
    assert asyncio.run(run_rollouts(ScriptedPolicy([]), SPEC, [], [])) == []


# -- seeds -----------------------------------------------------------------------------------------


@dataclass
class SeedRecorder:
    """Fills every chunk; notes the sampling settings by query."""

    seen: dict[int, list[Sampling]] = field(default_factory=dict)

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        await asyncio.sleep(0)
        self.seen.setdefault(prompt_ids[0], []).append(sampling)
        return said((7,) * max_new_tokens)


def seeds_of(traces: dict[int, int | None]) -> dict[int, list[int | None]]:
    """Seeds of the chunks by first token of the query, for traces played at the same time."""
    policy = SeedRecorder()
    queries: list[TokenIds] = [(token,) for token in traces]
    samplings = [Sampling(temperature=0.6, seed=seed) for seed in traces.values()]
    asyncio.run(run_rollouts(policy, SPEC, queries, samplings))
    assert {s.temperature for seen in policy.seen.values() for s in seen} == {0.6}
    return {token: [sampling.seed for sampling in seen] for token, seen in policy.seen.items()}


def test_each_chunk_has_a_seed_of_its_own() -> None:
    seeds = [seed for chunks in seeds_of({80: 5, 81: 6}).values() for seed in chunks]
    assert None not in seeds
    assert len(set(seeds)) == len(seeds) == 8


def test_seeds_are_reproducible_and_independent_of_other_traces() -> None:
    together = seeds_of({80: 5, 81: 6, 82: 7})
    assert seeds_of({82: 7, 81: 6, 80: 5}) == together
    assert seeds_of({81: 6})[81] == together[81]


def test_the_seed_of_a_chunk_does_not_depend_on_the_query() -> None:
    assert seeds_of({80: 5})[80] == seeds_of({81: 5})[81]


def test_without_a_seed_no_chunk_has_one() -> None:
    assert seeds_of({80: None})[80] == [None] * 4


def test_a_seed_of_zero_is_a_seed() -> None:
    seeds = seeds_of({80: 0})[80]
    assert None not in seeds
    assert len(set(seeds)) == 4


def test_seeds_do_not_depend_on_the_process() -> None:
    script = "from delethink.rollout import derive_seed; print(derive_seed(1, 'q', 3))"
    environment = os.environ | {"PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True)
    assert int(printed) == derive_seed(1, "q", 3)


def test_every_part_of_a_seed_matters_and_so_does_their_order() -> None:
    parts = [(1, 2, 3), (1, 2, 4), (1, 3, 2), (2, 1, 3), (12, 3), (1, 23), (1, 2), ()]
    assert len({derive_seed(*part) for part in parts}) == len(parts)


def test_seeds_are_small_enough_for_any_engine() -> None:
    assert all(0 <= derive_seed(i) < 2**31 for i in range(1000))


def test_nothing_is_sampled_if_one_query_does_not_fit() -> None:
    policy = ScriptedPolicy(lambda prompt, limit: (7,) * limit)

    async def play() -> None:
        with pytest.raises(QueryTooLongError):
            await run_rollouts(policy, ChunkSpec(4, 2, 9, 0), [(1,), (1,) * 9], [Sampling()] * 2, 8)
        await asyncio.sleep(0.01)

    asyncio.run(play())
    assert policy.calls == []


def test_a_users_mistake_is_not_data() -> None:
    policy = ScriptedPolicy([ModelError("no such folder")])
    with pytest.raises(ModelError, match="no such folder"):
        asyncio.run(run_rollout(policy, ChunkSpec(4, 2, 2, 0), (1,), Sampling()))


def test_a_failed_chunk_claims_no_policy_version_and_an_abort_has_a_reason() -> None:
    raised = ScriptedPolicy([RuntimeError()])
    trace = asyncio.run(run_rollout(raised, ChunkSpec(4, 2, 2, 0), (1,), Sampling()))
    assert trace.chunks[0].policy_version is None
    assert trace.error == "RuntimeError()"
    aborted = ScriptedPolicy([Completion((), (), StopReason.ABORT)])
    trace = asyncio.run(run_rollout(aborted, ChunkSpec(4, 2, 2, 0), (1,), Sampling()))
    assert trace.error == "the engine cancelled the request"
