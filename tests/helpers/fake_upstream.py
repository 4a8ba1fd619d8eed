"""A server with vLLM's routes over the made-up reasoner, which can be told to misbehave.

It stands for a vLLM server where one that is slow, breaks off or answers garbage is needed; a real
one is behind ``test_serve_vllm``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from made_up_reasoner import EOS, TOKENIZER, MadeUpReasoner
from served import listening_app
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from delethink.tokenization import reward_text


class FakeUpstream:
    """The server's behaviour and memory.

    Attributes:
        asked: bodies of completions.
        chats: bodies of chat completions.
        faults: what happens to the next completions, one after the other: a status, "garbage",
            "half" of a stream, "nothing", or "hang".
        cancelled: streams that were left before their end.
    """

    def __init__(self, policy: Any = None, window: int = 1000) -> None:
        self.policy = policy or MadeUpReasoner(1, 3, 4)
        self.window = window
        self.asked: list[dict[str, Any]] = []
        self.chats: list[dict[str, Any]] = []
        self.faults: list[Any] = []
        self.cancelled = 0
        self.has_logprobs = True
        self.url = ""

    def app(self) -> Starlette:
        post = ["POST"]
        return Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/completions", self.complete, methods=post),
                Route("/v1/chat/completions", self.chat, methods=post),
            ]
        )

    async def models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": "real", "max_model_len": self.window}]})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.chats.append(body)
        if body.get("stream"):
            return StreamingResponse(iter([b'data: {"a": 1}\n\n', b"data: [DONE]\n\n"]))
        message = {"role": "assistant", "content": "untouched"}
        return JSONResponse({"choices": [{"index": 0, "message": message}], "usage": None})

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            return JSONResponse({"error": {"message": "told to fail"}}, fault)
        if fault == "garbage":
            return Response(b"<html>oops", media_type="text/html")
        prompt = tuple(body["prompt"])
        ids = self.policy.complete(prompt, body["max_tokens"])
        if body.get("stream"):
            events = self.events(prompt, ids, fault, body.get("logprobs") and self.has_logprobs)
            return StreamingResponse(events, media_type="text/event-stream")
        if fault in ("half", "nothing", "hang"):
            await asyncio.sleep(3600 if fault == "hang" else 0)
            return Response(b"", media_type="application/json")
        return JSONResponse(self.response(prompt, ids))

    def response(self, prompt: tuple[int, ...], ids: tuple[int, ...]) -> dict[str, Any]:
        choice = {
            "index": 0,
            "text": reward_text(TOKENIZER, ids),
            "token_ids": list(ids),
            "prompt_token_ids": list(prompt),
            "finish_reason": "stop" if ids[-1] == EOS else "length",
            "stop_reason": EOS if ids[-1] == EOS else None,
        }
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        return {"object": "text_completion", "choices": [choice], "usage": usage}

    async def events(
        self, prompt: tuple[int, ...], ids: tuple[int, ...], fault: Any, logprobs: Any
    ) -> AsyncIterator[bytes]:
        whole = self.response(prompt, ids)
        last = whole["choices"][0]
        done = False
        try:
            for i, token in enumerate(ids):
                if fault == "nothing" or (fault in ("half", "hang") and i >= len(ids) // 2):
                    break
                choice = {"index": 0, "text": "", "token_ids": [token], "finish_reason": None}
                if logprobs:
                    choice["logprobs"] = {"token_logprobs": [-float(token)], "tokens": ["x"]}
                if i == 0:
                    choice["prompt_token_ids"] = last["prompt_token_ids"]
                if i == len(ids) - 1:
                    choice |= {key: last[key] for key in ("finish_reason", "stop_reason")}
                yield b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"
                await asyncio.sleep(0)
            if fault == "hang":
                await asyncio.sleep(3600)
            if fault is None:
                yield b"data: " + json.dumps({**whole, "choices": []}).encode() + b"\n\n"
                yield b"data: [DONE]\n\n"
            done = True
        finally:
            self.cancelled += not done


@contextmanager
def fake_upstream(**options: Any) -> Iterator[FakeUpstream]:
    """Runs the server, and gives its behaviour."""
    upstream = FakeUpstream(**options)
    with listening_app(upstream.app()) as url:
        upstream.url = f"{url}/v1"
        yield upstream
