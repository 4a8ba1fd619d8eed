"""Routes of the server: an ASGI application for uvicorn, Ray Serve and tests."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from delethink.errors import ConfigError
from delethink.json_io import parse_json
from delethink.output import get_logger
from delethink.serve.api_errors import ApiError, as_api_error
from delethink.serve.jobs import ClientIdentity
from delethink.serve.metrics import CONTENT_TYPE
from delethink.serve.responses import ResponsesResponse, ResponsesWriter, chat_body, renamed
from delethink.serve.schema import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    ResponsesBody,
    TokenizeBody,
    parse_body,
)
from delethink.serve.sending import (
    ForwardedResponse,
    JobResponse,
    TooLargeResponse,
    encode_json,
)
from delethink.serve.service import ThinkingService
from delethink.serve.tools import ToolChat
from delethink.serve.wire import ResponseWriter

_logger = get_logger(__name__)
_JSON_TYPES = ("", "application/json")
_SWITCHES = ("enable_thinking", "thinking")
_MAX_KEY_CHARACTERS = 255
_BODY_TIME_S = 60.0  # for all of a body

Endpoint = Callable[[Request], Awaitable[Any]]


def make_app(service: ThinkingService) -> Starlette:
    """Return the ASGI application of a service."""
    routes = Routes(service)
    guarded = routes.guarded

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        await service.close()

    return Starlette(
        routes=[
            Route("/v1/chat/completions", guarded(routes.chat), methods=["POST"]),
            Route("/v1/completions", guarded(routes.complete), methods=["POST"]),
            Route("/v1/responses", guarded(routes.respond), methods=["POST"]),
            Route("/v1/models", guarded(routes.models), methods=["GET"]),
            Route("/v1/models/{name:path}", guarded(routes.model_card), methods=["GET"]),
            Route("/tokenize", guarded(routes.tokenize), methods=["POST"]),
            Route("/detokenize", guarded(routes.detokenize), methods=["POST"]),
            Route("/health", routes.health, methods=["GET"]),
            Route("/ping", routes.health, methods=["GET"]),
            Route("/version", routes.version, methods=["GET"]),
            Route("/metrics", routes.metrics, methods=["GET"]),
        ],
        exception_handlers={HTTPException: _on_http_error, Exception: _on_bug},
        lifespan=lifespan,
    )


class Routes:
    """Endpoints of a service."""

    def __init__(self, service: ThinkingService) -> None:
        self._service = service

    def guarded(self, endpoint: Endpoint) -> Endpoint:
        """Return an endpoint that asks for a key, and answers errors in OpenAI's form."""

        async def answer(request: Request) -> Any:
            try:
                if not self._service.settings.accepts_key(request.headers.get("authorization")):
                    raise ApiError(
                        401,
                        "this server needs a key: send it as 'Authorization: Bearer KEY'",
                        code="invalid_api_key",
                        headers={"WWW-Authenticate": "Bearer"},
                    )
                return await endpoint(request)
            except ClientDisconnect:
                return Response(status_code=499)
            except ApiError as error:
                self._service.metrics.count_error(error.status)
                return TooLargeResponse(error) if error.status == 413 else _error_response(error)

        return answer

    # -- completions ---------------------------------------------------------------------------

    async def chat(self, request: Request) -> Any:
        """Answer ``/v1/chat/completions``."""
        raw = await self._read(request)
        value = _parse(raw)
        body = parse_body(ChatBody, value)
        kwargs = body.chat_template_kwargs or {}
        if self._service.upstream is not None and any(kwargs.get(s) is False for s in _SWITCHES):
            self._service.planner.check_model(body.model)
            return ForwardedResponse(self._service, value)
        tools = None
        if body.tools and self._service.tool_reader is not None:
            self._service.planner.check_model(body.model)
            tools = await self._service.tool_reader.render(value)
        return self._answer(request, raw, body, "chatcmpl", tools)

    async def complete(self, request: Request) -> Any:
        """Answer ``/v1/completions``."""
        raw = await self._read(request)
        return self._answer(request, raw, parse_body(CompletionBody, _parse(raw)), "cmpl")

    async def respond(self, request: Request) -> Any:
        """Answer ``/v1/responses``."""
        service, raw = self._service, await self._read(request)
        body = parse_body(ResponsesBody, _parse(raw))
        try:
            plan = service.planner.chat(chat_body(body))
        except ApiError as error:
            raise renamed(error) from None
        if len(plan.traces) > 1:
            raise ApiError(400, "a response is one trace: leave 'n' out", "n")
        identity = _identity(request, raw)
        writer = ResponsesWriter(body, plan, service.settings, service.model)
        job = service.start(plan, identity, writer.request_id)
        return ResponsesResponse(
            service, job, writer, identity, is_stream=plan.is_stream, include_usage=True
        )

    def _answer(
        self,
        request: Request,
        raw: bytes,
        body: GenerationBody,
        prefix: str,
        tools: ToolChat | None = None,
    ) -> Any:
        service = self._service
        planner = service.planner
        plan = (
            planner.chat(body, tools) if isinstance(body, ChatBody) else planner.completion(body)  # type: ignore[arg-type]  # the only other body
        )
        identity = _identity(request, raw)
        request_id = f"{prefix}-{uuid.uuid4().hex}"
        job = service.start(plan, identity, request_id)
        writer = ResponseWriter(plan, service.settings, service.model, request_id)
        return JobResponse(
            service,
            job,
            writer,
            identity,
            is_stream=plan.is_stream,
            include_usage=plan.include_usage,
        )

    # -- other routes --------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        """Answer ``/v1/models``."""
        return _json({"object": "list", "data": [self._service.model_card()]})

    async def model_card(self, request: Request) -> Response:
        """Answer ``/v1/models/NAME``."""
        self._service.planner.check_model(request.path_params["name"])
        return _json(self._service.model_card())

    async def tokenize(self, request: Request) -> Response:
        """Answer ``/tokenize``."""
        body = parse_body(TokenizeBody, _parse(await self._read(request)))
        planner = self._service.planner
        planner.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either 'prompt' or 'messages'", "prompt")
        if body.messages is not None:
            ids = planner.chat_query(body.messages, body.chat_template_kwargs)
        else:
            ids = planner.raw_query(body.prompt or "")
        window = self._service.settings.virtual_window(self._service.model)
        return _json({"count": len(ids), "max_model_len": window, "tokens": list(ids)})

    async def detokenize(self, request: Request) -> Response:
        """Answer ``/detokenize``."""
        body = parse_body(DetokenizeBody, _parse(await self._read(request)))
        self._service.planner.check_model(body.model)
        ids = self._service.planner.raw_query(body.tokens) if body.tokens else ()
        return _json({"prompt": str(self._service.model.tokenizer.decode(list(ids)))})

    async def health(self, request: Request) -> Response:
        """Answer ``/health``: 200, or 503 if the engine or the server behind cannot sample."""
        healthy = await self._service.is_healthy()
        state = "ok" if healthy else "the engine has no worker"
        if not healthy and self._service.upstream is not None:
            state = "the server behind this one does not answer"
        return _json({"status": state}, 200 if healthy else 503)

    async def version(self, request: Request) -> Response:
        """Answer ``/version``."""
        from delethink import __version__

        return _json({"version": __version__})

    async def metrics(self, request: Request) -> Response:
        """Answer ``/metrics``."""
        return Response(self._service.metrics.text(), media_type=CONTENT_TYPE)

    async def _read(self, request: Request) -> bytes:
        """Return the body of a request.

        Raises:
            ApiError: the body is too large, does not come, or is not called JSON, which a page of
                another site cannot send.
        """
        try:
            async with asyncio.timeout(_BODY_TIME_S):
                return await self._read_body(request)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {_BODY_TIME_S:.0f} s") from None

    async def _read_body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in _JSON_TYPES:
            raise ApiError(415, f"the Content-Type must be application/json, got {kind!r:.80}")
        most, parts, size = self._service.settings.max_body_bytes, list[bytes](), 0
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > most:
            raise ApiError(413, f"the body may have {most} bytes, got {declared}")
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise ApiError(413, f"the body may have {most} bytes")
            parts.append(part)
        return b"".join(parts)


