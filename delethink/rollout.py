"""Rollouts: sampling traces from any policy, and replaying, cutting and extending them.

A failed chunk ends its trace with a reason instead of an exception, so one broken request does not
stop a cluster. The caller decides how many failures are acceptable.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from delethink.chunking import ChunkSpec, ThinkingState, start
from delethink.errors import DeadlineError, PolicyError, RolloutError, UserError, WorkersLostError
from delethink.output import get_logger, safe_text
from delethink.policy import Policy, Sampling, SchedulingHint
from delethink.tokens import Logprobs, as_list, token_array
from delethink.types import Chunk, ChunkRole, Problem, StopReason, TokenIds, Trace, TraceStop

_logger = get_logger(__name__)


def derive_seed(*parts: int | str) -> int:
    """Return a stable, well mixed seed for (run seed, step, query, trace, chunk) or any parts."""
    text = repr(parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1


async def run_rollout(
    policy: Policy,
    spec: ChunkSpec,
    query_ids: TokenIds,
    sampling: Sampling,
    max_model_tokens: int | None = None,
) -> Trace:
    """Sample one trace to its end.

    Chunk l uses a seed derived from ``sampling.seed`` and l, so the result does not depend on the
    worker. Traces of a group need different seeds to differ.

    Raises:
        QueryTooLongError: the query leaves no room for a full context.
        UserError: raised by the policy; it concerns every trace.
        WorkersLostError: raised by the policy; no worker is left.
    """
    return await _sample(policy, start(spec, query_ids, max_model_tokens), sampling)


async def run_rollouts(
    policy: Policy,
    spec: ChunkSpec,
    queries: Sequence[TokenIds],
    samplings: Sequence[Sampling],
    max_model_tokens: int | None = None,
    on_end: Callable[[int, Trace], None] = lambda index, trace: None,
    timeout: float | None = None,
) -> list[Trace]:
    """Sample one trace for each query concurrently.

    Args:
        policy: samples the chunks.
        spec: sizes and policies of the chunks.
        queries: q of each trace.
        samplings: sampling parameters of each trace.
        max_model_tokens: the longest sequence of the model, if known.
        on_end: called with the index and the trace when a trace ends.
        timeout: seconds after which unfinished traces are aborted. They keep their chunks and get a
            last chunk without tokens for the reason. A synchronous engine in this process delays
            the timeout until its call returns.

    Returns:
        The traces in the order of ``queries``.

    Raises:
        QueryTooLongError: a query leaves no room for a full context; nothing is sampled.
        UserError, WorkersLostError: raised by the policy; the other traces are cancelled.
    """
    now = asyncio.get_running_loop().time()
    deadline = None if timeout is None else _Deadline(now + timeout, timeout)
    pairs = zip(queries, samplings, strict=True)
    states = [(start(spec, query, max_model_tokens), sampling) for query, sampling in pairs]

    async def sample(index: int, state: ThinkingState, sampling: Sampling) -> Trace:
        trace = await _sample(policy, state, sampling, deadline=deadline)
        on_end(index, trace)
        return trace

    tasks = [asyncio.ensure_future(sample(i, *pair)) for i, pair in enumerate(states)]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


class _Deadline(NamedTuple):
    """Time at which unfinished traces are aborted."""

    at: float  # on the event loop's clock
    timeout: float  # seconds, for the error text


async def _sample(
    policy: Policy,
    state: ThinkingState,
    sampling: Sampling,
    chunks: tuple[Chunk, ...] = (),
    deadline: _Deadline | None = None,
) -> Trace:
    """Sample chunks from ``state`` until the trace ends."""
    while state.stop is None:
        chunk, state = await sample_next(policy, state, sampling, deadline)
        chunks = (*chunks, chunk)
    return Trace(state.query_ids, chunks, state.stop)


async def sample_next(
    policy: Policy,
    state: ThinkingState,
    sampling: Sampling,
    deadline: _Deadline | None = None,
) -> tuple[Chunk, ThinkingState]:
    """Sample the next chunk of a trace, with its seed and its place in the queue of an engine.

    Args:
        policy: samples the chunk.
        state: a state before the end of its trace.
        sampling: sampling parameters of the trace.
        deadline: time at which the chunk is aborted.

    Returns:
        The chunk, and the state after it. A failure of the policy is a chunk without tokens.

    Raises:
        UserError, WorkersLostError: raised by the policy.
    """
    given, query = sampling.hint or SchedulingHint(), hash(state.query_ids)
    position = {"num_chunks": state.num_chunks, "max_chunks": state.spec.max_chunks}
    hint = replace(given, query=query, **position)
    seed = sampling.seed
    if seed is not None:
        written = () if state.role is ChunkRole.THINKING else (state.role.value,)
        seed = derive_seed(seed, state.num_chunks, *written)
    own = replace(sampling, seed=seed, hint=hint)
    return await _sample_chunk(policy, state, own, deadline)


_DEFAULT_REASONS = {
    StopReason.ABORT: "the engine cancelled the request",
    StopReason.ERROR: "the engine reported an error without a reason",
}


async def _sample_chunk(
    policy: Policy, state: ThinkingState, sampling: Sampling, deadline: _Deadline | None
) -> tuple[Chunk, ThinkingState]:
    """Sample one chunk. A failure of the policy becomes a chunk without tokens."""
    prompt_ids = state.prompt_ids
    output_ids: TokenIds = ()
    logprobs: Logprobs = ()
    version: int | None = None
    worker: str | None = None
    try:
        limit = asyncio.timeout_at(deadline and deadline.at)
        try:
            async with limit:
                done = await policy.generate(prompt_ids, state.max_new_tokens, sampling)
        except TimeoutError:
            if deadline is None or not limit.expired():
                raise  # the policy's own timeout
            raise DeadlineError(f"the step was over after {deadline.timeout:g} s") from None
        ids, stop = state.truncate(done.token_ids, done.stop)
        state.check(ids, stop)
        output_ids, logprobs = ids, done.logprobs[: len(ids)]
        version, reason = done.policy_version, _DEFAULT_REASONS.get(stop)
        worker = done.worker
    except (UserError, WorkersLostError):
        raise
    except DeadlineError as error:
        stop, reason = StopReason.ABORT, str(error)
    except Exception as error:  # an engine may raise anything
        stop = StopReason.ERROR
        reason = f"{type(error).__name__}: {error}" if str(error) else repr(error)
        reason = safe_text(reason)
        # An engine says what failed; after anything else, the lines of code are the only trace.
        has_lines = not isinstance(error, PolicyError) or _logger.isEnabledFor(logging.DEBUG)
        text = "chunk %d of a trace failed: %s"
        _logger.warning(text, state.num_chunks + 1, reason, exc_info=has_lines)
    chunk = Chunk(
        prompt_ids=prompt_ids,
        output_ids=output_ids,
        logprobs=logprobs,
        stop=stop,
        carried=len(prompt_ids) - len(state.query_ids),
        policy_version=version,
        error=reason,
        role=state.role,
        worker=worker,
    )
    return chunk, state.advance(output_ids, stop)


def replay_trace(env: Any, problem: Problem, trace: Trace) -> float:
    """Step a Gymnasium environment of chunks through a trace and return the last reward.

    An environment with the text interface is stepped with the text of each chunk.

    Raises:
        RolloutError: a prompt or the end of the episode differs from the trace, a chunk failed, or
            the text of a chunk is encoded to other tokens than the sampled ones.
    """
    observation, info = env.reset(options={"problem": problem})
    reward, ended = 0.0, False
    for i, chunk in enumerate(trace.chunks):
        if ended:
            raise RolloutError(f"the environment ended before chunk {i} of {len(trace.chunks)}")
        if chunk.stop in (StopReason.ABORT, StopReason.ERROR):
            raise RolloutError(
                f"chunk {i} failed ({chunk.error}) and cannot be replayed; cut the trace before it "
                "with cut_trace"
            )
        observed = _observed_ids(observation, info)
        if i == 0 and observed != chunk.prompt_ids:
            raise RolloutError(
                "the environment's query differs from the query of the trace: the problem, the "
                "tokenizer or its chat template is another one"
            )
        if observed != chunk.prompt_ids:
            raise RolloutError(
                f"the environment's prompt differs from the prompt of chunk {i}: the rollout and "
                "the environment use different chunking"
            )
        by_text = isinstance(observation, str)
        action = _text_of(env, chunk.output_ids) if by_text else chunk.output_ids
        observation, reward, terminated, truncated, info = env.step(action)
        if by_text and token_array(info["output_ids"]) != chunk.output_ids:
            raise RolloutError(
                f"the text of chunk {i} is encoded to other tokens than the sampled ones; replay "
                "the trace in an environment of token ids"
            )
        ended = terminated or truncated
    if not ended:
        raise RolloutError("the environment has not ended after the last chunk of the trace")
    return float(reward)


def _observed_ids(observation: Any, info: Mapping[str, Any]) -> TokenIds:
    """Return the ids of a prompt; with the text interface ``info`` has them."""
    ids = info.get("prompt_ids") if isinstance(observation, str) else observation
    if isinstance(ids, Mapping) or getattr(ids, "ndim", 1) != 1:
        ids = None
    try:
        return token_array(ids)
    except (TypeError, ValueError):
        raise RolloutError(
            "an observation must be a sequence of token ids, or a text with its ids in "
            f"info['prompt_ids']; got {observation!r:.80}. Replay the trace in Thinking-v0 or "
            "TextThinking-v0"
        ) from None


def _text_of(env: Any, ids: TokenIds) -> str:
    tokenizer = getattr(env.unwrapped, "tokenizer", None)
    if tokenizer is None:
        raise RolloutError("an environment of text needs a tokenizer to replay a trace, got none")
    return str(tokenizer.decode(as_list(ids)))


def retrace(spec: ChunkSpec, trace: Trace) -> ThinkingState:
    """Return the state after the chunks of a trace.

    Raises:
        RolloutError: a chunk or its prompt does not follow ``spec``.
    """
    state = start(spec, trace.query_ids)
    for i, chunk in enumerate(trace.chunks):
        if chunk.prompt_ids != state.prompt_ids or chunk.role is not state.role:
            raise RolloutError(f"the prompt of chunk {i} does not follow {spec}")
        try:
            state = state.advance(chunk.output_ids, chunk.stop)
        except PolicyError as error:
            raise RolloutError(f"chunk {i} does not follow {spec}: {error}") from None
    return state


def cut_trace(trace: Trace, num_chunks: int) -> Trace:
    """Return the first chunks of a trace, which ``extend_trace`` can continue.

    Raises:
        RolloutError: the trace has fewer chunks.
    """
    if not 0 <= num_chunks <= len(trace.chunks):
        raise RolloutError(
            f"cannot cut a trace of {len(trace.chunks)} chunks to {num_chunks}; allowed: 0 to "
            f"{len(trace.chunks)}"
        )
    return replace(trace, chunks=trace.chunks[:num_chunks], stop=TraceStop.CUT)


async def extend_trace(
    policy: Policy,
    spec: ChunkSpec,
    trace: Trace,
    sampling: Sampling,
    max_model_tokens: int | None = None,
) -> Trace:
    """Continue a cut trace to its end.

    A ``spec`` with more chunks also continues a trace beyond its old budget.

    Raises:
        RolloutError: the trace does not follow ``spec``, or has ended under it.
        QueryTooLongError: the query leaves no room for a full context.
    """
    start(spec, trace.query_ids, max_model_tokens)  # checks the lengths
    state = retrace(spec, trace)
    if state.stop is not None:
        raise RolloutError(
            f"the trace has ended ({state.stop.value}) under {spec}; cut it with cut_trace, or "
            "raise max_chunks"
        )
    return await _sample(policy, state, sampling, trace.chunks)
