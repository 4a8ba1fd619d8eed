"""Bodies of requests: fields, types and ranges, with one sentence for each mistake."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from delethink.errors import did_you_mean
from delethink.serve.api_errors import ApiError
from delethink.serve.settings import EFFORT_SHARES

_MAX_STOPS = 32
_MAX_SHOWN = 80

# Fields that change no token of this server; clients send them to every server.
_WITHOUT_EFFECT = frozenset(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "parallel_tool_calls",
        "priority",
        "request_id",
    )
)
# Values that ask for nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "add_special_tokens": (True, False),
    "stop_token_ids": ([],),
    "length_penalty": (1,),
    "top_logprobs": (0,),
}
# Fields that no upstream can serve, as the traces are sampled as token ids.
_NEVER = frozenset(
    ("tools", "functions", "echo", "suffix", "best_of", "use_beam_search", "top_logprobs")
)


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class StreamOptions(_Body):
    """Options of a streamed response."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class RepetitionDetection(_Body):
    """Definition of a loop, with vLLM's names."""

    max_pattern_size: int
    min_pattern_size: int = 1
    min_count: int = 8


class TraceOptions(_Body):
    """The field ``delethink``: sizes and policy of this request's chunks."""

    model_config = ConfigDict(extra="forbid", strict=True)

    context_size: int | None = Field(None, ge=1)
    carryover_size: int | None = Field(None, ge=0)
    max_chunks: int | None = Field(None, ge=1)
    carryover: str | dict[str, Any] | None = None
    answer_tokens: int | None = Field(None, ge=1)
    stop_in_thinking: bool | None = None
    on_loop: Literal["end", "nudge"] | None = None


Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class GenerationBody(_Body):
    """Fields that chat and plain completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=_MAX_STOPS)] | None = None
    thinking_token_budget: int | None = Field(None, ge=0)
    reasoning_effort: Effort | None = None
    response_format: dict[str, Any] | None = None
    repetition_detection: RepetitionDetection | None = None
    return_token_ids: bool | None = None
    delethink: TraceOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def total_tokens(self) -> int | None:
        """Return the limit of sampled tokens, thinking and answer together."""
        return self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        """Return whether log-probs of the sampled tokens are asked for."""
        return False


class ChatBody(GenerationBody):
    """Body of ``/v1/chat/completions``."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def total_tokens(self) -> int | None:
        """See ``GenerationBody``."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wants_logprobs(self) -> bool:
        """See ``GenerationBody``."""
        return bool(self.logprobs)


class CompletionBody(GenerationBody):
    """Body of ``/v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=1)

    @property
    def wants_logprobs(self) -> bool:
        """See ``GenerationBody``."""
        return self.logprobs is not None


class ReasoningOptions(_Body):
    """The field ``reasoning`` of a request for a response; a summary is never written."""

    effort: Effort | None = None


class TextOptions(_Body):
    """The field ``text`` of a request for a response."""

    format: dict[str, Any] | None = None


class ResponsesBody(_Body):
    """Body of ``/v1/responses``; its other fields are those of a chat."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    # Responses are not stored, whatever is asked for, and nothing is dropped from the input.
    store: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    max_tool_calls: int | None = None
    stream_options: dict[str, Any] | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    background: bool | None = None


class TokenizeBody(_Body):
    """Body of ``/tokenize``: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(_Body):
    """Body of ``/detokenize``."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


AnyBody = TypeVar("AnyBody", bound=_Body)


def parse_body(kind: type[AnyBody], value: Any) -> AnyBody:
    """Return the body of a request.

    Raises:
        ApiError: a field is missing or has another type or range; the sentence names it.
    """
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, got {_shown(value)}")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"] if _is_of_the_body(part))
    param = path or None
    if first["type"] == "missing":
        raise ApiError(400, f"the field {path!r} is missing", param) from None
    sentence = first["msg"][:1].lower() + first["msg"][1:]
    message = f"{path}: {sentence}, got {_shown(first['input'])}"
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        message = f"unknown field {path!r}.{did_you_mean(name, TraceOptions.model_fields)}"
    if path == "reasoning_effort":
        message += f".{did_you_mean(str(first['input']), EFFORT_SHARES)}"
    raise ApiError(400, message, param) from None


def _is_of_the_body(part: int | str) -> bool:
    """Return whether a part of a location is a name or index, not a branch of a union."""
    return isinstance(part, int) or (part.replace("_", "").isalnum() and part not in ("str", "int"))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def unknown_fields(body: GenerationBody) -> dict[str, Any]:
    """Return the fields that this server does not serve itself, without those that ask for nothing.

    Raises:
        ApiError: a field that no server behind this one can serve either.
    """
    extra = {
        name: value
        for name, value in (body.model_extra or {}).items()
        if value is not None
        and name not in _WITHOUT_EFFECT
        and not any(value == neutral for neutral in _NEUTRAL.get(name, ()))
    }
    for name in sorted(extra.keys() & _NEVER):
        raise ApiError(400, f"the field {name!r} is not supported; leave it out", name)
    return extra


def refuse_unknown(body: GenerationBody, extra: Mapping[str, Any]) -> None:
    """Refuse fields without an effect on engines of this server.

    Raises:
        ApiError: there is one; the sentence names it, and the nearest known field.
    """
    for name in extra:
        known = [field for field in type(body).model_fields if field != name]
        hint = did_you_mean(name, known)
        hint = hint if "mean" in hint else ""
        raise ApiError(400, f"the field {name!r} is not supported by this server.{hint}", name)
