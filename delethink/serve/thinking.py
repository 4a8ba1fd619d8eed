"""Thinking in chunks as a stream of events, usable without a server.

    async for event in think(policy, ChunkSpec(8192, 4096, 5), messages, tokenizer=tokenizer):
        if isinstance(event, SampledText):
            print(event.text, end="")

Chunks follow ``delethink.chunking``, as in ``run_rollout``: a greedy trace has the same tokens. Two
things are added. Thinking that uses up its budget is ended with the mark of the end of thinking,
and an answer is sampled after it. An answer never crosses a boundary: it continues in the context
in which it began, where room is kept back for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from delethink.chunking import ChunkSpec, ThinkingState, start
from delethink.errors import ConfigError, ModelError, PolicyError, QueryTooLongError
from delethink.output import get_logger
from delethink.policy import Completion, Policy, Sampling, stream_completion
from delethink.rollout import derive_seed, sample_next
from delethink.serve.events import (
    BoundaryCrossed,
    EndReason,
    Phase,
    ThinkingEvent,
    TraceEnded,
    TraceUsage,
)
from delethink.serve.loops import without_repeats
from delethink.serve.reader import ReadingRule, TraceReader
from delethink.thinking_marks import ThinkingMarks, marks_of
from delethink.tokenization import Tokenizer, encode, end_tokens, message_ids, reward_text
from delethink.tokens import LogprobArray, Logprobs, TokenArray, TokenIds, as_token_ids
from delethink.types import END_OF_THINKING, ChunkRole, StopReason

_logger = get_logger(__name__)

Query = Sequence[int] | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class ThinkingLimits:
    """Limits of one trace, within those of its ``ChunkSpec``.

    Raises:
        ConfigError: a limit is out of range.
    """

    answer_tokens: int = 1024  # room kept back for the answer
    thinking_tokens: int | None = None  # of all chunks together; by default the spec's budget
    total_tokens: int | None = None  # sampled tokens; the answer keeps half, up to answer_tokens
    thinking_time_s: float | None = None  # then the thinking is ended and the answer sampled
    is_answer_only: bool = False  # the query itself ends the thinking

    def __post_init__(self) -> None:
        for name, least in (("answer_tokens", 1), ("thinking_tokens", 0), ("total_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")

    def thinking_budget(self, spec: ChunkSpec) -> int:
        """Return the maximum number of thinking tokens."""
        budget = spec.thinking_budget
        if self.thinking_tokens is not None:
            budget = min(budget, self.thinking_tokens)
        if self.total_tokens is not None:
            answer = min(self.answer_tokens, max(1, self.total_tokens // 2))
            budget = min(budget, self.total_tokens - answer)
        return budget


@dataclass(frozen=True)
class ThinkingModel:
    """A policy with everything that its traces need.

    Raises:
        ModelError: the model does not mark the end of its thinking.
    """

    policy: Policy
    tokenizer: Tokenizer
    max_model_tokens: int | None = None  # longest sequence; ``None`` if unknown
    marks: ThinkingMarks = None  # type: ignore[assignment]  # by default those of the tokenizer
    eos_ids: TokenIds = ()  # by default those of the tokenizer

    def __post_init__(self) -> None:
        marks = self.marks or marks_of(self.tokenizer)
        if marks.end is None:
            raise ModelError(
                "the model does not mark the end of its thinking, so its thinking cannot be told "
                f"from its answer, and no answer can be forced; {END_OF_THINKING} is the usual "
                "mark: name the model's own, or use another model"
            )
        object.__setattr__(self, "marks", marks)
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids or end_tokens(self.tokenizer)))

    @cached_property
    def mark_ids(self) -> TokenIds:
        """Return the tokens that end the thinking by force."""
        return encode(self.tokenizer, self.marks.forced)

    @property
    def rule(self) -> ReadingRule:
        """Return the rule without stop strings and loops."""
        return ReadingRule((self.marks.end or "",), frozenset(self.eos_ids))

    def context_tokens(self, spec: ChunkSpec, limits: ThinkingLimits) -> int:
        """Return the longest context besides the query: thinking, mark and answer."""
        return spec.max_thinking_context + len(self.mark_ids) + limits.answer_tokens

    def check_query(self, query_ids: TokenIds, spec: ChunkSpec, limits: ThinkingLimits) -> None:
        """Check that a query leaves room for a full context, the mark and the answer.

        Raises:
            QueryTooLongError: there is no room; the text has the numbers.
        """
        if self.max_model_tokens is not None:
            room = self.max_model_tokens - self.context_tokens(spec, limits)
            if len(query_ids) > room:
                raise QueryTooLongError(
                    f"the query has {len(query_ids)} tokens and may have at most {max(room, 0)}: "
                    f"the model takes {self.max_model_tokens}, a context has up to "
                    f"{spec.max_thinking_context} thinking tokens, and {limits.answer_tokens} for "
                    f"the answer with {len(self.mark_ids)} for the end of thinking are kept back; "
                    "shorten the query, or lower the context size or the room for the answer"
                )
        start(spec, query_ids, self.max_model_tokens)

    def reader(self, rule: ReadingRule) -> TraceReader:
        """Return a reader of one trace of this model."""

        def decode(token_ids: Sequence[int]) -> str:
            # Some tokenizers drop the space before a full stop, which may be on its way already.
            return reward_text(self.tokenizer, token_ids, clean_up_tokenization_spaces=False)

        return TraceReader(decode, rule)


async def think(
    model: ThinkingModel,
    spec: ChunkSpec,
    query: Query,
    *,
    sampling: Sampling = Sampling(),
    limits: ThinkingLimits | None = None,
    rule: ReadingRule | None = None,
    answer_policy: Policy | None = None,
    name: str = "a trace",
) -> AsyncGenerator[ThinkingEvent, None]:
    """Sample one trace and yield its events.

    Args:
        model: the policy, with its tokenizer and its marks.
        spec: sizes and policies of the chunks.
        query: token ids, or messages for the chat template.
        sampling: sampling parameters; seeds of chunks are derived as in ``run_rollout``.
        limits: budgets of thinking and answer.
        rule: stop strings and loops; marks and end tokens are those of the model by default.
        answer_policy: samples the answer, in a request of its own. By default an answer continues
            the chunk that it began in.
        name: of the trace, in the log.

    Yields:
        The events; the last one is ``TraceEnded``.

    Raises:
        QueryTooLongError: the query leaves no room for thinking and answer.
        UserError, WorkersLostError: raised by the policy.
        PolicyError: a chunk failed.

    Close the generator (``contextlib.aclosing``) to cancel sampling.
    """
    messages = bool(query) and isinstance(query[0], Mapping)
    ids = message_ids(model.tokenizer, query) if messages else as_token_ids(query)  # type: ignore[arg-type]
    limits = limits or ThinkingLimits()
    model.check_query(ids, spec, limits)
    rule = rule or model.rule
    queue: asyncio.Queue[ThinkingEvent | None] = asyncio.Queue()
    emit = queue.put_nowait
    trace = _TraceRun(model, spec, ids, sampling, limits, rule, answer_policy, emit, name)
    task = asyncio.ensure_future(trace.run())
    task.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while (event := await queue.get()) is not None:
            yield event
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@dataclass
class _TraceRun:
    """Samples one trace. As the policy of its own chunks, it reads tokens while they are sampled.

    It tells ``sample_next`` of a chunk that ends the thinking as of one that ends the trace.
    """

    model: ThinkingModel
    spec: ChunkSpec
    query_ids: TokenIds
    sampling: Sampling
    limits: ThinkingLimits
    rule: ReadingRule
    answer_policy: Policy | None
    emit: Callable[[ThinkingEvent], None]
    name: str
    usage: TraceUsage = field(init=False)
    reason: EndReason | None = None  # of the end of thinking
    finished: bool = False  # the answer ended, or a stop string was found
    answer_limit: int = 0  # tokens of the answer, set when it begins
    deadline: float | None = None  # of thinking, on the event loop's clock
    failure: PolicyError | None = None  # of the last chunk
    is_looping: bool = False  # the last chunk ended with a loop that the trace passes

    def __post_init__(self) -> None:
        self.reader = self.model.reader(self.rule)
        self.thinking_budget = self.limits.thinking_budget(self.spec)
        self.num_thinking = 0  # sampled tokens of thinking, without written carryovers
        self.mark_ids = self.model.mark_ids
        self.usage = TraceUsage(prompt_tokens=len(self.query_ids))

    async def run(self) -> None:
        """Sample the trace, and emit its events."""
        if self.limits.thinking_time_s is not None:
            self.deadline = asyncio.get_running_loop().time() + self.limits.thinking_time_s
        if self.limits.is_answer_only:
            context, self.reason = self.query_ids, EndReason.NONE
            self.reader.phase = Phase.ANSWER
            self._begin_answer(len(context))
        else:
            context = await self._think()
        reason = self.reason or EndReason.BUDGET
        if reason.is_forced:
            context = _without_ends(context, self.model.eos_ids) + self.mark_ids
            self._emit_all(self.reader.force_end(reason, self.model.marks.forced))
            self._begin_answer(len(context))
        if not self.finished and self._answer_left > 0:
            await self._answer(context)
        self._emit_all(self.reader.flush())
        self.emit(TraceEnded(not self.finished, reason, self.usage, self.reader.stop_string))

    async def _think(self) -> TokenIds:
        """Sample chunks to the end of thinking, and return the last context."""
        state = start(self.spec, self.query_ids)
        context = state.prompt_ids
        if self.thinking_budget == 0:
            self.reason = EndReason.BUDGET
        while self.reason is None:
            policy, before = _ChunkPolicy(self, state), state
            chunk, state = await sample_next(policy, state, self.sampling)
            if self.failure is not None:
                raise self.failure
            if self.reason is None and state.stop is not None and state.stop.is_failure:
                raise PolicyError(chunk.error or f"the trace ended: {state.stop.value}")
            self._count_chunk(chunk.role)
            context = chunk.prompt_ids + chunk.output_ids
            if self.reason is None and state.stop is not None:
                self.reason = EndReason.BUDGET
            if self.is_looping and chunk.role is ChunkRole.THINKING:
                state = self._nudged(before, chunk.output_ids, state)
            if self.reason is None and state.role is ChunkRole.THINKING:
                self._cross(state)
        return context

    def _count_chunk(self, role: ChunkRole) -> None:
        if role is ChunkRole.THINKING:
            self.usage = replace(self.usage, chunks=self.usage.chunks + 1)

    def _nudged(
        self, before: ThinkingState, output_ids: TokenIds, after: ThinkingState
    ) -> ThinkingState:
        """Return the state after a chunk that ended with a loop.

        The carryover is that of the context without the repeats, and ends with the nudge. It has no
        more tokens than the carryover with the repeats, so that no bound is crossed.
        """
        size = self.reader.loop_tokens
        if after.context is not None:  # the model writes the carryover
            return replace(after, context=without_repeats(after.context, size))
        head, tail = self.spec.carry(before.head, without_repeats(before.tail + output_ids, size))
        head = head[: after.num_carried]
        room = after.num_carried - len(head)
        nudge = (self.rule.nudge_ids or ())[:room]
        tail = tail[max(0, len(tail) - room + len(nudge)) :] + nudge
        return replace(after, head=head, tail=tail)

    def _cross(self, state: ThinkingState) -> None:
        usage, prompt = self.usage, len(state.prompt_ids)
        is_nudge, self.is_looping = self.is_looping, False
        self.usage = replace(
            usage,
            boundaries=usage.boundaries + 1,
            nudges=usage.nudges + is_nudge,
            carried_tokens=usage.carried_tokens + state.num_carried,
            reencoded_tokens=usage.reencoded_tokens + prompt,
        )
        self.emit(BoundaryCrossed(state.num_chunks, state.num_carried, prompt, is_nudge))

    async def sample_chunk(
        self, state: ThinkingState, limit: int, sampling: Sampling
    ) -> tuple[TokenIds, Logprobs, StopReason]:
        """Sample a chunk of thinking, read it, and find out how it ended."""
        left = self.thinking_budget - self.num_thinking
        reading = _Reading(self, state.prompt_ids, min(limit, left))
        whole = state if self.spec.boundary is not None else None
        stop = await reading.sample(self.model.policy, sampling, self.deadline, whole)
        if reading.timed_out and self.reader.phase is Phase.THINKING:
            self.reason = EndReason.TIME
        elif self.reader.phase is Phase.ANSWER:
            self.reason = EndReason.MARK
            if self.answer_policy is None:
                self.finished = self.finished or reading.ended_by_eos
        elif self.reader.ended is EndReason.LOOP and self._may_pass_loop(state):
            self.reader.pass_loop()
            self.is_looping, stop = True, StopReason.LENGTH
        elif self.reader.ended is not None:
            self.reason = self.reader.ended
            self.finished = self.reason is EndReason.STOP
        elif stop is StopReason.EOS:
            self.reason = EndReason.EOS
        elif self.num_thinking >= self.thinking_budget:
            self.reason = EndReason.BUDGET
        if self.reason is not None:
            stop = StopReason.EOS if reading.token_ids else StopReason.ABORT
        return reading.token_ids, reading.logprobs, stop

    def _may_pass_loop(self, state: ThinkingState) -> bool:
        """Return whether another chunk may follow a chunk that ends with a loop."""
        has_chunks = state.num_chunks + 1 < self.spec.max_chunks
        has_tokens = self.num_thinking < self.thinking_budget
        return self.rule.nudge_ids is not None and has_chunks and has_tokens

    def read(self, reading: _Reading, token_ids: TokenIds, logprobs: Logprobs) -> int:
        """Read sampled tokens, and return the number of those that belong to the trace."""
        used = 0
        while used < len(token_ids) and not reading.is_enough:
            phase, end = self.reader.phase, len(token_ids)
            if phase is Phase.ANSWER:
                end = min(end, used + self._answer_left)
            events, count = self.reader.read(token_ids[used:end], logprobs[used:end])
            self._emit_all(events)
            self._count(phase, count)
            used += count
            if phase is Phase.THINKING and self.reader.phase is Phase.ANSWER:
                self._begin_answer(reading.position + used)
                reading.is_enough = self.answer_policy is not None
            if self.reader.ended is not None:
                reading.is_enough = True
                self.finished = self.finished or self.reader.ended is EndReason.STOP
            elif self.reader.phase is Phase.ANSWER and self._answer_left < 1:
                reading.is_enough = True
        return used

    def _count(self, phase: Phase, count: int) -> None:
        if phase is Phase.THINKING:
            self.num_thinking += count
            total = self.usage.reasoning_tokens + count
            self.usage = replace(self.usage, reasoning_tokens=total)
        else:
            self.usage = replace(self.usage, answer_tokens=self.usage.answer_tokens + count)

    def count_written(self, count: int) -> None:
        """Count the tokens of a written carryover."""
        total = self.usage.reasoning_tokens + count
        self.usage = replace(self.usage, reasoning_tokens=total)

    def _begin_answer(self, context_tokens: int) -> None:
        """Set the room of an answer that begins after so many tokens of its context."""
        most = len(self.query_ids) + self.model.context_tokens(self.spec, self.limits)
        self.answer_limit = most - context_tokens
        if self.limits.total_tokens is not None:
            left = self.limits.total_tokens - self.usage.completion_tokens
            self.answer_limit = min(self.answer_limit, left)

    @property
    def _answer_left(self) -> int:
        return self.answer_limit - self.usage.answer_tokens

    async def _answer(self, context: TokenIds) -> None:
        """Sample the answer, or the rest of it, in a request of its own."""
        total = self.usage.reencoded_tokens + len(context)
        self.usage = replace(self.usage, reencoded_tokens=total)
        seed = self.sampling.seed
        own = replace(self.sampling, seed=None if seed is None else derive_seed("answer", seed))
        reading = _Reading(self, context, self._answer_left)
        policy = self.answer_policy or self.model.policy
        stop = await reading.sample(policy, own)
        if stop in (StopReason.ABORT, StopReason.ERROR):
            raise PolicyError("the engine aborted the answer")
        self.finished = self.finished or reading.ended_by_eos

    def _emit_all(self, events: Sequence[ThinkingEvent]) -> None:
        for event in events:
            self.emit(event)


class _ChunkPolicy:
    """Policy of one chunk of a run."""

    def __init__(self, run: _TraceRun, state: ThinkingState) -> None:
        self._run, self._state = run, state

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """Sample the chunk as far as the trace needs it, and keep a failure for ``think``."""
        run = self._run
        try:
            if self._state.role is ChunkRole.CARRYOVER:
                completion = await run.model.policy.generate(prompt_ids, max_new_tokens, sampling)
                run.count_written(len(completion.token_ids))
                return completion
            return Completion(*await run.sample_chunk(self._state, max_new_tokens, sampling))
        except PolicyError as error:
            run.failure = error
            return Completion((), (), StopReason.ERROR)


class _Reading:
    """One request to a policy, whose tokens are read as they come."""

    def __init__(self, run: _TraceRun, prompt_ids: TokenIds, limit: int) -> None:
        self._run, self._prompt_ids, self._limit = run, prompt_ids, limit
        self._ids, self._logprobs = list[int](), list[float]()
        self._enough = asyncio.get_running_loop().create_future()
        self.timed_out = False

    @property
    def token_ids(self) -> TokenIds:
        """Return the tokens that belong to the trace."""
        return TokenArray(TokenArray.to_array(self._ids))

    @property
    def logprobs(self) -> Logprobs:
        """Return their log-probs."""
        return LogprobArray(LogprobArray.to_array(self._logprobs))

    @property
    def position(self) -> int:
        """Return the number of tokens of the context before the next ones."""
        return len(self._prompt_ids) + len(self._ids)

    @property
    def ended_by_eos(self) -> bool:
        """Return whether the last token ends an answer."""
        return bool(self._ids) and self._ids[-1] in self._run.model.eos_ids

    @property
    def is_enough(self) -> bool:
        """Return whether the trace needs no more tokens of this request."""
        return self._enough.done()

    @is_enough.setter
    def is_enough(self, value: bool) -> None:
        if value and not self._enough.done():
            self._enough.set_result(None)

    def _on_tokens(self, token_ids: TokenIds, logprobs: Logprobs) -> None:
        used = self._run.read(self, token_ids, logprobs)
        self._ids.extend(token_ids[:used])
        self._logprobs.extend(logprobs[:used])

    async def sample(
        self,
        policy: Policy,
        sampling: Sampling,
        deadline: float | None = None,
        state: ThinkingState | None = None,
    ) -> StopReason:
        """Sample until the policy ends, the trace has enough, or the deadline passes.

        ``state`` makes the whole chunk be sampled before it is read, up to its early boundary.
        """
        sampled = (
            self._stream(policy, sampling)
            if state is None
            else self._sample_whole(policy, sampling, state)
        )
        task = asyncio.ensure_future(sampled)
        wait_s = (
            None if deadline is None else max(0.0, deadline - asyncio.get_running_loop().time())
        )
        try:
            waits = {task, self._enough}
            await asyncio.wait(waits, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return (await task).stop
            self.timed_out = not self.is_enough
            return StopReason.LENGTH
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _stream(self, policy: Policy, sampling: Sampling) -> Completion:
        """Sample, and go on after the tokens that came before a stream broke off.

        Raises:
            PolicyError: the policy failed without a token.
        """
        while True:
            count = len(self._ids)
            prompt, left = self._prompt_ids + self.token_ids, self._limit - count
            if self.ended_by_eos or (count and not left):
                stop = StopReason.EOS if self.ended_by_eos else StopReason.LENGTH
                return Completion(self.token_ids, self.logprobs, stop)
            try:
                return await stream_completion(policy, prompt, left, sampling, self._on_tokens)
            except PolicyError as error:
                if len(self._ids) == count:
                    raise
                text = "%s goes on after %d tokens of its chunk: %s"
                _logger.warning(text, self._run.name, len(self._ids), error)

    async def _sample_whole(
        self, policy: Policy, sampling: Sampling, state: ThinkingState
    ) -> Completion:
        done = await policy.generate(self._prompt_ids, self._limit, sampling)
        ids, stop = state.truncate(done.token_ids, done.stop)
        self._on_tokens(ids, done.logprobs[: len(ids)])
        return Completion(ids, done.logprobs[: len(ids)], stop, done.policy_version)


def _without_ends(context: TokenIds, eos_ids: TokenIds) -> TokenIds:
    """Return a context without a token at its end that ends an answer."""
    return context[:-1] if len(context) and context[-1] in eos_ids else context
