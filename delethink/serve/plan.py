"""Plans of requests: what to sample for each choice, within the limits of the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from delethink.carryover import Carryover
from delethink.chat_templates import (
    check_template_kwargs,
    has_variable,
    template_source,
)
from delethink.chunking import ChunkSpec
from delethink.errors import ConfigError, ModelError, UserError, did_you_mean
from delethink.policy import Sampling
from delethink.registry import make, names, parse_named
from delethink.rollout import derive_seed
from delethink.serve.api_errors import ApiError, as_api_error
from delethink.serve.loops import LoopRule
from delethink.serve.reader import ReadingRule
from delethink.serve.schema import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    TraceOptions,
    refuse_unknown,
    unknown_fields,
)
from delethink.serve.settings import ServeSettings
from delethink.serve.thinking import ThinkingLimits, ThinkingModel
from delethink.serve.tools import NEEDED_OPTIONS, ToolChat
from delethink.tokenization import encode, message_ids
from delethink.tokens import TokenIds

_CARRYOVERS = "delethink.carryovers"
_THINKING_SWITCHES = ("enable_thinking", "thinking")  # variables of templates
_EFFORT_VARIABLE = "reasoning_effort"
_KEPT_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")
_TAIL_TOKENS = 32  # of a query, which may end with the mark of the end of thinking


@dataclass(frozen=True)
class TracePlan:
    """One trace of a request."""

    query_ids: TokenIds
    spec: ChunkSpec
    sampling: Sampling
    limits: ThinkingLimits
    rule: ReadingRule


@dataclass(frozen=True)
class RequestPlan:
    """Everything to sample for a request, and the form of the response."""

    traces: tuple[TracePlan, ...]  # one for each choice
    is_chat: bool
    is_stream: bool
    include_usage: bool
    continuous_usage: bool
    wants_logprobs: bool
    wants_reasoning: bool
    wants_token_ids: bool
    extra: Mapping[str, Any] = field(default_factory=dict)  # fields for the upstream server
    answer_extra: Mapping[str, Any] = field(default_factory=dict)  # of the answer alone
    tools: ToolChat | None = None  # calls of tools are read in the answer

    @property
    def prompt_tokens(self) -> int:
        """Return the tokens of the distinct prompts."""
        return sum(map(len, dict.fromkeys(trace.query_ids for trace in self.traces)))


class Planner:
    """Turns bodies into plans.

    Args:
        settings: limits and defaults.
        model: the model of the traces.
        has_upstream: fields unknown here are passed on to a server behind this one.
    """

    def __init__(self, settings: ServeSettings, model: ThinkingModel, has_upstream: bool) -> None:
        self.settings, self.model, self.has_upstream = settings, model, has_upstream
        self.default_limits = ThinkingLimits(settings.answer_tokens)

    def check_model(self, name: str | None) -> None:
        """Refuse an unknown model.

        Raises:
            ApiError: 404, with the name of the model that is served.
        """
        served = self.settings.model_name
        if name not in (None, "", served):
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {served!r}",
                "model",
                "model_not_found",
            )

    def chat(self, body: ChatBody, tools: ToolChat | None = None) -> RequestPlan:
        """Return the plan of a chat completion, which the server behind renders if it has tools.

        Raises:
            ApiError: a field is out of the limits, or the query is too long.
        """
        if body.tools and tools is None:
            raise ApiError(400, self._no_tools(), "tools")
        if tools is not None:
            query = tools.query_ids
        else:
            query = self.chat_query(body.messages, self._template_kwargs(body))
        plan = self._plan(body, [query], body.include_reasoning is not False)
        return replace(plan, tools=tools)

    def _no_tools(self) -> str:
        if not self.has_upstream:
            return (
                "the field 'tools' is not supported with engines of this server: put it in front "
                f"of a vLLM server (--base-url) that has {NEEDED_OPTIONS}, or leave it out"
            )
        return (
            "the field 'tools' is not supported by the server behind this one: start vLLM with "
            f"{NEEDED_OPTIONS}, or send chat_template_kwargs={{'enable_thinking': false}}, which "
            "passes the request through without thinking in chunks"
        )

    def completion(self, body: CompletionBody) -> RequestPlan:
        """Return the plan of a completion.

        Raises:
            ApiError: a field is out of the limits, or the prompt is too long.
        """
        prompts: list[Any] = [body.prompt] if isinstance(body.prompt, str) else list(body.prompt)
        if prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        if not prompts:
            raise ApiError(400, "the prompt is empty", "prompt")
        return self._plan(body, [self.raw_query(prompt) for prompt in prompts], True)

    def raw_query(self, prompt: str | Sequence[int]) -> TokenIds:
        """Return the token ids of a raw prompt.

        Raises:
            ApiError: the prompt is empty, or an id is none of the vocabulary.
        """
        if isinstance(prompt, str):
            prompt = tuple(self.model.tokenizer(prompt)["input_ids"])
        size = len(self.model.tokenizer)  # type: ignore[arg-type]  # of transformers
        if wrong := [token for token in prompt if not 0 <= token < size]:
            raise ApiError(
                400, f"token ids must be at least 0 and below {size}, got {wrong[0]}", "prompt"
            )
        if not prompt:
            raise ApiError(400, "the prompt is empty", "prompt")
        return tuple(prompt)

    def chat_query(
        self, messages: Sequence[Mapping[str, Any]], kwargs: Mapping[str, Any] | None
    ) -> TokenIds:
        """Return the token ids of messages.

        Raises:
            ApiError: a message is none, or the chat template refuses them.
        """
        plain = [_plain_message(i, message) for i, message in enumerate(messages)]
        try:
            return message_ids(self.model.tokenizer, plain, kwargs or None)
        except ModelError as error:
            raise ApiError(400, str(error), "messages") from None

    def _template_kwargs(self, body: ChatBody) -> dict[str, Any]:
        """Return the variables of the chat template that a request sets."""
        kwargs = dict(body.chat_template_kwargs or {})
        source = template_source(self.model.tokenizer) or ""
        for name in _THINKING_SWITCHES:
            if kwargs.get(name) is True and not has_variable(source, name):
                del kwargs[name]  # it thinks anyhow
        effort = body.reasoning_effort
        if effort == "none" and has_variable(source, _THINKING_SWITCHES[0]):
            kwargs.setdefault(_THINKING_SWITCHES[0], False)
        elif effort in ("low", "medium", "high") and has_variable(source, _EFFORT_VARIABLE):
            kwargs.setdefault(_EFFORT_VARIABLE, effort)
        try:
            check_template_kwargs(self.model.tokenizer, kwargs)
        except ConfigError as error:
            raise ApiError(400, str(error), "chat_template_kwargs") from None
        bound = getattr(self.model.tokenizer, "chat_template_kwargs", None) or {}
        return {**bound, **kwargs}

    def _plan(
        self, body: GenerationBody, queries: Sequence[TokenIds], wants_reasoning: bool
    ) -> RequestPlan:
        self.check_model(body.model)
        extra, answer_extra = self._extra(body)
        try:
            spec = self._spec(body.delethink or TraceOptions())
            limits = self._limits(body)
            rule = self._rule(body)
            choices = self._choices(body, len(queries))
            plans = []
            for query in queries:
                own = replace(limits, is_answer_only=self._closes_thinking(query))
                self.model.check_query(query, spec, own)
                plans += [
                    TracePlan(query, spec, self._sampling(body, index), own, rule)
                    for index in range(choices)
                ]
        except UserError as error:
            raise as_api_error(error) from None
        options = body.stream_options
        return RequestPlan(
            tuple(plans),
            is_chat=isinstance(body, ChatBody),
            is_stream=bool(body.stream),
            include_usage=bool(options and options.include_usage),
            continuous_usage=bool(options and options.continuous_usage_stats),
            wants_logprobs=body.wants_logprobs,
            wants_reasoning=wants_reasoning,
            wants_token_ids=bool(body.return_token_ids),
            extra=extra,
            answer_extra=answer_extra,
        )

    def _extra(self, body: GenerationBody) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the fields for the upstream server: of all requests, and of the answer's."""
        extra, answer = unknown_fields(body), dict[str, Any]()
        if body.response_format and body.response_format.get("type") != "text":
            answer["response_format"] = body.response_format
        if not self.has_upstream:
            refuse_unknown(body, {**extra, **answer})
        elif body.wants_logprobs:
            extra["logprobs"] = 1
        return extra, answer

    def _choices(self, body: GenerationBody, prompts: int) -> int:
        choices, most = body.n or 1, self.settings.max_choices
        if choices * prompts > most:
            raise ApiError(
                400, f"a request may ask for at most {most} traces, got {choices * prompts}", "n"
            )
        return choices

    def _spec(self, options: TraceOptions) -> ChunkSpec:
        """Return the sizes and the policy of the chunks of a request."""
        own = self.settings.spec
        for name in ("context_size", "max_chunks", "answer_tokens"):
            value = getattr(options, name)
            source = self.settings if name == "answer_tokens" else own
            most = getattr(source, name)
            if value is not None and value > most:
                raise ApiError(
                    400,
                    f"delethink.{name} may be at most {most} on this server, got {value}",
                    f"delethink.{name}",
                )
        context = options.context_size or own.context_size
        carried = options.carryover_size
        if carried is None:
            carried = own.carryover_size if context == own.context_size else context // 2
        chunks = options.max_chunks or own.max_chunks
        if options.carryover is None and (context, carried) == (
            own.context_size,
            own.carryover_size,
        ):
            return replace(own, max_chunks=chunks)
        policy = own.carryover if options.carryover is None else _carryover(options.carryover)
        spec = ChunkSpec(context, carried, chunks, carryover=policy).bind(self.model.tokenizer)
        if spec.max_thinking_context > own.max_thinking_context:
            raise ApiError(
                400,
                f"these chunks need contexts of {spec.max_thinking_context} thinking tokens, and "
                f"this server allows {own.max_thinking_context}; lower delethink.context_size",
                "delethink",
            )
        return spec

    def _limits(self, body: GenerationBody) -> ThinkingLimits:
        settings, options = self.settings, body.delethink or TraceOptions()
        budgets = [settings.spec.thinking_budget]
        if body.thinking_token_budget is not None:
            budgets.append(body.thinking_token_budget)
        if body.reasoning_effort is not None:
            budgets.append(settings.thinking_tokens(body.reasoning_effort))
        return ThinkingLimits(
            options.answer_tokens or settings.answer_tokens,
            min(budgets),
            body.total_tokens,
            settings.thinking_time_s,
        )

    def _rule(self, body: GenerationBody) -> ReadingRule:
        options, loop = body.delethink or TraceOptions(), self.settings.loop
        if (asked := body.repetition_detection) is not None:
            loop = LoopRule(asked.max_pattern_size, asked.min_pattern_size, asked.min_count)
        nudge = None
        if (options.on_loop or self.settings.on_loop) == "nudge":
            loop = loop or LoopRule()
            nudge = encode(self.model.tokenizer, self.settings.nudge)
        elif options.on_loop == "end":
            loop = loop or LoopRule()
        everywhere = options.stop_in_thinking
        if everywhere is None:  # the text of a plain completion is one
            everywhere = not isinstance(body, ChatBody)
        return replace(
            self.model.rule,
            stops=body.stops,
            stops_in_thinking=everywhere,
            loop=loop,
            nudge_ids=nudge,
        )

    def _sampling(self, body: GenerationBody, index: int) -> Sampling:
        """Return the sampling parameters of a choice; choices of one seed differ."""
        own, seed = self.settings.sampling, body.seed
        if seed is not None and index:
            seed = derive_seed("choice", seed, index)
        top_k = own.top_k if body.top_k is None else max(0, body.top_k)
        return Sampling(
            own.temperature if body.temperature is None else body.temperature,
            seed,
            top_p=own.top_p if body.top_p is None else body.top_p,
            top_k=top_k,
            min_p=own.min_p if body.min_p is None else body.min_p,
        )

    def _closes_thinking(self, query: TokenIds) -> bool:
        """Return whether a query ends with the end of thinking, so that the answer comes next."""
        end = self.model.marks.end or ""
        tail = self.model.tokenizer.decode(list(query[-_TAIL_TOKENS:]))
        return str(tail).rstrip().endswith(end)