def _parse(raw: bytes) -> Any:
    try:
        return parse_json(raw, "the body", ConfigError)
    except ConfigError as error:
        raise ApiError(400, str(error)) from None


def _identity(request: Request, raw: bytes) -> ClientIdentity:
    """Return the marks by which a retry of this request is recognised."""
    headers = request.headers
    client = headers.get("authorization", "")
    key = headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= _MAX_KEY_CHARACTERS:
        raise ApiError(
            400, f"an Idempotency-Key has 1 to {_MAX_KEY_CHARACTERS} characters, got {len(key)}"
        )
    timeout = headers.get("x-stainless-read-timeout") or headers.get("x-stainless-timeout") or ""
    retries = headers.get("x-stainless-retry-count", "0")
    return ClientIdentity(
        _digest(client, request.url.path, raw),
        None if key is None else _digest(client, key, b""),
        retries.isdecimal() and int(retries) > 0,
        _seconds(timeout),
    )


def _digest(client: str, name: str, raw: bytes) -> str:
    head = f"{client}\n{name}\n".encode("utf-8", "surrogatepass")
    return hashlib.sha256(head + raw).hexdigest()


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if seconds > 0 else None


def _json(value: Any, status: int = 200) -> Response:
    return Response(encode_json(value), status, media_type="application/json")


def _error_response(error: ApiError) -> Response:
    response = _json(error.body(), error.status)
    response.headers.update(error.headers)
    return response


async def _on_http_error(request: Request, error: Any) -> Response:
    path = request.url.path
    texts = {
        404: f"this server has no route {path!r:.80}",
        405: f"{path!r:.80} does not take {request.method}",
    }
    code = error.status_code
    return _error_response(ApiError(code, texts.get(code, str(error.detail))))


async def _on_bug(request: Request, error: Exception) -> Response:
    _logger.error("a request failed", exc_info=error)
    return _error_response(as_api_error(error))
