"""A server in this process, on a loopback port that the system chooses."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from made_up_reasoner import EOS, TOKENIZER

from delethink import ChunkSpec, Sampling
from delethink.serve.app import make_app
from delethink.serve.service import ThinkingService
from delethink.serve.settings import ServeSettings
from delethink.serve.start import drop_deaf_clients
from delethink.serve.thinking import ThinkingModel

_PATIENCE_S = 60


def service_of(policy: Any, spec: ChunkSpec | None = None, **settings: Any) -> ThinkingService:
    """Returns a service over a policy with the tokenizer of the made-up reasoner."""
    window, tokenizer = settings.pop("window", 1000), settings.pop("tokenizer", TOKENIZER)
    parts = {name: settings.pop(name) for name in ("log", "engine_is_healthy") if name in settings}
    given = {"answer_tokens": 40, "sampling": Sampling(0.0), **settings}
    own = ServeSettings("made-up", spec or ChunkSpec(30, 10, 5), **given)
    return ThinkingService(own, ThinkingModel(policy, tokenizer, window, eos_ids=(EOS,)), **parts)


@contextmanager
def serving(service: ThinkingService) -> Iterator[str]:
    """Runs the server in a thread, and gives its address."""
    with listening_app(make_app(service)) as url:
        yield f"{url}/v1"


@contextmanager
def listening_app(app: Any, port: int = 0, deaf_s: float = 120.0) -> Iterator[str]:
    """Runs an ASGI application in a thread, and gives its address."""
    sock = socket.socket(proto=socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    drop_deaf_clients(sock, deaf_s)
    config = uvicorn.Config(
        app, log_config=None, lifespan="auto", ws="none", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
    thread.start()
    try:
        waited = threading.Event()
        while not server.started:
            assert thread.is_alive()
            waited.wait(0.01)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(_PATIENCE_S)
        sock.close()