def _plain_message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with text as its content."""
    where, role = f"messages.{index}", message.get("role")
    if not isinstance(role, str) or not role:
        raise ApiError(400, f"{where}.role must be a text, got {role!r:.80}", f"{where}.role")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(
            _part_text(f"{where}.content.{i}", part) for i, part in enumerate(content)
        )
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        raise ApiError(
            400, f"{where}.content must be a text or a list of parts, got {content!r:.80}", where
        )
    kept = {key: message[key] for key in _KEPT_KEYS if message.get(key) is not None}
    return {**kept, "role": "system" if role == "developer" else role, "content": content}


def _part_text(where: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind not in ("text", "input_text") or not isinstance(text, str):
        raise ApiError(
            400, f"{where} must be a part of the type 'text'; this server reads text alone", where
        )
    return text


def _carryover(value: str | Mapping[str, Any]) -> Carryover:
    """Return the carryover policy that a request names.

    Raises:
        ApiError: it names no registered one: a request must not make the server import modules.
    """
    name, _ = parse_named(_CARRYOVERS, value)
    known = names(_CARRYOVERS)
    if name not in known:
        raise ApiError(
            400, f"unknown carryover {name!r}.{did_you_mean(name, known)}", "delethink.carryover"
        )
    made: Carryover = make(_CARRYOVERS, value)
    return made
