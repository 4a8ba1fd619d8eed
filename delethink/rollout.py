"""Plays traces and groups against any policy.

A trace that fails is data with a reason, so that one broken request does not stop a cluster; the
caller decides how many failures it bears.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from delethink.chunking import ChunkSpec, ThinkingState, start
from delethink.errors import (
    DeadlineError,
    PolicyError,
    RolloutError,
    UserError,
    WorkersLostError,
)
from delethink.policy import Completion, Policy, Sampling, SchedulingHint
from delethink.tokens import token_array
from delethink.types import Chunk, ChunkRole, Problem, StopReason, TokenIds, Trace, TraceStop

_logger = logging.getLogger(__name__)


class ReplayEnv(Protocol):
    """What ``replay_trace`` needs of an environment; Gymnasium's have it."""

    def reset(self, *, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """The first observation of an episode."""
        ...

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Observation, reward, terminated, truncated, info."""
        ...


def derive_seed(*parts: int | str) -> int:
    """A seed for one chunk out of (run seed, step, query, trace, chunk): stable and well mixed."""
    text = repr(parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1


async def run_rollout(
    policy: Policy,
    spec: ChunkSpec,
    query_ids: TokenIds,
    sampling: Sampling,
    max_model_tokens: int | None = None,
) -> Trace:
    """Plays one trace to its end.

    With ``sampling.seed``, chunk l is drawn with a seed of its own that depends on that seed and l
    only, so that it does not matter which worker takes it. Traces of one group need seeds of their
    own, or they are all the same.

    Raises:
        QueryTooLongError: the query leaves no room for a context of thinking.
        UserError: whatever else of this kind the policy raises: it concerns every trace.
        WorkersLostError: so does this, nothing is left to sample with.
    """
    return await _play(policy, start(spec, query_ids, max_model_tokens), sampling)


async def run_rollouts(
    policy: Policy,
    spec: ChunkSpec,
    queries: Sequence[TokenIds],
    samplings: Sequence[Sampling],
    max_model_tokens: int | None = None,
    on_end: Callable[[int, Trace], None] = lambda index, trace: None,
    timeout: float | None = None,
) -> list[Trace]:
    """Plays one trace for each query at the same time, in the order given.

    ``on_end`` is told the place and the trace of each that has ended, while the others go on. After
    ``timeout`` seconds those that have not ended are aborted: the chunks that they have are kept,
    and a last one without tokens says why. (An engine in this process that holds up the event loop
    is first waited for.)

    Raises:
        QueryTooLongError: a query leaves no room for thinking; nothing is played then.
        UserError, WorkersLostError: the policy raised one; the other traces are given up.
    """
    deadline = _Deadline.after(timeout)
    pairs = zip(queries, samplings, strict=True)
    states = [(start(spec, query, max_model_tokens), sampling) for query, sampling in pairs]

    async def play(index: int, state: ThinkingState, sampling: Sampling) -> Trace:
        trace = await _play(policy, state, sampling, deadline=deadline)
        on_end(index, trace)
        return trace

    tasks = [asyncio.ensure_future(play(i, *pair)) for i, pair in enumerate(states)]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def replay_trace(env: ReplayEnv, problem: Problem, trace: Trace) -> float:
    """Takes a trace through an environment chunk by chunk and returns what it earns there.

    Raises:
        RolloutError: the environment shows another prompt than the policy saw, or ends elsewhere.
    """
    observation, _ = env.reset(options={"problem": problem})
    reward, ended = 0.0, False
    for i, chunk in enumerate(trace.chunks):
        if ended:
            raise RolloutError(f"the environment ended before chunk {i} of {len(trace.chunks)}")
        if _shown(observation) != chunk.prompt_ids:
            raise RolloutError(
                f"chunk {i} was sampled after another prompt than the environment shows: the "
                "rollout and the environment do not follow one rule"
            )
        observation, reward, terminated, truncated, _ = env.step(chunk.output_ids)
        ended = terminated or truncated
    if not ended:
        raise RolloutError("the environment goes on after the last chunk of the trace")
    return float(reward)


def _shown(observation: Any) -> TokenIds:
    """The ids of an observation."""
    if hasattr(observation, "tolist") and getattr(observation, "ndim", 0) != 1:
        raise RolloutError(
            f"an observation is a sequence of token ids, the environment gave {observation!r:.80}"
        )
    return token_array(observation)


def retrace(spec: ChunkSpec, trace: Trace) -> ThinkingState:
    """The state that the chunks of a trace lead to.

    Raises:
        RolloutError: a chunk was sampled after another prompt than the rule of ``spec`` makes, or
            could not have been sampled under it at all.
    """
    state = start(spec, trace.query_ids)
    for i, chunk in enumerate(trace.chunks):
        if chunk.prompt_ids != state.prompt_ids or chunk.role is not state.role:
            raise RolloutError(f"chunk {i} was sampled after another prompt than {spec} makes")
        try:
            state = state.advance(chunk.output_ids, chunk.stop)
        except PolicyError as error:
            raise RolloutError(f"chunk {i} does not follow {spec}: {error}") from None
    return state


def cut_trace(trace: Trace, num_chunks: int) -> Trace:
    """The first chunks of a trace, as one that ``extend_trace`` can go on with.

    Raises:
        RolloutError: it has fewer chunks.
    """
    if not 0 <= num_chunks <= len(trace.chunks):
        raise RolloutError(
            f"a trace of {len(trace.chunks)} chunks cannot be cut to {num_chunks}: 0 to "
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
    """Goes on from where a trace was cut or its budget was spent, to its end under ``spec``.

    With a ``spec`` of more chunks than the trace was played with, it thinks on past its old budget.

    Raises:
        RolloutError: the trace does not follow ``spec``, or it has ended under it.
        QueryTooLongError: the query leaves no room for a context of thinking.
    """
    start(spec, trace.query_ids, max_model_tokens)  # for its own checks
    state = retrace(spec, trace)
    if state.stop is not None:
        raise RolloutError(
            f"the trace has ended ({state.stop.value}) under {spec}: cut it, or give it more chunks"
        )
    return await _play(policy, state, sampling, trace.chunks)


@dataclass(frozen=True)
class _Deadline:
    """When traces are given up."""

    at: float | None = None  # by the event loop's clock; None: never
    seconds: float = 0.0  # that there were

    @classmethod
    def after(cls, seconds: float | None) -> _Deadline:
        if seconds is None:
            return cls()
        return cls(asyncio.get_running_loop().time() + seconds, seconds)

    async def bound(self, answer: Awaitable[Completion]) -> Completion:
        """The answer, if it comes in time."""
        limit = asyncio.timeout_at(self.at)
        try:
            async with limit:
                return await answer
        except TimeoutError:
            if not limit.expired():
                raise  # the policy's own
            raise DeadlineError(f"the step was over after {self.seconds:g} s") from None


_NEVER = _Deadline()


async def _play(
    policy: Policy,
    state: ThinkingState,
    sampling: Sampling,
    played: tuple[Chunk, ...] = (),
    deadline: _Deadline | None = None,
) -> Trace:
    chunks = list(played)
    known, query = sampling.hint or SchedulingHint(), hash(state.query_ids)
    while state.stop is None:
        progress = SchedulingHint(
            query, state.num_chunks, state.spec.max_chunks, known.expected_chunks, known.batch
        )
        placed = Sampling(sampling.temperature, _seed(sampling, state), progress)
        chunk, state = await _play_chunk(policy, state, placed, deadline or _NEVER)
        chunks.append(chunk)
    return Trace(state.query_ids, tuple(chunks), state.stop)


def _seed(sampling: Sampling, state: ThinkingState) -> int | None:
    if sampling.seed is None:
        return None
    thinking = state.role is ChunkRole.THINKING
    parts = (state.num_chunks,) if thinking else (state.num_chunks, state.role.value)
    return derive_seed(sampling.seed, *parts)


async def _play_chunk(
    policy: Policy, state: ThinkingState, sampling: Sampling, deadline: _Deadline
) -> tuple[Chunk, ThinkingState]:
    """One chunk and the state after it; what the policy raises or breaks becomes data."""
    prompt_ids = state.prompt_ids
    try:
        answer = policy.generate(prompt_ids, state.max_new_tokens, sampling)
        done = await (answer if deadline.at is None else deadline.bound(answer))
        output_ids, stop = state.cut(done.token_ids, done.stop)
        state.check(output_ids, stop)
    except (UserError, WorkersLostError):
        raise
    except DeadlineError as error:
        return _failed_chunk(state, StopReason.ABORT, str(error))
    except Exception as error:  # the boundary between the library and any engine
        _logger.warning("a chunk failed", exc_info=True)
        reason = f"{type(error).__name__}: {error}" if str(error) else repr(error)
        return _failed_chunk(state, StopReason.ERROR, reason)
    whole = output_ids is done.token_ids
    chunk = Chunk(
        prompt_ids=prompt_ids,
        output_ids=output_ids,
        logprobs=done.logprobs if whole else done.logprobs[: len(output_ids)],
        stop=stop,
        carried=len(prompt_ids) - len(state.query_ids),
        policy_version=done.policy_version,
        error=_FAILURES.get(stop),
        role=state.role,
    )
    return chunk, state.advance(output_ids, stop, checked=True)


_FAILURES = {
    StopReason.ABORT: "the engine gave up the request",
    StopReason.ERROR: "the engine reported an error and no reason",
}


def _failed_chunk(
    state: ThinkingState, stop: StopReason, error: str
) -> tuple[Chunk, ThinkingState]:
    chunk = Chunk(
        prompt_ids=state.prompt_ids,
        output_ids=(),
        logprobs=(),
        stop=stop,
        carried=len(state.prompt_ids) - len(state.query_ids),
        policy_version=None,
        error=error,
        role=state.role,
    )
    return chunk, state.advance((), stop)
