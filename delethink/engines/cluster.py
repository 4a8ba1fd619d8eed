"""Joins or starts a Ray cluster, and unwraps Ray's errors."""

from __future__ import annotations

import contextlib
import logging
import signal
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

from delethink.errors import ConfigError

try:
    import ray
except ImportError:  # RayPool raises MissingExtraError
    ray = None


def connect(num_cpus: int) -> bool:
    """Join the running Ray cluster, or start one with ``num_cpus`` on this machine.

    Returns:
        ``True`` if this call made the connection; the caller then has to end the connection.

    Raises:
        ConfigError: the cluster does not answer.
    """
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with contextlib.ExitStack() as stack:
            if threading.current_thread() is threading.main_thread():
                # Ray replaces the program's handler of SIGTERM by its own.
                stack.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
            try:
                with _loopback():
                    ray.init(num_cpus=num_cpus, include_dashboard=False, **quiet)
            except ValueError:  # Ray refuses num_cpus for a running cluster
                ray.init(**quiet)
    except ConnectionError as error:
        raise ConfigError(f"cannot join the Ray cluster: {error}") from None
    return True


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Let Ray listen on loopback instead of the whole network, its default."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def cause(error: Exception) -> Exception:
    """Return an actor's own exception, or ``ConnectionError`` for a dead actor."""
    if isinstance(error, ray.exceptions.RayTaskError):
        return error.cause if isinstance(error.cause, Exception) else error
    if isinstance(error, ray.exceptions.RayActorError):
        return ConnectionError(f"is dead: {textwrap.shorten(str(error), 400)}")
    return error
