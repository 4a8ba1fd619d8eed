"""The Responses API of OpenAI, without state: a request becomes a chat, and its events are written.

Thinking is an item ``reasoning``, and the answer a ``message``. The order of events is the one that
the client of OpenAI checks: an item is added, its part, its text, and each is done.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from delethink.serve.api_errors import ApiError
from delethink.serve.events import Phase, ThinkingEnded, ThinkingEvent, TraceEnded
from delethink.serve.plan import RequestPlan
from delethink.serve.schema import ChatBody, ResponsesBody, parse_body
from delethink.serve.sending import JobResponse, encode_json
from delethink.serve.settings import ServeSettings
from delethink.serve.thinking import ThinkingModel
from delethink.serve.wire import ResponseWriter
from delethink.tokens import Logprobs, TokenIds

_STATE = ("previous_response_id", "conversation", "prompt", "background")
_LOGPROBS = "message.output_text.logprobs"
_INCLUDED = ("reasoning.encrypted_content", _LOGPROBS)  # the first one is always empty
_TEXT_PARTS = ("input_text", "output_text", "text", "refusal")
# Fields of a chat that a request for a response names otherwise.
_NAMES = {
    "messages": "input",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "logprobs": "include",
}


# -- requests ----------------------------------------------------------------------------------


def chat_body(body: ResponsesBody) -> ChatBody:
    """Return the chat that a request for a response asks for.

    Raises:
        ApiError: a field needs stored responses, or is none of a chat.
    """
    for name in _STATE:
        if getattr(body, name):
            raise ApiError(
                400,
                f"the field {name!r} needs stored responses, and this server stores none; send the "
                "whole conversation in 'input'",
                name,
            )
    if (body.model_extra or {}).get("tools"):
        raise ApiError(
            400,
            "the field 'tools' is read in chats alone: send it to /v1/chat/completions",
            "tools",
        )
    include = body.include or []
    for name in include:
        if name not in _INCLUDED:
            raise ApiError(
                400, f"include may name {' and '.join(_INCLUDED)}, got {name!r:.80}", "include"
            )
    reasoning, text = body.reasoning, body.text
    fields = {
        **(body.model_extra or {}),
        "model": body.model,
        "messages": input_messages(body),
        "stream": body.stream,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "reasoning_effort": reasoning.effort if reasoning else None,
        "response_format": _response_format(text.format if text else None),
        "logprobs": True if _LOGPROBS in include else None,
    }
    return parse_body(ChatBody, {name: v for name, v in fields.items() if v is not None})


def renamed(error: ApiError) -> ApiError:
    """Return an error about a chat that names the field of the request for a response."""
    name = _NAMES.get(error.param or "")
    if name is None:
        return error
    text = str(error).replace(f"'{error.param}'", f"'{name}'")
    return ApiError(error.status, text, name, error.code, error.headers)


def input_messages(body: ResponsesBody) -> list[dict[str, Any]]:
    """Return the messages of instructions and input; earlier reasoning is left out.

    Raises:
        ApiError: an item is none that a chat can hold.
    """
    messages = list[dict[str, Any]]()
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for index, item in enumerate(body.input):
        message = _message(f"input.{index}", item)
        if message is None:
            continue
        last = messages[-1] if messages else {}
        if "tool_calls" in message and "tool_calls" in last:  # calls of one turn
            last["tool_calls"] += message["tool_calls"]
        else:
            messages.append(message)
    if not messages:
        raise ApiError(400, "the input has no message", "input")
    return messages


def _message(where: str, item: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = item.get("type", "message")
    if kind == "reasoning":
        return None
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if kind == "function_call_output":
        content = _text(f"{where}.output", item.get("output"))
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
    if kind != "message":
        raise ApiError(
            400,
            f"{where}.type must be message, reasoning, function_call or function_call_output, got "
            f"{kind!r:.80}",
            f"{where}.type",
        )
    if not isinstance(role := item.get("role"), str) or not role:
        raise ApiError(400, f"{where}.role must be a text, got {role!r:.80}", f"{where}.role")
    return {"role": role, "content": _text(f"{where}.content", item.get("content"))}


def _text(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(
            400, f"{where} must be a text or a list of parts, got {content!r:.80}", where
        )
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("refusal" if kind == "refusal" else "text") if kind else None
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise ApiError(
                400,
                f"{where}.{index} must be a part of the type 'input_text' or 'output_text'; this "
                "server reads text alone",
                f"{where}.{index}",
            )
        texts.append(text)
    return "".join(texts)


def _response_format(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the ``response_format`` of a chat for the ``text.format`` of a response."""
    if given is None or given.get("type") != "json_schema":
        return None if given is None else dict(given)
    schema = {name: value for name, value in given.items() if name != "type" and value is not None}
    return {"type": "json_schema", "json_schema": schema}


