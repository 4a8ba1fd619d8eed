"""The server without HTTP: plans, jobs and their traces, over one model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

from delethink.errors import DelethinkError
from delethink.output import get_logger
from delethink.policy import Policy
from delethink.serve.api_errors import as_api_error
from delethink.serve.events import Phase, SampledText, ToolsCalled, TraceEnded
from delethink.serve.jobs import Admission, ChoiceEvent, ClientIdentity, Job, JobBoard, Place
from delethink.serve.metrics import ServerMetrics
from delethink.serve.plan import Planner, RequestPlan, TracePlan
from delethink.serve.settings import ServeSettings
from delethink.serve.thinking import ThinkingModel, think
from delethink.serve.tools import ToolChat, ToolReader
from delethink.serve.upstream import UpstreamServer

_logger = get_logger(__name__)


class ThinkingService:
    """Samples the traces of requests.

    Args:
        settings: limits and defaults.
        model: the model of all traces.
        upstream: the server that samples, which then also takes fields of clients.
        log: called with one line for each finished request, without its texts.
        stream_policy: samples streamed requests, where the model's own policy gives whole chunks.
        engine_is_healthy: tells of an engine of this server.
        tool_reader: reads calls of tools in answers, where the upstream can.
    """

    def __init__(
        self,
        settings: ServeSettings,
        model: ThinkingModel,
        upstream: UpstreamServer | None = None,
        log: Callable[[str], None] = lambda line: None,
        stream_policy: Policy | None = None,
        engine_is_healthy: Callable[[], bool] = lambda: True,
        tool_reader: ToolReader | None = None,
    ) -> None:
        self.log, self._stream_policy = log, stream_policy
        self._engine_is_healthy, self.tool_reader = engine_is_healthy, tool_reader
        self.settings, self.model, self.upstream = settings, model, upstream
        self.planner = Planner(settings, model, upstream is not None)
        self.admission = Admission(settings.max_traces, settings.max_queue)
        self.board = JobBoard(settings.reattach_s, settings.keep_result_s)
        self.metrics = ServerMetrics(settings.model_name, self.admission, self.board)

    def start(self, plan: RequestPlan, identity: ClientIdentity, name: str = "a request") -> Job:
        """Start the job of a plan, named in the log, or return the one that a retry asks for.

        Raises:
            ApiError: the queue is full, or an ``Idempotency-Key`` was used otherwise.
        """
        return self.board.find_or_start(identity, partial(self._begin, plan, name))

    def _begin(self, plan: RequestPlan, name: str, job: Job) -> Coroutine[Any, Any, None]:
        places = self.admission.reserve(len(plan.traces))
        job.on_end += [place.free for place in places]
        return self._run(plan, name, job, places)

    async def _run(self, plan: RequestPlan, name: str, job: Job, places: list[Place]) -> None:
        """Sample all traces of a request; the first error ends the others."""
        where = "" if self.upstream is None else f" at {self.upstream.base_url}"
        numbered = enumerate(zip(plan.traces, places, strict=True))
        tasks = [
            asyncio.ensure_future(
                self._trace(plan, index, trace, place, job, f"{name}.{index}{where}")
            )
            for index, (trace, place) in numbered
        ]
        try:
            await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            self.metrics.count_cancelled()
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _trace(
        self, plan: RequestPlan, index: int, trace: TracePlan, place: Place, job: Job, name: str
    ) -> None:
        try:
            await self._sample(plan, index, trace, place, job, name)
        except Exception as error:
            if as_api_error(error).status >= 500:
                is_bug = not isinstance(error, (DelethinkError, TimeoutError))
                has_lines = is_bug or _logger.isEnabledFor(logging.DEBUG)
                _logger.warning("%s failed: %s", name, error, exc_info=has_lines)
            raise

    async def _sample(
        self, plan: RequestPlan, index: int, trace: TracePlan, place: Place, job: Job, name: str
    ) -> None:
        policies = self._policies(plan)
        async with self.admission.turn(place):
            now = asyncio.get_running_loop().time
            started = last = now()
            has_begun, answer_ids = False, list[int]()
            events = think(
                self.model if policies[0] is None else self._asking(policies[0]),
                trace.spec,
                trace.query_ids,
                sampling=trace.sampling,
                limits=trace.limits,
                rule=trace.rule,
                answer_policy=policies[1],
                name=name,
            )
            limit_s = trace.limits.thinking_time_s
            whole_s = None if limit_s is None else limit_s + self.settings.answer_time_s
            async with asyncio.timeout(whole_s), aclosing(events):
                async for event in events:
                    if isinstance(event, SampledText) and event.token_ids:
                        histogram = self.metrics.gap_s if has_begun else self.metrics.first_token_s
                        histogram.observe(now() - last)
                        last, has_begun = now(), True
                    if isinstance(event, SampledText) and event.phase is Phase.ANSWER:
                        answer_ids += event.token_ids
                    if isinstance(event, TraceEnded) and plan.tools is not None:
                        job.publish(index, await self._read_tools(plan.tools, answer_ids))
                    self.metrics.count(ChoiceEvent(index, event))
                    job.publish(index, event)
            self.metrics.whole_s.observe(now() - started)

    async def _read_tools(self, chat: ToolChat, answer_ids: list[int]) -> ToolsCalled:
        if not answer_ids or self.tool_reader is None:
            return ToolsCalled("", ())
        return await self.tool_reader.read(chat, tuple(answer_ids))

    def _policies(self, plan: RequestPlan) -> tuple[Policy | None, Policy | None]:
        """Return the policies of thinking and answer, where a request has its own fields."""
        if self.upstream is None or not (plan.extra or plan.answer_extra):
            return self._stream_policy if plan.is_stream else None, None
        thinker = self.upstream.with_fields(plan.extra)
        answerer = thinker.with_fields(plan.answer_extra) if plan.answer_extra else None
        return thinker, answerer

    def _asking(self, policy: Policy) -> ThinkingModel:
        own = self.model
        return ThinkingModel(policy, own.tokenizer, own.max_model_tokens, own.marks, own.eos_ids)

    def model_card(self) -> Mapping[str, Any]:
        """Return the entry of ``/v1/models``: the virtual window, and the real sizes beside it."""
        settings, spec = self.settings, self.settings.spec
        return {
            "id": settings.model_name,
            "object": "model",
            "created": 0,
            "owned_by": "delethink",
            "root": settings.model_name,
            "parent": None,
            "max_model_len": settings.virtual_window(self.model),
            "delethink": {
                "real_window": self.model.max_model_tokens,
                "context_size": spec.context_size,
                "carryover_size": spec.carryover_size,
                "max_chunks": spec.max_chunks,
                "carryover": type(spec.effective_carryover).name,
                "thinking_budget": spec.thinking_budget,
                "answer_tokens": settings.answer_tokens,
                "longest_context": self.model.context_tokens(spec, self.planner.default_limits),
                "end_of_thinking": self.model.marks.end,
            },
        }

    async def is_healthy(self) -> bool:
        """Return whether the engine, or the server behind this one, can sample."""
        if self.upstream is None:
            return self._engine_is_healthy()
        return await self.upstream.is_healthy()

    async def close(self) -> None:
        """Cancel all traces, and close the connections."""
        await self.board.close()
        if self.upstream is not None:
            await self.upstream.disconnect()
