"""Start of a server: model, engine or upstream, checks, and the listening socket."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from delethink.chat_templates import has_variable, template_source
from delethink.chunking import ChunkSpec
from delethink.config import EngineConfig
from delethink.engines.factory import make_engine
from delethink.engines.loading import eos_ids, load_shell, load_tokenizer, longest_sequence
from delethink.engines.openai_models import list_models
from delethink.errors import ConfigError, ModelError
from delethink.policy import Policy
from delethink.serve.local_engine import EngineThread
from delethink.serve.service import ThinkingService
from delethink.serve.settings import ServeSettings
from delethink.serve.thinking import ThinkingLimits, ThinkingModel
from delethink.serve.tools import NEEDED_OPTIONS, ToolReader
from delethink.serve.upstream import UpstreamServer
from delethink.thinking_marks import AUTO
from delethink.tokenization import bind_marks, bind_template, message_ids

_GRACE_S = 5  # for open streams, when the server closes
_TELLING_S = 5  # for the error that the others are told


@dataclass(frozen=True)
class ModelSource:
    """Place of the tokenizer, and of the engine or server that samples."""

    model: str | None  # folder, Hugging Face id or "toy"; ``None`` asks the server behind this one
    base_url: str | None = None
    served_name: str | None = None  # of the model on the server behind this one
    api_key: str | None = field(default=None, repr=False)
    retries: int = 8
    timeout_s: float = 600.0
    engine: EngineConfig = field(default_factory=EngineConfig)
    trust_remote_code: bool = False
    chat_template: Path | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    end_of_thinking: str | None = AUTO
    query_tokens: int = 4096  # longest query for which an engine makes room


@dataclass(frozen=True)
class _Opened:
    model: ThinkingModel
    upstream: UpstreamServer | None = None
    stream_policy: Policy | None = None  # if it is not that of the model
    is_healthy: Callable[[], bool] = lambda: True  # of the engine
    tool_reader: ToolReader | None = None


@contextmanager
def open_service(
    source: ModelSource,
    settings: ServeSettings,
    say: Callable[[str], None] = lambda line: None,
    log: Callable[[str], None] = lambda line: None,
) -> Iterator[ThinkingService]:
    """Load everything, check it, and release it at the end of the ``with`` block.

    Args:
        source: the model.
        settings: of the server; its spec is bound to the tokenizer here.
        say: called with lines about the start.
        log: called with a line for each request.

    Raises:
        UserError: model, sizes and server do not fit together; one sentence says why.
    """
    if source.base_url is None:
        opened = _open_engine(source, settings, say)
    else:
        opened = _open_upstream(source, settings, say)
    with opened as made:
        model = made.model
        spec = settings.spec.bind(model.tokenizer)
        limits = ThinkingLimits(settings.answer_tokens)
        _check_window(model, spec, limits)
        if model.marks.is_assumed:
            say(
                f"neither the chat template nor the tokens show the end of thinking; "
                f"{model.marks.end} is assumed (--end-of-thinking names another)"
            )
        if made.tool_reader is not None:
            say("requests may have tools: the server behind reads the calls in answers")
        elif has_variable(template_source(model.tokenizer) or "", "tools"):
            if made.upstream is None:
                say("the chat template knows tools; requests with tools are refused")
            else:
                say(
                    "the chat template knows tools; requests with tools are refused, as the "
                    f"server behind lacks {NEEDED_OPTIONS}"
                )
        own = replace(settings, spec=spec)
        yield ThinkingService(
            own,
            model,
            made.upstream,
            log,
            made.stream_policy,
            made.is_healthy,
            made.tool_reader,
        )


def _check_window(model: ThinkingModel, spec: ChunkSpec, limits: ThinkingLimits) -> None:
    """Refuse sizes that leave no room for a query.

    Raises:
        ConfigError: the text has the numbers.
    """
    window, needed = model.max_model_tokens, model.context_tokens(spec, limits)
    if window is not None and window <= needed:
        most = spec.context_size - (needed - window) - 1
        raise ConfigError(
            f"the model takes {window} tokens, and a context needs {needed} besides the query: "
            f"{spec.max_thinking_context} of thinking, {len(model.mark_ids)} for its end and "
            f"{limits.answer_tokens} for the answer; lower -C to less than {max(most, 0)} or "
            "--answer-tokens"
        )


def _open_tokenizer(source: ModelSource, model: str) -> Any:
    tokenizer: Any = load_tokenizer(model, source.trust_remote_code)
    if source.chat_template is not None:
        try:
            tokenizer.chat_template = source.chat_template.read_text("utf-8")
        except (OSError, UnicodeError) as error:
            raise ConfigError(
                f"--chat-template {source.chat_template} cannot be read: {error}"
            ) from None
    if source.chat_template_kwargs:
        bind_template(tokenizer, source.chat_template_kwargs)
    if source.chat_template is not None:
        try:
            message_ids(tokenizer, [{"role": "user", "content": "Hello"}])
        except ModelError as error:
            raise ConfigError(f"--chat-template {source.chat_template}: {error}") from None
    bind_marks(tokenizer, source.end_of_thinking)
    return tokenizer


@contextmanager
def _open_engine(
    source: ModelSource, settings: ServeSettings, say: Callable[[str], None]
) -> Iterator[_Opened]:
    """Open an engine of this machine or its Ray cluster."""
    if source.model is None:
        raise ConfigError("name a model with -m, or a server with --base-url")
    tokenizer = _open_tokenizer(source, source.model)
    shell = load_shell(source.model, source.trust_remote_code)
    ends, window = eos_ids(shell, tokenizer), longest_sequence(shell)
    planned = ThinkingModel(_NoPolicy(), tokenizer, window, eos_ids=ends)
    spec, limits = settings.spec.bind(tokenizer), ThinkingLimits(settings.answer_tokens)
    _check_window(planned, spec, limits)  # before the weights load
    config = source.engine
    if config.max_model_tokens is None:
        needed = planned.context_tokens(spec, limits) + source.query_tokens
        config = config.model_copy(update={"max_model_tokens": min(window, needed)})
    engine = make_engine(
        config,
        source.model,
        None,
        tokenizer,
        trust_remote_code=source.trust_remote_code,
        is_trained=False,
    )
    with contextlib.closing(engine):
        own = replace(planned, max_model_tokens=engine.max_model_tokens)
        if getattr(engine, "computes_elsewhere", False):
            model = replace(own, policy=_WholeChunks(engine))
            yield _Opened(model, stream_policy=engine, is_healthy=partial(_has_workers, engine))
            return
        with contextlib.closing(EngineThread(engine, ends)) as thread:
            yield _Opened(replace(own, policy=thread))


class _WholeChunks:
    """Policy that asks an engine for whole chunks where nobody reads along, which costs less."""

    def __init__(self, engine: Policy) -> None:
        self.generate = engine.generate


def _has_workers(engine: Any) -> bool:
    workers = getattr(engine, "workers", None)
    return workers is None or any(worker.in_service for worker in workers)


class _NoPolicy:
    """Stands for an engine that is not loaded yet."""

    generate: Any = None


@contextmanager
def _open_upstream(
    source: ModelSource, settings: ServeSettings, say: Callable[[str], None]
) -> Iterator[_Opened]:
    """Connect to the server behind this one, and see that it completes token ids or text."""
    assert source.base_url is not None
    name = source.model or _tokenizer_name(source)
    try:
        tokenizer = _open_tokenizer(source, name)
    except ModelError as error:
        if source.model is not None:
            raise
        raise ConfigError(
            f"the server at {source.base_url} serves {name!r}, of which no tokenizer can be "
            f"loaded here ({error}); name its folder or Hugging Face id with -m"
        ) from None
    ends, window = _ends_and_window(source, name, tokenizer)
    server = UpstreamServer(
        source.base_url,
        source.served_name,
        tokenizer,
        api_key=source.api_key,
        eos_ids=ends,
        retries=source.retries,
        timeout_s=source.timeout_s,
        announce=say,
        checks_options=False,  # at their first use, as that would delay a client
    )
    known = [size for size in (window, server.max_model_tokens) if size is not None]
    model = ThinkingModel(server, tokenizer, min(known, default=None), eos_ids=ends)
    _check_window(model, settings.spec.bind(tokenizer), ThinkingLimits(settings.answer_tokens))
    yield _Opened(model, server, tool_reader=asyncio.run(_negotiate(server, model)))


def _ends_and_window(
    source: ModelSource, name: str, tokenizer: Any
) -> tuple[tuple[int, ...], int | None]:
    """Return end tokens and window; a folder may hold a tokenizer alone."""
    try:
        shell = load_shell(name, source.trust_remote_code)
    except ModelError:
        return (int(tokenizer.eos_token_id),), None
    return eos_ids(shell, tokenizer), longest_sequence(shell)


async def _negotiate(server: UpstreamServer, model: ThinkingModel) -> ToolReader | None:
    """Say what the server behind cannot do, and return the reader of calls if it has one."""
    reader = ToolReader(server, model)
    try:
        await server.say_limits(model.mark_ids or (0,))
        return reader if await reader.is_supported() else None
    finally:
        await server.disconnect()


def _tokenizer_name(source: ModelSource) -> str:
    """Return the model that the server behind this one names, to load its tokenizer."""
    import openai

    def open_client(base_url: str) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=base_url, api_key=source.api_key or "EMPTY", max_retries=0, timeout=20.0
        )

    address = source.base_url or ""
    try:
        listed = list(list_models(address, open_client).windows)
    except openai.APIError as error:
        raise ConfigError(
            f"the server at {address} lists no models ({error}); start it, check the address, or "
            "name its tokenizer with -m"
        ) from None
    name = source.served_name or (listed[0] if len(listed) == 1 else None)
    if name is None:
        raise ConfigError(
            f"the server at {address} serves {', '.join(listed) or 'no model'}; name one with "
            "--served-model, and its tokenizer with -m"
        )
    return name


def listen(host: str, port: int) -> socket.socket:
    """Return a socket with an address; the server listens on it when it is ready.

    Raises:
        ConfigError: the port is in use, or the address is none of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # With the protocol named, asyncio sends each piece at once (TCP_NODELAY).
        opened = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {host} is no address: {error}") from None
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind(address)
    except (OSError, OverflowError) as error:
        opened.close()
        raise ConfigError(
            f"the server cannot listen on {host} port {port}: {error}; choose another with "
            "--port, or 0 for a free one"
        ) from None
    return opened


