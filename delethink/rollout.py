"""Plays traces and groups against any policy.

A trace that fails is data with a reason, so that one broken request does not stop a cluster; the
caller decides how many failures it bears.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace

from delethink.policy import Completion, Policy, Sampling
from delethink.rule import ChunkSpec, ThinkingState, start
from delethink.types import Chunk, StopReason, TokenIds, Trace


def derive_seed(*parts: int | str) -> int:
    """A seed for one chunk out of (run seed, step, query, trace, chunk): stable and well mixed."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1


async def play_trace(
    policy: Policy,
    spec: ChunkSpec,
    query_ids: TokenIds,
    sampling: Sampling,
    max_model_tokens: int | None = None,
) -> Trace:
    """Plays one trace to its end.

    With ``sampling.seed``, chunk l is drawn with a seed of its own that depends on that seed and l
    only, so that it does not matter which worker takes it.

    Raises:
        QueryTooLongError: the query leaves no room for a context of thinking.
    """
    state = start(spec, query_ids, max_model_tokens)
    chunks: list[Chunk] = []
    while state.stop is None:
        chunk = await _play_chunk(policy, state, _seed_chunk(sampling, state.num_chunks))
        chunks.append(chunk)
        state = state.advance(chunk.output_ids, chunk.stop)
    return Trace(state.query_ids, tuple(chunks), state.stop)


async def play_traces(
    policy: Policy,
    spec: ChunkSpec,
    queries: list[TokenIds],
    samplings: list[Sampling],
    max_model_tokens: int | None = None,
) -> list[Trace]:
    """Plays one trace for each query at the same time, in the order given."""
    plays = [
        play_trace(policy, spec, query, sampling, max_model_tokens)
        for query, sampling in zip(queries, samplings, strict=True)
    ]
    return list(await asyncio.gather(*plays))


def _seed_chunk(sampling: Sampling, chunk: int) -> Sampling:
    if sampling.seed is None:
        return sampling
    return replace(sampling, seed=derive_seed(sampling.seed, chunk))


async def _play_chunk(policy: Policy, state: ThinkingState, sampling: Sampling) -> Chunk:
    """One chunk; what the policy raises or breaks becomes a chunk that says so."""
    try:
        done = await policy.generate(state.prompt_ids, state.max_new_tokens, sampling)
        state.advance(done.token_ids, done.stop)
        error = None
    except Exception as problem:  # data with a reason: the boundary between us and any engine
        done = Completion((), (), StopReason.ERROR)
        error = f"{type(problem).__name__}: {problem}"
    return Chunk(
        prompt_ids=state.prompt_ids,
        output_ids=done.token_ids,
        logprobs=done.logprobs,
        stop=done.stop,
        carried=len(state.carried),
        policy_version=done.policy_version,
        error=error,
    )
