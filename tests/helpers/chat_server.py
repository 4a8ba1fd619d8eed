"""The toy reasoner behind a real HTTP server with vLLM's routes for messages and for training.

It renders messages with the model's chat template, continues the assistant's last message where it
is asked to, and samples with the in-process engine, as a start of vLLM takes a minute of a core. A
real vLLM server is in one test of the slow tier.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from served import listening_app
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from delethink import Sampling
from delethink.engines.loading import eos_ids, load_model, load_tokenizer
from delethink.engines.transformers import TransformersEngine
from delethink.types import StopReason


@dataclass
class ChatServer:
    """A server of one model.

    Attributes:
        returns_ids: answer ``return_token_ids``.
        trusts_templates: take a chat template from a request.
        retokenizes: read a continued message as one token more, as a text may be encoded to other
            ids than those it was decoded from; the toy's letters never are.
        lives: number of completions before every further one fails; ``None`` for all.
        asked: the bodies of all requests for completions.
    """

    model: str
    returns_ids: bool = True
    trusts_templates: bool = True
    retokenizes: bool = False
    lives: int | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        self.tokenizer, loaded = load_tokenizer(self.model), load_model(self.model, "float32")
        ends = eos_ids(loaded, self.tokenizer)
        self.engine = TransformersEngine(loaded, ends, int(self.tokenizer.pad_token_id))

    async def models(self, request: Request) -> Response:
        listed = {"id": self.model, "max_model_len": self.engine.max_model_tokens}
        return JSONResponse({"object": "list", "data": [listed]})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        if self.lives is not None and len(self.asked) > self.lives:
            return _error("the engine died", 500)
        template = body.get("chat_template")
        if template and not self.trusts_templates:
            return _error("Chat template is passed with request, but it is not trusted", 400)
        encoded = self.tokenizer.apply_chat_template(
            body["messages"],
            chat_template=template,
            add_generation_prompt=body.get("add_generation_prompt", True),
            continue_final_message=body.get("continue_final_message", False),
            return_dict=True,
        )
        prompt = list(encoded["input_ids"])
        if self.retokenizes and body.get("continue_final_message"):
            prompt.append(prompt[-1])
        ids, is_end, _ = await self._sample(prompt, body)
        message = {"role": "assistant", "content": self.tokenizer.decode(ids[: len(ids) - is_end])}
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": "stop" if is_end else "length",
        }
        made = {
            "id": f"chatcmpl-{len(self.asked)}",
            "object": "chat.completion",
            "created": 0,
            "model": self.model,
            "choices": [choice],
            "usage": {
                "prompt_tokens": len(prompt),
                "completion_tokens": len(ids),
                "total_tokens": len(prompt) + len(ids),
            },
        }
        if self.returns_ids and body.get("return_token_ids"):
            choice["token_ids"] = ids
            made["prompt_token_ids"] = prompt
        return JSONResponse(made)

    async def generate(self, request: Request) -> Response:
        """Answers token ids, as vLLM does for the client that verifiers has for training."""
        body = await request.json()
        self.asked.append(body)
        ids, is_end, logprobs = await self._sample(body["token_ids"], body["sampling_params"])
        content = [
            {"token": f"token_id:{token}", "logprob": value}
            for token, value in zip(ids, logprobs, strict=True)
        ]
        choice = {
            "index": 0,
            "token_ids": ids,
            "finish_reason": "stop" if is_end else "length",
            "logprobs": {"content": content},
        }
        return JSONResponse({"request_id": f"gen-{len(self.asked)}", "choices": [choice]})

    async def _sample(
        self, prompt: list[int], body: dict[str, Any]
    ) -> tuple[list[int], bool, list[float]]:
        sampling = Sampling(body.get("temperature", 1.0), body.get("seed"))
        done = await self.engine.generate(tuple(prompt), body["max_tokens"], sampling)
        ids = list(map(int, done.token_ids))
        return ids, done.stop is StopReason.EOS, list(map(float, done.logprobs))


def _error(text: str, status: int) -> Response:
    return JSONResponse({"error": {"message": text, "code": status}}, status)


@contextmanager
def chat_server(model: str | Path, **habits: Any) -> Iterator[ChatServer]:
    """Serves a model of the toy's size, and gives the server with its address."""
    server = ChatServer(str(model), **habits)
    routes = [
        Route("/v1/models", server.models),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/inference/v1/generate", server.generate, methods=["POST"]),
    ]
    with listening_app(Starlette(routes=routes)) as url:
        server.url = f"{url}/v1"
        yield server