# -- responses ---------------------------------------------------------------------------------


class ResponsesWriter(ResponseWriter):
    """Writes the response, or its events.

    Args:
        body: the request, of which a response repeats fields.
        plan: of the chat.
        settings: of the server.
        model: of the server.
    """

    def __init__(
        self,
        body: ResponsesBody,
        plan: RequestPlan,
        settings: ServeSettings,
        model: ThinkingModel,
    ) -> None:
        super().__init__(plan, settings, model, f"resp_{uuid.uuid4().hex}")
        self._body, self._sampling = body, plan.traces[0].sampling
        self._began = time.time()
        self._items = {phase: _Item(phase) for phase in Phase}
        self._number = 0  # of the next event

    def pieces(self, index: int, event: ThinkingEvent) -> list[dict[str, Any]]:
        """Read an event and return the events of the stream that it makes."""
        pieces = self.begin()
        for phase, text, ids, logprobs in self.read(index, event):
            if phase is Phase.ANSWER:
                pieces += self._close(Phase.THINKING)
            pieces += self._add(phase, text, ids, logprobs)
        if isinstance(event, ThinkingEnded):
            pieces += self._close(Phase.THINKING)
        if isinstance(event, TraceEnded):
            pieces += self._close(Phase.THINKING)
            pieces += self._open(Phase.ANSWER)
            pieces += self._close(Phase.ANSWER)
            whole = self.whole()
            pieces.append(self._event(f"response.{whole['status']}", response=whole))
        return pieces

    def begin(self) -> list[dict[str, Any]]:
        """Return the events before the first item, once."""
        if self._number:
            return []
        response = self._response("in_progress", [], None)
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def failed(self, error: ApiError) -> list[dict[str, Any]]:
        """Return the events of a stream that ends with an error."""
        pieces, told = self.begin(), error.body()["error"]
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        named = {"code": code, "message": told["message"]}
        pieces.append(self._event("error", param=error.param, **named))
        items = [item.value("incomplete") for item in self._items.values() if item.is_open]
        response = {**self._response("failed", items, self._tokens()), "error": named}
        return [*pieces, self._event("response.failed", response=response)]

    def whole(self) -> dict[str, Any]:
        """Return the response after the last event."""
        choice, items = self._choices[0], self._items
        ended = choice.ended
        assert ended is not None
        if not self._plan.is_stream:
            for phase, item in items.items():
                item.texts = choice.texts[phase]
            if self._plan.wants_logprobs:
                count = choice.counts[Phase.ANSWER]
                at = len(choice.token_ids) - count
                answer = tuple(choice.token_ids[at:]), tuple(choice.logprobs[at:])
                items[Phase.ANSWER].logprobs = self._entries(*answer)
        status = "incomplete" if ended.is_cut else "completed"
        output = [items[Phase.ANSWER].value(status)]
        if self._plan.wants_reasoning and items[Phase.THINKING].texts:
            output.insert(0, items[Phase.THINKING].value("completed"))
        block = super().whole()["delethink"]
        return {**self._response(status, output, self._tokens()), "delethink": block}

    def _tokens(self) -> dict[str, Any]:
        usage = self.usage()
        details = usage["completion_tokens_details"]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": details["reasoning_tokens"]},
            "total_tokens": usage["total_tokens"],
        }

    def _response(
        self, status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None
    ) -> dict[str, Any]:
        body, is_cut = self._body, status == "incomplete"
        reasoning = body.reasoning
        return {
            "id": self.request_id,
            "object": "response",
            "created_at": int(self._began),
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._settings.model_name,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
            "store": False,
            "temperature": self._sampling.temperature,
            "text": {"format": (body.text and body.text.format) or {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": self._sampling.top_p,
            "truncation": "disabled",
            "usage": usage,
        }

    # -- events --------------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _add(
        self, phase: Phase, text: str, ids: TokenIds, logprobs: Logprobs
    ) -> Iterator[dict[str, Any]]:
        item, more = self._items[phase], dict[str, Any]()
        if phase is Phase.ANSWER:
            entries = self._entries(ids, logprobs) if self._plan.wants_logprobs else []
            item.logprobs += entries
            more["logprobs"] = entries
        if not text and not more.get("logprobs"):
            return
        if phase is Phase.THINKING and not self._plan.wants_reasoning:
            return
        yield from self._open(phase)
        item.texts.append(text)
        yield self._event(f"response.{item.part}.delta", delta=text, **item.place(), **more)

    def _open(self, phase: Phase) -> Iterator[dict[str, Any]]:
        item = self._items[phase]
        if item.index is not None:
            return
        item.index = sum(other.index is not None for other in self._items.values())
        added = {**item.value("in_progress"), "content": []}
        yield self._event("response.output_item.added", output_index=item.index, item=added)
        yield self._event("response.content_part.added", part=item.content(""), **item.place())

    def _close(self, phase: Phase) -> Iterator[dict[str, Any]]:
        item = self._items[phase]
        if not item.is_open:
            return
        item.is_done = True
        ended = self._choices[0].ended
        is_cut = phase is Phase.ANSWER and ended is not None and ended.is_cut
        place, more = item.place(), dict[str, Any]()
        if phase is Phase.ANSWER:
            more["logprobs"] = item.logprobs
        text = "".join(item.texts)
        yield self._event(f"response.{item.part}.done", text=text, **place, **more)
        yield self._event("response.content_part.done", part=item.content(text), **place)
        done = item.value("incomplete" if is_cut else "completed")
        yield self._event("response.output_item.done", output_index=item.index, item=done)

    def _entries(self, ids: TokenIds, logprobs: Logprobs) -> list[dict[str, Any]]:
        return list(self._logprobs(ids, logprobs)["content"])


class _Item:
    """Item of a response: the thinking, or the answer."""

    def __init__(self, phase: Phase) -> None:
        self._is_answer = phase is Phase.ANSWER
        self.part = "output_text" if self._is_answer else "reasoning_text"
        self._id = f"{'msg' if self._is_answer else 'rs'}_{uuid.uuid4().hex}"
        self.texts, self.logprobs = list[str](), list[dict[str, Any]]()
        self.index: int | None = None  # in the output, once it was added
        self.is_done = False

    @property
    def is_open(self) -> bool:
        """Return whether the item was added and is not done."""
        return self.index is not None and not self.is_done

    def place(self) -> dict[str, Any]:
        """Return the place of the one part."""
        return {"item_id": self._id, "output_index": self.index, "content_index": 0}

    def content(self, text: str) -> dict[str, Any]:
        """Return the one part with a text."""
        more = {"annotations": [], "logprobs": self.logprobs} if self._is_answer else {}
        return {"type": self.part, "text": text, **more}

    def value(self, status: str) -> dict[str, Any]:
        """Return the item with its text so far."""
        content = [self.content("".join(self.texts))]
        own = {"type": "message", "role": "assistant"} if self._is_answer else {"type": "reasoning"}
        more: dict[str, Any] = {} if self._is_answer else {"summary": [], "encrypted_content": None}
        return {"id": self._id, **own, "status": status, "content": content, **more}


class ResponsesResponse(JobResponse):
    """ASGI response in the form of the Responses API."""

    _writer: ResponsesWriter

    def _frame(self, piece: Mapping[str, Any]) -> bytes:
        return b"event: " + str(piece["type"]).encode() + b"\ndata: " + encode_json(piece) + b"\n\n"

    def _ending(self) -> bytes:
        failure = self._failure()
        pieces = [] if failure is None else self._writer.failed(failure)
        return b"".join(map(self._frame, pieces))
