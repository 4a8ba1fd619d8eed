"""The server: ``server --recipe RECIPE.yaml``, or ``uvicorn server.app:app``.

Under uvicorn the settings come from the environment: ``DELETHINK_RECIPE`` (a file),
``DELETHINK_OVERRIDES`` (``key=value``, with blanks between), ``DELETHINK_SESSIONS`` and
``DELETHINK_PLAIN_PROMPTS`` (``1``).
"""

from __future__ import annotations

import argparse
import atexit
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from openenv.core.env_server.http_server import create_app

from delethink.errors import UserError
from delethink.output import echo
from delethink_openenv.models import ChunkAction, EpisodeState, PromptObservation
from delethink_openenv.server.thinking_environment import NAME, SharedSource, ThinkingEnvironment

DEFAULT_RECIPE = Path(__file__).resolve().parent.parent / "recipe.yaml"
DEFAULT_SESSIONS = 64


def make_app(source: SharedSource, sessions: int = DEFAULT_SESSIONS) -> FastAPI:
    """Return the application, with at most ``sessions`` sessions at a time."""
    app = create_app(
        partial(ThinkingEnvironment, source),
        ChunkAction,
        PromptObservation,
        env_name=NAME,
        max_concurrent_envs=sessions,
        state_cls=EpisodeState,
    )

    @app.exception_handler(UserError)
    async def explain(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 400)  # without a handler: 500, and no reason

    atexit.register(source.close)
    return app


def _source_of_environment() -> SharedSource:
    return SharedSource(
        os.environ.get("DELETHINK_RECIPE", DEFAULT_RECIPE),
        shlex.split(os.environ.get("DELETHINK_OVERRIDES", "")),
        os.environ.get("DELETHINK_PLAIN_PROMPTS", "") not in ("", "0"),
    )


app = make_app(
    _source_of_environment(), int(os.environ.get("DELETHINK_SESSIONS", DEFAULT_SESSIONS))
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve a recipe; exit with 2 for a mistake in it."""
    parser = argparse.ArgumentParser(prog="server", description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*", help="dotted.key=value of the recipe")
    parser.add_argument("--recipe", default=os.environ.get("DELETHINK_RECIPE", DEFAULT_RECIPE))
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: the system chooses")
    parser.add_argument("--sessions", type=int, default=DEFAULT_SESSIONS)
    parser.add_argument(
        "--plain-prompts", action="store_true", help="serve a tokenizer without a chat template"
    )
    given = parser.parse_args(arguments)
    source = SharedSource(given.recipe, given.overrides, given.plain_prompts)
    try:
        source()
    except UserError as error:
        echo(f"error: {error}", stderr=True)
        return 2
    config = uvicorn.Config(make_app(source, given.sessions), given.host, given.port)
    with config.bind_socket() as socket:
        echo(f"http://{given.host}:{socket.getsockname()[1]}")
        sys.stdout.flush()  # whoever started it may read the address from a pipe
        uvicorn.Server(config).run(sockets=[socket])
    return 0


if __name__ == "__main__":
    sys.exit(main())
