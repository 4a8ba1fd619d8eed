"""Joins or starts a Ray cluster, and unwraps Ray's errors."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

from delethink.errors import ConfigError

try:
    import ray
except ImportError:  # RayPool raises MissingExtraError
    ray = None

_ADDRESS = "RAY_ADDRESS"
_ANSWER_TIMEOUT_S = 10.0
_MAX_REASON_CHARACTERS = 300


class EarlyConnection:
    """Connects to a Ray cluster in a thread, while its owner loads something else.

    The thread lives as long as the connection: the kernel ends the processes of a cluster that is
    started here together with the thread that started them.
    """

    def __init__(self, num_cpus: int) -> None:
        self._is_known, self._is_over = threading.Event(), threading.Event()
        self._error: Exception | None = None
        self._is_ours = False
        threading.Thread(target=self._connect, args=(num_cpus,), daemon=True).start()

    def _connect(self, num_cpus: int) -> None:
        try:
            self._is_ours = connect(num_cpus)
        except Exception as error:  # raised again where the connection is needed
            self._error = error
        self._is_known.set()
        self._is_over.wait()

    def wait(self) -> None:
        """Wait for the connection.

        Raises:
            ConfigError: as ``connect``.
        """
        self._is_known.wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the connection, if this made it. Safe to call twice."""
        self._is_known.wait()
        if self._is_ours:
            ray.shutdown()
        self._is_ours = False
        self._is_over.set()


def connect(num_cpus: int) -> bool:
    """Join the running Ray cluster, or start one with ``num_cpus`` on this machine.

    Returns:
        ``True`` if this call made the connection; the caller then has to end the connection.

    Raises:
        ConfigError: the cluster does not answer, or Ray does not start.
    """
    if ray.is_initialized():
        return False
    address = os.environ.get(_ADDRESS, "").strip()
    check_cluster_address(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with contextlib.ExitStack() as stack:
            if threading.current_thread() is threading.main_thread():
                # Ray replaces the program's handler of SIGTERM by its own.
                stack.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
            # Ray's workers yield to all other processes by default, the trainer's too.
            os.environ.setdefault("RAY_worker_niceness", "0")
            try:
                with _loopback():
                    ray.init(num_cpus=num_cpus, include_dashboard=False, **quiet)
            except ValueError:  # Ray refuses num_cpus for a running cluster
                ray.init(**quiet)
    except Exception as error:  # Ray raises many types, even Exception itself
        reason = textwrap.shorten(str(error) or repr(error), _MAX_REASON_CHARACTERS)
        if address not in ("", "local") or isinstance(error, ConnectionError):
            raise ConfigError(
                f"cannot join the Ray cluster {address or 'of this machine'} ({reason}): start it, "
                f"correct {_ADDRESS}, or unset it to start Ray on this machine"
            ) from error
        raise ConfigError(f"cannot start Ray on this machine: {_advice(reason)}") from error
    return True


def check_cluster_address(address: str) -> None:
    """Refuse an address of a cluster at which nothing listens; Ray itself tries for minutes.

    Raises:
        ConfigError: the address has another form, or does not answer.
    """
    if address in ("", "local", "auto"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and host and port.isdecimal() and "/" not in host):
        raise ConfigError(
            f"{_ADDRESS}={address!r:.80} is no address of a Ray cluster, such as 10.0.0.1:6379 or "
            "auto: correct it, or unset it to start Ray on this machine"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot join the Ray cluster: nothing answers at {_ADDRESS}={address} ({error}); "
            "start it with ray start --head, correct the address, or unset it to start Ray on this "
            "machine"
        ) from None


def _advice(reason: str) -> str:
    """Return a reason of Ray not to start, with advice."""
    if "timed out" in reason:
        return (
            f"it did not answer in time ({reason}): the machine may be busy or short of memory; "
            "end other programs and try again"
        )
    if "AF_UNIX" in reason or "path" in reason.lower() or "directory" in reason.lower():
        return f"its folder cannot be used ({reason}): set RAY_TMPDIR to a short writable path"
    return f"{reason}; end other Ray processes with ray stop, and try again"


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
