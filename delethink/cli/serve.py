"""The ``delethink serve`` command."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from delethink.chunking import ChunkSpec
from delethink.cli.arguments import parse_carryover, parse_head_size, size
from delethink.cli.process import require_packages, set_up_process
from delethink.config import parse_engine, parse_values
from delethink.engines.factory import choose_engine
from delethink.errors import ConfigError, did_you_mean
from delethink.output import echo
from delethink.policy import Sampling
from delethink.redaction import register_secret, register_url
from delethink.thinking_marks import check_mark_setting

if TYPE_CHECKING:
    from delethink.serve.settings import ServeSettings
    from delethink.serve.start import ModelSource

_MIN_KEY_CHARACTERS = 8  # shorter ones are guessed
_MAX_PORT = 65_535
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments before heavy imports, then serve until the process is asked to end."""
    if not 0 <= arguments.port <= _MAX_PORT:
        raise ConfigError(f"--port must be 0 (a free one) to {_MAX_PORT}, got {arguments.port}")
    source, settings = read_options(arguments)
    if not settings.api_keys and arguments.host not in _LOOPBACK and not arguments.no_keys:
        raise ConfigError(
            f"--host {arguments.host} is open to other machines: name a file of keys with "
            "--keys-file, or pass --no-keys to serve anybody"
        )
    return _serve(arguments, source, settings)


def read_options(arguments: argparse.Namespace) -> tuple[ModelSource, ServeSettings]:
    """Return the model and the settings that the options of the command name.

    Raises:
        ConfigError: an option is out of range, or has no effect.
    """
    require_packages("serve", "starlette", "uvicorn", "prometheus_client", "openai", "transformers")
    register_secret(os.environ.get(arguments.api_key_env))
    register_url(arguments.base_url or "")
    check_mark_setting(arguments.end_of_thinking)
    engine = parse_engine(arguments.values)
    if arguments.base_url is None:
        if arguments.model is None:
            raise ConfigError("name a model with -m, or a running server with --base-url")
        if arguments.served_model is not None:
            raise ConfigError("--served-model needs --base-url")
        choose_engine(engine.name)
    elif arguments.values:
        raise ConfigError(
            "--base-url samples from a server, so engine settings have no effect: remove "
            f"{' '.join(arguments.values)}"
        )
    spec, keys = _spec(arguments), _keys(arguments)
    set_up_process()
    from delethink.serve.loops import LoopRule
    from delethink.serve.settings import NUDGE, ServeSettings
    from delethink.serve.start import ModelSource

    settings = ServeSettings(
        model_name=arguments.name or _name(arguments),
        spec=spec,
        answer_tokens=size(arguments.answer_tokens, "--answer-tokens"),
        sampling=_sampling(arguments),
        efforts=_efforts(arguments.effort),
        loop=None if arguments.on_loop is None else LoopRule(),
        on_loop=arguments.on_loop or "end",
        nudge=NUDGE if arguments.nudge is None else arguments.nudge,
        max_traces=arguments.max_traces,
        max_queue=arguments.max_queue,
        max_body_bytes=size(arguments.max_body, "--max-body"),
        thinking_time_s=arguments.thinking_time,
        keepalive_s=arguments.keepalive,
        reasoning_fields=_fields(arguments.reasoning_field),
        api_keys=keys,
    )
    source = ModelSource(
        model=arguments.model,
        base_url=arguments.base_url,
        served_name=arguments.served_model,
        api_key=os.environ.get(arguments.api_key_env) or None,
        retries=arguments.retries,
        timeout_s=arguments.timeout,
        engine=engine,
        trust_remote_code=arguments.trust_remote_code,
        chat_template=arguments.chat_template,
        chat_template_kwargs=parse_values(arguments.chat_template_kwargs),
        end_of_thinking=check_mark_setting(arguments.end_of_thinking),
        query_tokens=size(arguments.query_tokens, "--query-tokens"),
    )
    return source, settings


