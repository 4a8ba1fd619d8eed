"""Pool of processes for computing rewards within hard limits of time and memory.

A verifier may stall inside a C function, where no signal handler and no thread can stop it, and may
use up all memory. Beyond its limits, the process group of a call is killed and replaced. The call
then gets a verdict with the reason, and other calls continue. No process outlives the owner of the
pool: the kernel kills a verifier with the thread of its start, and verifiers stop when their pipe
closes.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from delethink.errors import ConfigError
from delethink.scoring.reward import is_importable
from delethink.scoring.sandbox import LIBRARY
from delethink.scoring.verifier import HEADER

VerdictStatus = Literal["ok", "timeout", "memory", "error"]

_MEMORY_CHECK_INTERVAL_S = 0.05
_MAX_PREFETCHED_BYTES = 16_384  # a call of this size fits into the pipe of a busy verifier
_MAX_IN_FLIGHT = 4  # calls sent in advance, to save waiting


class Verdict(NamedTuple):
    """Result of a call."""

    status: VerdictStatus
    value: float | None = None  # None: the reward does not apply, or failed
    reason: str | None = None  # None for the status ok


_CLOSED = Verdict("error", None, "the pool of verifiers was closed")


@dataclass(frozen=True)
class VerifierSettings:
    """Number of verifiers and limits of each call.

    Args:
        num_verifiers: number of processes; by default one per core, at most eight.
        timeout: seconds per call.
        memory_mb: megabytes per call.
        start_timeout: seconds for loading the libraries of a reward in a new process.
    """

    num_verifiers: int | None = None
    timeout: float = 10.0
    memory_mb: int = 2048
    start_timeout: float = 120.0

    def __post_init__(self) -> None:
        if self.num_verifiers is not None and self.num_verifiers < 1:
            raise ConfigError(f"num_verifiers must be at least 1, got {self.num_verifiers}")
        if not (self.timeout > 0 and self.start_timeout > 0 and self.memory_mb >= 64):
            raise ConfigError(
                "timeout and start_timeout must be positive and memory_mb at least 64, got "
                f"{self.timeout}, {self.start_timeout} and {self.memory_mb}"
            )


@dataclass
class _Call:
    function: str
    payload: bytes
    future: Future[Verdict] = field(default_factory=Future)


class VerifierPool:
    """Verifier processes, started by the first call.

    The pool is thread-safe. In asyncio, use ``asyncio.wrap_future``.

    Attributes:
        counts: number of calls by status.
    """

    def __init__(self, settings: VerifierSettings = VerifierSettings()) -> None:
        self.settings = settings
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        self.num_verifiers = settings.num_verifiers or min(8, cores)
        self.counts: Counter[VerdictStatus] = Counter()
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._owners: list[_Owner] = []
        self._lock = threading.Lock()
        self._waiting = 0  # calls without a verdict
        self._closed = False
        self._process = os.getpid()

    def submit(self, function: Callable[..., Any], kwargs: Mapping[str, Any]) -> Future[Verdict]:
        """Compute ``function(**kwargs)``. Exceptions become a verdict of the future.

        Raises:
            ConfigError: a verifier cannot import the function, or the pool is closed.
        """
        if not is_importable(function):
            raise ConfigError(
                f"the reward {getattr(function, '__qualname__', function)!r} cannot be imported by "
                "a verifier process: define it with def at the top level of a module, or set "
                "isolated: false to run it without limits in this process"
            )
        try:
            payload = pickle.dumps((function.__module__, function.__qualname__, dict(kwargs)))
        except Exception as error:  # pickling may raise anything
            raise ConfigError(f"the arguments of a reward cannot be pickled: {error}") from None
        call = _Call(f"{function.__module__}:{function.__qualname__}", payload)
        with self._lock:
            if self._closed:
                raise ConfigError("the pool of verifiers is closed; create a new one")
            if self._process != os.getpid():
                raise ConfigError(
                    "this process was forked from the owner of the pool of verifiers; create a "
                    "new pool"
                )
            self._waiting += 1
            if len(self._owners) < min(self.num_verifiers, self._waiting):
                self._owners.append(_Owner(self))
        call.future.add_done_callback(self._count)
        self._calls.put(call)
        return call.future

    def call(self, function: Callable[..., Any], **kwargs: Any) -> Verdict:
        """Call ``submit`` and wait for the verdict."""
        return self.submit(function, kwargs).result()

    def verifier_ids(self) -> list[int]:
        """Return the process ids of the running verifiers."""
        verifiers = [owner.verifier for owner in list(self._owners)]
        return [verifier.pid for verifier in verifiers if verifier is not None]

    def close(self) -> None:
        """Kill the verifiers. Calls without a verdict get an error."""
        with self._lock:
            if self._closed or self._process != os.getpid():
                return
            self._closed = True
        for owner in self._owners:
            owner.end()
        for _ in self._owners:
            self._calls.put(None)
        for owner in self._owners:
            owner.join(5)
        with suppress(queue.Empty):
            while True:
                if (call := self._calls.get_nowait()) is not None:
                    _settle(call, _CLOSED)

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _count(self, future: Future[Verdict]) -> None:
        with self._lock:
            self._waiting -= 1
            if not future.cancelled():
                self.counts[future.result().status] += 1


def _settle(call: _Call, verdict: Verdict) -> None:
    with suppress(Exception):  # the future may be cancelled
        call.future.set_result(verdict)


class _Owner(threading.Thread):
    """Thread of one verifier: starts it, sends calls, waits for answers, kills it.

    The thread lives as long as the pool, because the kernel kills a process with the thread of its
    start.
    """

    def __init__(self, pool: VerifierPool) -> None:
        super().__init__(name="delethink-verifier", daemon=True)
        self._pool = pool
        self._ended = False
        self._sent: deque[_Call] = deque()  # in order; the verifier computes the first one
        self._next: _Call | None = None  # too large to send in advance
        self.verifier: _Verifier | None = None
        self.start()

    def run(self) -> None:
        while self._send_calls():
            if self._sent:
                self._wait_for_first()
        if self.verifier is not None:
            self.verifier.discard()
        for call in [*self._sent, *([self._next] if self._next else [])]:
            _settle(call, _CLOSED)

    def end(self) -> None:
        """Request the end of the thread, from another thread."""
        self._ended = True
        if self.verifier is not None:
            self.verifier.kill()

    def _send_calls(self) -> bool:
        """Send calls in advance; wait for one if none was sent. Return False at the end."""
        while not self._ended and len(self._sent) < self._max_sent():
            call, self._next = self._next, None
            try:
                call = call or self._pool._calls.get(block=not self._sent)
            except queue.Empty:
                return True
            if call is None:
                self._ended = True
            elif self._sent and len(call.payload) > _MAX_PREFETCHED_BYTES:
                self._next = call
                return True
            elif not call.future.cancelled():
                self._send(call)
        return not self._ended

    def _max_sent(self) -> int:
        """Return a small number for a short queue, so that no call waits while others are idle."""
        waiting = self._pool._calls.qsize()
        return min(_MAX_IN_FLIGHT, 1 + waiting // self._pool.num_verifiers)

    def _send(self, call: _Call) -> None:
        if self._ended:
            _settle(call, _CLOSED)
            return
        self._sent.append(call)
        try:
            if self.verifier is None:
                self.verifier = _Verifier(self._pool.settings)
            self.verifier.send(call.payload)
        except OSError as error:
            if self.verifier is None:
                self._sent.remove(call)
                _settle(call, Verdict("error", None, f"cannot start a verifier: {error}"))
            # The death of a started verifier is reported for its first call.

    def _wait_for_first(self) -> None:
        call, verifier = self._sent[0], self.verifier
        assert verifier is not None
        verdict = verifier.wait(call.function)
        self._sent.popleft()
        if not verifier.is_alive:
            verifier.discard()
            self.verifier = None
            unfinished, self._sent = self._sent, deque()
            _settle(call, verdict)
            for other in unfinished:
                self._send(other)
        else:
            _settle(call, verdict)


class _Verifier:
    """One process and its pipes."""

    def __init__(self, settings: VerifierSettings) -> None:
        self._settings = settings
        self._memory = settings.memory_mb << 20
        path = list(dict.fromkeys([LIBRARY, *map(os.path.abspath, sys.path)]))
        # Libraries reserve more address space than they use, so its limit is wider. The pool checks
        # the memory in use.
        code = (
            f"import sys; sys.path[:] = {path!r}; "
            "from delethink.scoring.verifier import run_verifier; "
            f"run_verifier({os.getpid()}, {4 * self._memory})"
        )
        # No secrets, and one thread per process.
        kept = ("LD_LIBRARY_PATH", "LANG", "LC_ALL")
        environment = {key: os.environ[key] for key in kept if key in os.environ}
        environment |= {
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
            env=environment,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._calls, self._answers = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._calls, False)
        self._loaded: set[str] = set()
        self._base = 0  # bytes of memory used by the libraries
        self._buffer = b""
        self._lock = threading.Lock()
        self.pid = self._process.pid
        self.is_alive = True

    def send(self, payload: bytes) -> None:
        """Send a call. A verifier not reading in time is killed.

        Raises:
            OSError: the verifier has died.
        """
        rest = memoryview(HEADER.pack(len(payload)) + payload)
        deadline = time.monotonic() + self._settings.start_timeout + self._settings.timeout
        while rest:
            if not select.select([], [self._calls], [], max(0, deadline - time.monotonic()))[1]:
                self.kill()
                raise BrokenPipeError("the verifier did not read a call")
            with suppress(BlockingIOError):
                rest = rest[os.write(self._calls, rest) :]

    def wait(self, function: str) -> Verdict:
        """Return the verdict of the oldest call, within the limits."""
        computing = self._settings.timeout, "computing the reward"
        loading = self._settings.start_timeout, "loading the reward's libraries"
        limit, what = computing if function in self._loaded else loading
        deadline = time.monotonic() + limit
        megabytes = self._settings.memory_mb
        while True:
            line = self._line(min(deadline, time.monotonic() + _MEMORY_CHECK_INTERVAL_S))
            if line is None:
                if not self.is_alive:
                    return self._cause_of_death()
                if self._resident() > self._base + self._memory:
                    return self._end("memory", f"used more than {megabytes} MB of memory")
                if time.monotonic() >= deadline:
                    return self._end("timeout", f"{what} took more than {limit:g} s")
                continue
            answer = json.loads(line)
            if "loaded" in answer:
                self._loaded.add(function)
                self._base = self._resident()
                limit, what = computing
                deadline = time.monotonic() + limit
            elif "memory" in answer:
                return self._end(
                    "memory", f"allocated more than {4 * megabytes} MB of memory at once"
                )
            elif "error" in answer:
                return Verdict("error", None, answer["error"])
            else:
                self._loaded.add(function)
                return Verdict("ok", answer["value"])

    def _end(self, status: VerdictStatus, reason: str) -> Verdict:
        self.is_alive = False
        return Verdict(status, None, reason)

    def _line(self, deadline: float) -> bytes | None:
        """Return the next line; ``None`` after the deadline or the end of the process."""
        while b"\n" not in self._buffer:
            wait = max(0, deadline - time.monotonic())
            if not select.select([self._answers], [], [], wait)[0]:
                return None
            data = os.read(self._answers, 65_536)
            if not data:
                self.is_alive = False
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _resident(self) -> int:
        try:
            with open(f"/proc/{self.pid}/statm", encoding="ascii") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
        except (OSError, IndexError):  # not Linux, or the process has ended
            return 0

    def _cause_of_death(self) -> Verdict:
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return Verdict("error", None, "the verifier closed its pipe")
        assert self._process.stderr is not None
        lines = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        why = f": {lines[-1][:300]}" if lines else ""
        return Verdict("error", None, f"the verifier died with {how}{why}")

    def kill(self) -> None:
        """Kill the process group and wait for its end. Any thread may call this repeatedly."""
        with self._lock:
            self.is_alive = False
            if self._process.returncode is None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)
                self._process.wait()

    def discard(self) -> None:
        """Kill the process and close the pipes. Only the reading thread may call this."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()


_shared: VerifierPool | None = None
_shared_lock = threading.Lock()


def shared_pool() -> VerifierPool:
    """Return the pool of this process, for rewards used without a recipe."""
    global _shared
    with _shared_lock:
        if _shared is None or _shared._closed or _shared._process != os.getpid():
            _shared = VerifierPool()
            atexit.register(_shared.close)
        return _shared
