"""The toy reasoner behind a real HTTP server with vLLM's routes.

It samples with the in-process engine, as a start of vLLM takes a minute of a core; a real vLLM
server is in the slow tier.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from served import listening_app
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from delethink import Sampling
from delethink.engines.loading import eos_ids, load_model, load_tokenizer
from delethink.engines.transformers import TransformersEngine
from delethink.types import StopReason


@contextmanager
def toy_server(model: Path) -> Iterator[str]:
    """Serves a model of the toy's size, and gives the address."""
    tokenizer, loaded = load_tokenizer(str(model)), load_model(str(model), "float32")
    engine = TransformersEngine(loaded, eos_ids(loaded, tokenizer), int(tokenizer.pad_token_id))

    async def models(request: Request) -> Response:
        listed = {"id": str(model), "max_model_len": engine.max_model_tokens}
        return JSONResponse({"object": "list", "data": [listed]})

    async def complete(request: Request) -> Response:
        body = await request.json()
        if not all(isinstance(token, int) for token in body["prompt"]):
            return JSONResponse({"error": {"message": "token ids are needed"}}, 400)
        sampling = Sampling(
            body.get("temperature", 1.0),
            body.get("seed"),
            top_p=body.get("top_p", 1.0),
            top_k=max(0, body.get("top_k", 0)),
            min_p=body.get("min_p", 0.0),
        )
        prompt = tuple(body["prompt"])
        done = await engine.generate(prompt, body["max_tokens"], sampling)
        is_end = done.stop is StopReason.EOS
        choice = {
            "index": 0,
            "text": tokenizer.decode(done.token_ids),
            "token_ids": list(done.token_ids),
            "prompt_token_ids": list(prompt),
            "finish_reason": "stop" if is_end else "length",
        }
        if body.get("logprobs") is not None:
            choice["logprobs"] = {"token_logprobs": list(done.logprobs)}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(done.token_ids)}
        return JSONResponse({"object": "text_completion", "choices": [choice], "usage": usage})

    routes = [Route("/v1/models", models), Route("/v1/completions", complete, methods=["POST"])]
    with listening_app(Starlette(routes=routes)) as url:
        yield f"{url}/v1"
