"""Pool of verifiers: rewards and programs run in other processes, within limits.

The pool starts one process, the verifier host (``delethink.scoring.host``), which runs the calls in
workers of its own. Every call gets a verdict: a call beyond its limits is ended, and its verdict
has the reason. A host that ends or falls silent is replaced. No process outlives the owner of the
pool: the host ends when its pipe closes, and everything it started ends with it.
"""

from __future__ import annotations

import atexit
import base64
import dataclasses
import itertools
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, get_args

from delethink.errors import ConfigError, MissingExtraError, SandboxError
from delethink.scoring.frames import BrokenChannelError, FrameReader, frame, write_all
from delethink.scoring.host import HEARTBEAT_INTERVAL_S
from delethink.scoring.isolation import LIBRARY, check_isolation, find_isolation, host_command
from delethink.scoring.programs import SandboxLimits, SandboxResult, remove_folder
from delethink.scoring.reward import is_importable, traits_of

VerdictStatus = Literal["ok", "timeout", "memory", "error"]

_SILENCE_TIMEOUT_S = 60 * HEARTBEAT_INTERVAL_S
_MAX_ANSWER_BYTES = 1 << 29
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")  # no secrets


class Verdict(NamedTuple):
    """Result of a call."""

    status: VerdictStatus
    value: float | None = None  # None: the reward does not apply, or failed
    reason: str | None = None  # with the status ok: the failure that the output was scored 0 for


_CLOSED = Verdict("error", None, "the pool of verifiers was closed")


@dataclass(frozen=True)
class VerifierSettings:
    """Number of verifiers and limits of each call.

    Args:
        num_verifiers: number of processes; by default one per core, at most eight.
        timeout: seconds per call.
        memory_mb: megabytes per call.
        start_timeout: seconds for loading the libraries of a reward in a new process.
        allow_unsafe_code: run model output without isolation where the machine has none.
    """

    num_verifiers: int | None = None
    timeout: float = 10.0
    memory_mb: int = 2048
    start_timeout: float = 120.0
    allow_unsafe_code: bool = False

    def __post_init__(self) -> None:
        if self.num_verifiers is not None and self.num_verifiers < 1:
            raise ConfigError(f"num_verifiers must be at least 1, got {self.num_verifiers}")
        if not (self.timeout > 0 and self.start_timeout > 0 and self.memory_mb >= 64):
            raise ConfigError(
                "timeout and start_timeout must be positive and memory_mb at least 64, got "
                f"{self.timeout}, {self.start_timeout} and {self.memory_mb}"
            )