def drop_deaf_clients(sock: socket.socket, after_s: float) -> None:
    """Let the system end connections whose clients read nothing for so long.

    The server can only close them, which waits until everything was read. Connections inherit this
    from the listening socket; it exists on Linux alone.
    """
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None:
        sock.setsockopt(socket.IPPROTO_TCP, option, round(after_s * 1000))


def serve_forever(
    service: ThinkingService, sock: socket.socket, on_listening: Callable[[], None]
) -> None:
    """Answer requests until the process is asked to end, by SIGINT, SIGTERM or SIGHUP.

    Then nobody new is let in. Traces have a few seconds to end, and the clients of the others are
    told an error.
    """
    import uvicorn

    from delethink.serve.app import make_app

    drop_deaf_clients(sock, service.settings.send_time_s)

    class Server(uvicorn.Server):  # type: ignore[misc]  # untyped for mypy
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                on_listening()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            telling = asyncio.ensure_future(_close_later(service))
            await super().shutdown(sockets)
            telling.cancel()

    config = uvicorn.Config(
        make_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_GRACE_S + _TELLING_S,
    )
    with _hang_up_ends_it():
        Server(config).run(sockets=[sock])


async def _close_later(service: ThinkingService) -> None:
    await asyncio.sleep(_GRACE_S)
    await service.close()


@contextmanager
def _hang_up_ends_it() -> Iterator[None]:
    """Treat the end of the terminal as SIGTERM, unless ``nohup`` has it ignored."""
    hang_up = getattr(signal, "SIGHUP", None)
    if hang_up is None or signal.getsignal(hang_up) is not signal.SIG_DFL:
        yield
        return
    signal.signal(hang_up, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(hang_up, signal.SIG_DFL)