def say(line: str) -> None:
    """Print a line about the server, unless a full disk or a closed terminal takes none."""
    with contextlib.suppress(OSError, ValueError):
        echo(line, stderr=True)


def _serve(arguments: argparse.Namespace, source: ModelSource, settings: ServeSettings) -> int:
    from delethink.serve.start import listen, open_service, serve_forever

    if arguments.debug:
        logging.getLogger("delethink").setLevel(logging.DEBUG)
    log = say if arguments.log_requests else lambda line: None
    sock = listen(arguments.host, arguments.port)
    try:
        with open_service(source, settings, say, log) as service:
            host, port = sock.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            address = f"http://{host}:{port}/v1"
            greet = partial(_greet, address, settings.model_name, bool(settings.api_keys))
            serve_forever(service, sock, greet)
    finally:
        sock.close()
    return 0


def _greet(address: str, name: str, has_keys: bool) -> None:
    key = ' -H "Authorization: Bearer $KEY"' if has_keys else ""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    say(f"serving {name} at {address}")  # standard output may be a pipe, and wait
    curl = f"  curl {address}/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
    say(curl)


def _spec(arguments: argparse.Namespace) -> ChunkSpec:
    context = size(arguments.context_size, "-C")
    carried = arguments.carryover_size
    return ChunkSpec(
        context,
        context // 2 if carried is None else size(carried, "--carryover-size", 0),
        size(arguments.max_chunks, "--max-chunks"),
        parse_head_size(arguments.head_size),
        arguments.head_outside,
        parse_carryover(arguments.carryover),
    )


def _sampling(arguments: argparse.Namespace) -> Sampling:
    for option, low, high in (("temperature", 0, 100), ("top_p", 0, 1), ("min_p", 0, 1)):
        value = getattr(arguments, option)
        if not low <= value <= high:
            raise ConfigError(f"--{option.replace('_', '-')} must be {low} to {high}, got {value}")
    if arguments.top_k < 0 or arguments.top_p == 0:
        raise ConfigError("--top-k must be at least 0, and --top-p more than 0")
    return Sampling(
        arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
    )


def _efforts(pairs: list[str]) -> dict[str, int]:
    """Return the thinking tokens of reasoning efforts, from ``low=2k``."""
    from delethink.serve.settings import EFFORT_SHARES

    efforts = {}
    for pair in pairs:
        name, equals, tokens = pair.partition("=")
        if not equals or name not in EFFORT_SHARES:
            raise ConfigError(
                f"--effort must be NAME=TOKENS, got {pair!r}.{did_you_mean(name, EFFORT_SHARES)}"
            )
        efforts[name] = size(tokens, f"--effort {name}", 0)
    return efforts


def _fields(choice: str) -> tuple[str, ...]:
    from delethink.serve.settings import REASONING_FIELDS

    return REASONING_FIELDS if choice == "both" else (choice,)


def _keys(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return the keys of clients, from a file with one in each line, and the environment."""
    lines = os.environ.get(arguments.keys_env, "").replace(",", "\n").splitlines()
    if arguments.keys_file is not None:
        try:
            lines += arguments.keys_file.read_text("utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise ConfigError(
                f"--keys-file {arguments.keys_file} cannot be read: {error}"
            ) from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if arguments.keys_file is not None and not keys:
        raise ConfigError(f"--keys-file {arguments.keys_file} has no key: write one in each line")
    for key in keys:
        if len(key) < _MIN_KEY_CHARACTERS or not re.fullmatch(r"[!-~]+", key):
            raise ConfigError(
                f"a key must have at least {_MIN_KEY_CHARACTERS} visible ASCII characters and no "
                f"spaces, got one of {len(key)} characters"
            )
        register_secret(key)
    return tuple(keys)


def _name(arguments: argparse.Namespace) -> str:
    """Return the name under which the model is served."""
    given: str = arguments.model or arguments.served_model or "delethink"
    path = Path(given).expanduser()
    return path.resolve().name if path.is_dir() else given
