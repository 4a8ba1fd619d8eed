"""Calls of tools in front of a server that renders tools and reads calls.

The server is a fake one, whose answers can be told; ``test_serve_vllm`` has vLLM's own routes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("transformers")

import openai
from fake_upstream import FakeUpstream
from made_up_reasoner import EOS, MARK, TOKENIZER, MadeUpReasoner
from served import listening_app, service_of, serving
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from delethink import ChunkSpec, Sampling
from delethink.serve.service import ThinkingService
from delethink.serve.settings import ServeSettings
from delethink.serve.start import _negotiate
from delethink.serve.thinking import ThinkingModel
from delethink.serve.upstream import UpstreamServer
from delethink.tokenization import message_ids

pytestmark = pytest.mark.integration

TOOLS: list[Any] = [{"type": "function", "function": {"name": "take", "parameters": {}}}]
MESSAGES: list[Any] = [{"role": "user", "content": "Take it."}]


class Scripted:
    """Completes every prompt with the thinking, and goes on with the answer after the mark."""

    def __init__(self, answer: str) -> None:
        self._ids = (*TOKENIZER(f"ab{MARK}{answer}")["input_ids"], EOS)

    def complete(self, prompt_ids: tuple[int, ...], limit: int) -> tuple[int, ...]:
        return self._ids[:limit]


class ToolUpstream(FakeUpstream):
    """Knows vLLM's routes for tools; the text of a call is ``CALL name arguments``."""

    reads_reasoning = False
    marked = 0  # answers with the mark, of which such a parser finds no calls

    def app(self) -> Any:
        app = super().app()
        app.add_route("/v1/chat/completions/render", self.render, methods=["POST"])
        app.add_route("/v1/chat/completions/derender", self.derender, methods=["POST"])
        return app

    async def render(self, request: Request) -> Response:
        body = await request.json()
        if body.get("tool_choice") != "auto" or body["messages"][0]["content"] == "refuse":
            return JSONResponse({"error": {"message": "not this chat"}}, 400)
        return JSONResponse({"token_ids": list(message_ids(TOKENIZER, body["messages"]))})

    async def derender(self, request: Request) -> Response:
        body = await request.json()
        assert body["chat_request"]["tools"]
        (choice,) = body["generate_response"]["choices"]
        text = str(TOKENIZER.decode(choice["token_ids"]))
        if self.reads_reasoning:
            text = text.partition(MARK)[2]
        elif text.startswith(MARK):
            self.marked += 1
        before, call, after = text.partition("CALL ")
        message: dict[str, Any] = {"role": "assistant", "content": before, "tool_calls": []}
        if call:
            name, _, arguments = after.partition(" ")
            function = {"name": name, "arguments": arguments}
            message["tool_calls"] = [{"id": "call-1", "type": "function", "function": function}]
        return JSONResponse({"choices": [{"index": 0, "message": message}]})


@contextmanager
def in_front_of(upstream: FakeUpstream) -> Iterator[str]:
    """Runs our server in front of an upstream, as the command does."""
    with listening_app(upstream.app()) as behind:
        server = UpstreamServer(f"{behind}/v1", None, TOKENIZER, eos_ids=(EOS,), retries=0)
        model = ThinkingModel(server, TOKENIZER, server.max_model_tokens, eos_ids=(EOS,))
        reader = asyncio.run(_negotiate(server, model))
        own = ServeSettings("made-up", ChunkSpec(60, 10, 3), 60, Sampling(0.0))
        with serving(ThinkingService(own, model, server, tool_reader=reader)) as url:
            yield url


def ask(url: str, **options: Any) -> Any:
    given = {"model": "made-up", "messages": MESSAGES, "tools": TOOLS, "temperature": 0, **options}
    asking = openai.OpenAI(base_url=url, api_key="any", max_retries=0)
    return asking.chat.completions.create(**given)


@pytest.mark.parametrize("reads_reasoning", [False, True])
def test_calls_are_read_in_the_answer_whole_and_streamed(reads_reasoning: bool) -> None:
    upstream = ToolUpstream(Scripted('\n so CALL take {"it": 1}'))
    upstream.reads_reasoning = reads_reasoning
    with in_front_of(upstream) as url:
        (choice,) = ask(url).choices
        pieces = [piece.choices[0] for piece in ask(url, stream=True)]
        two = ask(url, n=2)
    assert upstream.marked == (not reads_reasoning)  # at the start alone
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("take", {"it": 1})
    assert (choice.message.content, choice.finish_reason) == ("so ", "tool_calls")
    assert choice.message.reasoning == "ab"
    assert [len(each.message.tool_calls) for each in two.choices] == [1, 1]
    # A stream shows the thinking as it comes, and the answer once its calls are read.
    assert "".join(getattr(p.delta, "reasoning", None) or "" for p in pieces) == "ab"
    assert "".join(p.delta.content or "" for p in pieces) == "so "
    (streamed,) = [p.delta.tool_calls for p in pieces if p.delta.tool_calls]
    assert streamed[0].function.arguments == call.function.arguments
    assert (streamed[0].index, streamed[0].id) == (0, "call-1")
    assert pieces[-1].finish_reason == "tool_calls"


def test_an_answer_without_calls_is_text() -> None:
    with in_front_of(ToolUpstream(Scripted("just text"))) as url:
        (choice,) = ask(url).choices
        pieces = [piece.choices[0] for piece in ask(url, stream=True)]
    assert (choice.message.content, choice.finish_reason) == ("just text", "stop")
    assert not choice.message.tool_calls
    assert "".join(p.delta.content or "" for p in pieces) == "just text"
    assert pieces[-1].finish_reason == "stop"


def test_what_cannot_be_called_is_refused_by_name() -> None:
    needed = r"--enable-scale-out, --enable-auto-tool-choice and --tool-call-parser"
    with in_front_of(ToolUpstream(Scripted("x"))) as url:
        with pytest.raises(openai.BadRequestError, match="tool_choice may be 'auto' or 'none'"):
            ask(url, tool_choice="required")
        with pytest.raises(openai.BadRequestError, match="refused: not this chat"):
            ask(url, messages=[{"role": "user", "content": "refuse"}])
        assert ask(url, tools=[]).choices[0].message.content == "x"
    with in_front_of(FakeUpstream(MadeUpReasoner(1, 3, 4))) as url:
        with pytest.raises(openai.BadRequestError, match=f"(?s){needed}.*enable_thinking"):
            ask(url)
        passed = ask(url, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
        assert passed.choices[0].message.content == "untouched"
    own = service_of(MadeUpReasoner(1, 3, 4))
    with serving(own) as url, pytest.raises(openai.BadRequestError, match=f"base-url.*{needed}"):
        ask(url)