class VerifierPool:
    """Verifiers in other processes, started by the first call.

    The pool is thread-safe. In asyncio, use ``asyncio.wrap_future``.

    Attributes:
        counts: number of calls of rewards by status.
    """

    def __init__(self, settings: VerifierSettings = VerifierSettings()) -> None:
        self.settings = settings
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        self.num_verifiers = settings.num_verifiers or min(8, cores)
        self.counts: Counter[VerdictStatus] = Counter()
        self._lock = threading.Lock()
        self._host: _Host | None = None
        self._closed = False
        self._process = os.getpid()

    def submit(self, function: Callable[..., Any], kwargs: Mapping[str, Any]) -> Future[Verdict]:
        """Compute ``function(**kwargs)``. Exceptions become a verdict of the future.

        Raises:
            ConfigError: a verifier cannot import the function, the machine cannot isolate it, or
                the pool is closed.
            MissingExtraError: ``pebble`` is not installed.
        """
        if not is_importable(function):
            raise ConfigError(
                f"the reward {getattr(function, '__qualname__', function)!r} cannot be imported by "
                "a verifier process: define it with def at the top level of a module, or set "
                "isolated: false to run it without limits in this process"
            )
        kind = "isolated" if traits_of(function).evaluates_output else "text"
        if kind == "isolated":
            check_isolation(self.settings.allow_unsafe_code)
        elif find_spec("pebble") is None:
            raise MissingExtraError("pebble", "scoring")
        try:
            payload = base64.b64encode(pickle.dumps(dict(kwargs))).decode()
        except Exception as error:  # pickling may raise anything
            raise ConfigError(f"the arguments of a reward cannot be pickled: {error}") from None
        name = {"module": function.__module__, "name": function.__qualname__}
        future = self._send({"kind": kind, "kwargs": payload, **name}, _read_verdict, _to_verdict)
        future.add_done_callback(self._count)
        return future

    def call(self, function: Callable[..., Any], **kwargs: Any) -> Verdict:
        """Call ``submit`` and wait for the verdict."""
        return self.submit(function, kwargs).result()

    def run_program(self, code: str, stdin: str, limits: SandboxLimits) -> SandboxResult:
        """Run a Python program inside the isolation, and wait for its result.

        Raises:
            ConfigError: the machine has no isolation, or the pool is closed.
            SandboxError: the process cannot be started.
        """
        check_isolation(self.settings.allow_unsafe_code)
        call = {"kind": "program", "code": code, "stdin": stdin}
        sent = call | {"limits": dataclasses.asdict(limits)}
        found: SandboxResult | SandboxError
        found = self._send(sent, _read_result, lambda reason: SandboxError(reason)).result()
        if isinstance(found, SandboxError):
            raise found
        return found

    def verifier_ids(self) -> list[int]:
        """Return the process id of the verifier host, the parent of verifiers, if it runs."""
        return [self._host.pid] if self._host is not None and self._host.is_alive else []

    def close(self) -> None:
        """End the verifiers. Calls without a verdict get an error."""
        with self._lock:
            if self._closed or self._process != os.getpid():
                return
            self._closed = True
        if self._host is not None:
            self._host.end(str(_CLOSED.reason))

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(
        self,
        call: dict[str, Any],
        read: Callable[[Mapping[str, Any]], Any],
        fail: Callable[[str], Any],
    ) -> Future[Any]:
        with self._lock:
            if self._closed:
                raise ConfigError("the pool of verifiers is closed; create a new one")
            if self._process != os.getpid():
                raise ConfigError(
                    "this process was forked from the owner of the pool of verifiers; create a "
                    "new pool"
                )
            if self._host is None or not self._host.is_alive:
                try:
                    self._host = _Host(self.settings, self.num_verifiers)
                except OSError as error:
                    failed: Future[Any] = Future()
                    failed.set_result(fail(f"cannot start a verifier: {error}"))
                    return failed
            host = self._host
        return host.send(call, read, fail)

    def _count(self, future: Future[Verdict]) -> None:
        if not future.cancelled():
            with self._lock:
                self.counts[future.result().status] += 1


@cache
def _shared_pool(process: int) -> VerifierPool:
    pool = VerifierPool()
    atexit.register(pool.close)
    return pool


def shared_pool() -> VerifierPool:
    """Return the pool of this process for programs without a pool of their own."""
    return _shared_pool(os.getpid())


class _Waiting(NamedTuple):
    future: Future[Any]
    read: Callable[[Mapping[str, Any]], Any]
    fail: Callable[[str], Any]


