"""The server as an application of Ray Serve, with the options of ``delethink serve``.

    applications:
      - name: thinking
        route_prefix: /
        import_path: delethink.cli.ray_serve:build_app
        args: {options: "-m MODEL -C 8k --carryover-size 4k --max-chunks 5"}

``serve deploy`` and ``serve run`` take such a file. Ray Serve owns the address: ``--host`` and
``--port`` have no effect. Each replica has an engine, and limits, of its own.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from delethink.cli.main import parse
from delethink.cli.process import require_packages
from delethink.cli.serve import read_options
from delethink.errors import ConfigError, did_you_mean
from delethink.output import get_logger

if TYPE_CHECKING:
    from delethink.serve.settings import ServeSettings
    from delethink.serve.start import ModelSource

_ARGUMENTS = ("options", "num_replicas")
_logger = get_logger(__name__)


def build_app(arguments: Mapping[str, Any]) -> Any:
    """Return the application, as Ray Serve asks for it.

    Args:
        arguments: ``options`` of ``delethink serve`` as one text, and ``num_replicas`` (default 1).

    Raises:
        ConfigError: an argument or an option is unknown or out of range.
    """
    for name in arguments:
        if name not in _ARGUMENTS:
            raise ConfigError(f"unknown argument {name!r}.{did_you_mean(name, _ARGUMENTS)}")
    require_packages("ray-serve", "ray", "grpc_reflection")
    try:
        parsed = parse(["serve", *shlex.split(str(arguments.get("options", "")))])
    except SystemExit:
        raise ConfigError(
            f"these are no options of delethink serve: {arguments.get('options')!r}"
        ) from None
    source, settings = read_options(parsed)
    return make_ray_app(source, settings, int(arguments.get("num_replicas", 1)))


def make_ray_app(source: ModelSource, settings: ServeSettings, num_replicas: int = 1) -> Any:
    """Return an application whose replicas each open the model and serve it.

    Args:
        source: place of the model, as each replica sees it.
        settings: limits and defaults of each replica.
        num_replicas: number of servers.
    """
    from ray import serve

    def build() -> Any:
        return _Replica(source, settings)

    deployment = serve.deployment(
        name="Thinking",
        num_replicas=num_replicas,
        # The server has a queue of its own, and answers 429 when it is full.
        max_ongoing_requests=settings.max_traces + settings.max_queue + 64,
    )
    return deployment(serve.ingress(build)()).bind()


class _Replica:
    """ASGI application that owns its model."""

    def __init__(self, source: ModelSource, settings: ServeSettings) -> None:
        from delethink.serve.app import make_app
        from delethink.serve.start import open_service

        self._opened = ExitStack()
        # A thread of its own, as the replica's event loop runs already.
        with ThreadPoolExecutor(1) as thread:
            opened = open_service(source, settings, _logger.warning)
            service = thread.submit(self._opened.enter_context, opened).result()
        self._app = make_app(service)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request; the model is released after the end of the application's life."""
        await self._app(scope, receive, send)
        if scope["type"] == "lifespan":
            self._opened.close()
