"""Calls of tools, by the vLLM server behind this one: it renders the tools, and reads the answer.

The chat is rendered by that server's template into token ids, thinks in chunks like any other, and
the ids of its answer go to that server's parser of calls. So no text is tokenized twice, and each
model's own form of calls is known to its server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from delethink.serve.api_errors import ApiError
from delethink.serve.events import ToolsCalled
from delethink.tokens import TokenIds

if TYPE_CHECKING:
    from delethink.serve.thinking import ThinkingModel

# Options of vLLM without which it neither renders chats into token ids nor reads calls in ids.
NEEDED_OPTIONS = "--enable-scale-out, --enable-auto-tool-choice and --tool-call-parser"
_RENDER, _READ = "/chat/completions/render", "/chat/completions/derender"
_FIELDS = ("messages", "tools", "tool_choice", "chat_template_kwargs", "reasoning_effort")
_CHOICES = (None, "auto", "none")
_PROBE = {
    "messages": [{"role": "user", "content": "Hello"}],
    "tools": [{"type": "function", "function": {"name": "probe", "parameters": {}}}],
    "tool_choice": "auto",
}


class _Server(Protocol):
    model: str

    async def post(self, path: str, body: Mapping[str, Any]) -> Any: ...


@dataclass(frozen=True)
class ToolChat:
    """A chat with tools: its fields for the server, and its token ids there."""

    fields: Mapping[str, Any]
    query_ids: TokenIds


class ToolReader:
    """Renders chats with tools, and reads calls in answers.

    Args:
        server: a vLLM server.
        model: has the mark of the end of thinking, and the tokens that end an answer.
    """

    def __init__(self, server: _Server, model: ThinkingModel) -> None:
        self._server, self._model = server, model
        self._mark = (model.marks.end or "").strip()
        self._needs_mark = True

    async def is_supported(self) -> bool:
        """Return whether the server renders tools and has a parser of calls."""
        try:
            chat = await self.render(_PROBE)
            told = await self._read(chat, [*self._model.mark_ids, *chat.query_ids[-1:]])
        except ApiError:
            return False
        # A parser of reasoning takes what comes before the mark for reasoning. Without one, most
        # parsers of calls find none behind a mark.
        self._needs_mark = not told.content.lstrip().startswith(self._mark)
        return True

    async def render(self, body: Mapping[str, Any]) -> ToolChat:
        """Return a chat with tools, ready to be sampled.

        Raises:
            ApiError: calls would have to be forced, or the server refuses the chat.
        """
        if (choice := body.get("tool_choice")) not in _CHOICES:
            raise ApiError(
                400,
                "tool_choice may be 'auto' or 'none', as no call is forced here, got "
                f"{choice!r:.80}",
                "tool_choice",
            )
        fields = {name: body[name] for name in _FIELDS if body.get(name) is not None}
        fields = {"tool_choice": "auto", **fields, "model": self._server.model}
        answer = await self._server.post(_RENDER, fields)
        ids = answer.get("token_ids") if isinstance(answer, dict) else None
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise ApiError(502, "the server behind this one rendered a chat to no token ids")
        return ToolChat(fields, tuple(ids))

    async def read(self, chat: ToolChat, answer_ids: TokenIds) -> ToolsCalled:
        """Return the calls in an answer.

        Raises:
            ApiError: the server does not read them.
        """
        ids = list(answer_ids)
        while ids and ids[-1] in self._model.eos_ids:
            ids.pop()
        while ids and not str(self._model.tokenizer.decode(ids[:1])).strip():
            ids.pop(0)
        if not ids:
            return ToolsCalled("", ())
        return await self._read(chat, [*self._model.mark_ids, *ids] if self._needs_mark else ids)

    async def _read(self, chat: ToolChat, ids: list[int]) -> ToolsCalled:
        choice = {"index": 0, "token_ids": ids, "finish_reason": "stop"}
        response = {"request_id": "answer", "choices": [choice]}
        body = {"model": self._server.model, "generate_response": response}
        answer = await self._server.post(_READ, {**body, "chat_request": chat.fields})
        try:
            message = answer["choices"][0]["message"]
            calls = tuple(_call(call) for call in message.get("tool_calls") or ())
            return ToolsCalled(str(message.get("content") or "").strip("\r\n"), calls)
        except (KeyError, IndexError, TypeError):
            raise ApiError(502, "the server behind this one read an answer to no message") from None


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    named = {"name": function["name"], "arguments": function["arguments"]}
    return {"id": call["id"], "type": "function", "function": named}
