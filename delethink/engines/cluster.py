"""What the pool needs of Ray: a cluster, and errors without wrapping."""

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
except ImportError:  # the pool says so when one is made
    ray = None


def connect(num_cpus: int) -> bool:
    """Joins the Ray cluster that there is, or starts one on this machine.

    Args:
        num_cpus: how many cores a cluster that is started may give away.

    Returns:
        Whether this process had not been connected before, so that it is ours to disconnect.

    Raises:
        ConfigError: there is a cluster, but it does not answer.
    """
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with _own_sigterm():
            _init(num_cpus, quiet)
    except ConnectionError as error:
        raise ConfigError(f"the Ray cluster cannot be joined: {error}") from None
    return True


def _init(num_cpus: int, quiet: dict[str, Any]) -> None:
    try:
        with _loopback():
            ray.init(num_cpus=num_cpus, include_dashboard=False, **quiet)
    except ValueError:  # there is a cluster, and its size is not for us to set
        ray.init(**quiet)


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray puts a handler of its own in place of the program's, which knows how to end a run."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's affair, for Ray too
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Without this, even a Ray for one machine listens to the whole network."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def address_for(peer: str) -> str:
    """An address of this node, in an actor on it, at which another node finds it.

    Args:
        peer: Ray's id of the other node. On the same one, nobody else needs to reach it.
    """
    if ray.get_runtime_context().get_node_id() == peer:
        return "127.0.0.1"
    address: str = ray.util.get_node_ip_address()
    return address


def cause(error: Exception) -> Exception:
    """What went wrong in an actor, without Ray's account of it.

    Returns:
        What the actor raised; ``ConnectionError`` where it is dead.
    """
    if isinstance(error, ray.exceptions.RayTaskError):
        return error.cause if isinstance(error.cause, Exception) else error
    if isinstance(error, ray.exceptions.RayActorError):
        return ConnectionError(f"is dead: {textwrap.shorten(str(error), 400)}")
    return error