class _Host:
    """The process of the verifier host, its pipes and the calls without an answer."""

    def __init__(self, settings: VerifierSettings, num_verifiers: int) -> None:
        isolation = find_isolation()
        fields = dataclasses.asdict(settings) | {"num_verifiers": num_verifiers}
        self._folder = ""
        if isolation != "bubblewrap":
            self._folder = tempfile.mkdtemp(prefix="delethink-host-")
        fields |= {"isolation": isolation, "folder": self._folder}
        path = list(dict.fromkeys([LIBRARY, *map(os.path.abspath, sys.path)]))
        code = (
            f"import sys; sys.path[:] = {path!r}; from delethink.scoring.host import run_host; "
            f"run_host({fields!r})"
        )
        kept = {key: os.environ[key] for key in _KEPT_VARIABLES if key in os.environ}
        if isolation == "bubblewrap":
            kept["TMPDIR"] = "/tmp"
        self._process = subprocess.Popen(
            host_command(isolation, [sys.executable, "-I", "-c", code], path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            env={
                "HOME": "/tmp",  # sandlock asks for one
                "PATH": "/usr/bin:/bin",
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                **kept,
            },
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.pid = self._process.pid
        self.is_alive = True
        self._calls = self._process.stdin.fileno()
        self._reader = FrameReader(self._process.stdout.fileno(), _MAX_ANSWER_BYTES)
        self._waiting: dict[int, _Waiting] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # of the calls without an answer
        self._write_lock = threading.Lock()
        self._reason = ""  # of the end
        self._thread = threading.Thread(target=self._read, name="delethink-verifier", daemon=True)
        self._thread.start()

    def send(
        self,
        call: dict[str, Any],
        read: Callable[[Mapping[str, Any]], Any],
        fail: Callable[[str], Any],
    ) -> Future[Any]:
        """Send a call. Its future gets ``read(answer)``, or ``fail(reason)``."""
        waiting = _Waiting(Future(), read, fail)
        with self._lock:
            number = next(self._numbers)
            if self.is_alive:
                self._waiting[number] = waiting
            else:
                _settle(waiting.future, fail(self._reason))
                return waiting.future
        with self._write_lock, suppress(OSError):  # the reading thread sees the end of the host
            write_all(self._calls, frame({"id": number, **call}))
        return waiting.future

    def end(self, reason: str) -> None:
        """Kill the host and everything it started; fail the calls without an answer."""
        with self._lock:
            self.is_alive = False
            self._reason = self._reason or reason
            unfinished, self._waiting = list(self._waiting.values()), {}
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        if self._folder:
            remove_folder(self._folder)
        for waiting in unfinished:
            _settle(waiting.future, waiting.fail(self._reason))
        if threading.current_thread() is not self._thread:
            self._thread.join()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()

    def _read(self) -> None:
        """Settle the futures of answered calls, until the host ends or falls silent."""
        reason = "the verifier host ended"
        try:
            while True:
                answer = self._reader.read(time.monotonic() + _SILENCE_TIMEOUT_S)
                with self._lock:
                    waiting = self._waiting.pop(answer.get("id", -1), None)
                if waiting is not None:
                    _settle(waiting.future, _read(waiting, answer))
        except TimeoutError:
            reason = f"the verifier host was silent for {_SILENCE_TIMEOUT_S:g} s"
        except (BrokenChannelError, OSError, TypeError) as error:
            reason = f"the verifier host ended: {error}"
        finally:
            self.end(reason)


def _settle(future: Future[Any], value: Any) -> None:
    with suppress(Exception):  # the future may be cancelled
        future.set_result(value)


def _read(waiting: _Waiting, answer: Mapping[str, Any]) -> Any:
    try:
        return waiting.read(answer)
    except (LookupError, TypeError, ValueError, OverflowError):
        return waiting.fail("the verifier host gave an answer of another form")


def _to_verdict(reason: str) -> Verdict:
    return Verdict("error", None, reason)


def _read_verdict(answer: Mapping[str, Any]) -> Verdict:
    """Return the verdict in an answer.

    Raises:
        ValueError: it has another form.
    """
    status, value, reason = answer["status"], answer.get("value"), answer.get("reason")
    if status not in get_args(VerdictStatus) or not isinstance(reason, str | None):
        raise ValueError("a verdict of another form")
    return Verdict(status, None if value is None else float(value), reason)


def _read_result(answer: Mapping[str, Any]) -> SandboxResult | SandboxError:
    """Return the result of a program in an answer."""
    if "result" not in answer:
        return SandboxError(str(answer.get("error")))
    return SandboxResult(**answer["result"])
