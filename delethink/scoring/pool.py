"""Computes rewards in worker processes that can be killed.

A verifier may stall for ever inside one call of C, where no signal handler and no thread can stop
it, and it may take all memory. So each call has a hard limit of time and of memory, beyond which
its whole process group is killed and replaced; the call then has a verdict with the reason, and the
other calls go on. Nothing survives the process that owns the pool: the kernel ends a worker with
the thread that started it, and a worker ends when its pipe does.
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
from delethink.scoring.lockdown import LIBRARY
from delethink.scoring.reward import is_importable
from delethink.scoring.worker import HEADER

Status = Literal["ok", "timeout", "memory", "error"]

_SLICE = 0.05  # seconds between two looks at the memory of a worker at work
_SMALL = 16_384  # bytes of a call that surely fit into a pipe while the worker is busy
_IN_FLIGHT = 4  # calls given to a worker ahead, so that it does not wait for the next


class Verdict(NamedTuple):
    """What became of a call."""

    status: Status
    value: float | None = None  # None where the reward does not apply, or was not computed
    reason: str | None = None  # of any status but ok


_CLOSED = Verdict("error", None, "the pool of verifiers was closed")


@dataclass(frozen=True)
class VerifierSettings:
    """How many verifiers run at a time, and how far each may go.

    Args:
        num_workers: processes; by default one for each core, at most eight.
        timeout: seconds of one call; a call that is not over then is killed.
        memory_mb: megabytes that one call may take.
        start_timeout: seconds to load a reward's libraries in a new worker.
    """

    num_workers: int | None = None
    timeout: float = 10.0
    memory_mb: int = 2048
    start_timeout: float = 120.0

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 1:
            raise ConfigError(f"num_workers must be at least 1, got {self.num_workers}")
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
    """Worker processes that compute rewards; started when the first call comes.

    ``counts`` has the number of calls by status. Safe to use from any thread, and from asyncio
    through ``asyncio.wrap_future``.
    """

    def __init__(self, settings: VerifierSettings = VerifierSettings()) -> None:
        self.settings = settings
        self.num_workers = settings.num_workers or min(8, len(_cores()))
        self.counts: Counter[Status] = Counter()
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._owners: list[_Owner] = []
        self._lock = threading.Lock()
        self._waiting = 0  # calls without a verdict
        self._closed = False
        self._process = os.getpid()

    def submit(self, function: Callable[..., Any], kwargs: Mapping[str, Any]) -> Future[Verdict]:
        """Has ``function(**kwargs)`` computed. The future never raises what the function raised.

        Raises:
            ConfigError: a worker could not import the function, or the pool is closed.
        """
        if not is_importable(function):
            raise ConfigError(
                f"the reward {getattr(function, '__qualname__', function)!r} cannot be imported by "
                "a worker process: define it with def at the top level of a module, or set "
                "isolated: false to run it without limits in this process"
            )
        try:
            payload = pickle.dumps((function.__module__, function.__qualname__, dict(kwargs)))
        except Exception as error:  # whatever the values raise when pickled
            raise ConfigError(f"the arguments of a reward cannot be pickled: {error}") from None
        call = _Call(f"{function.__module__}:{function.__qualname__}", payload)
        with self._lock:
            if self._closed:
                raise ConfigError("the pool of verifiers is closed")
            if self._process != os.getpid():
                raise ConfigError(
                    "this process was forked from the one that owns the pool of verifiers; "
                    "make a pool of its own"
                )
            self._waiting += 1
            if len(self._owners) < min(self.num_workers, self._waiting):
                self._owners.append(_Owner(self))
        call.future.add_done_callback(self._count)
        self._calls.put(call)
        return call.future

    def call(self, function: Callable[..., Any], **kwargs: Any) -> Verdict:
        """``submit`` and wait."""
        return self.submit(function, kwargs).result()

    def worker_ids(self) -> list[int]:
        """Process ids of the workers that are alive."""
        return [owner.worker.pid for owner in list(self._owners) if owner.worker is not None]

    def close(self) -> None:
        """Kills the workers; calls without a verdict get an error."""
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
        while True:
            with suppress(queue.Empty):
                if (call := self._calls.get_nowait()) is not None:
                    _settle(call, _CLOSED)
                continue
            return

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
    with suppress(Exception):  # it was cancelled meanwhile
        call.future.set_result(verdict)


class _Owner(threading.Thread):
    """The thread of one worker: starts it, feeds it, waits for it, kills it.

    It lives as long as the pool, because the kernel ends a worker with the thread that started it.
    """

    def __init__(self, pool: VerifierPool) -> None:
        super().__init__(name="delethink-verifier", daemon=True)
        self._pool = pool
        self._ended = False
        self._given: deque[_Call] = deque()  # to the worker, in order; the first is being computed
        self._held: _Call | None = None  # too large to be given ahead
        self.worker: _Worker | None = None
        self.start()

    def run(self) -> None:
        while self._feed():
            if self._given:
                self._wait_for_first()
        if self.worker is not None:
            self.worker.discard()
        for call in [*self._given, *([self._held] if self._held else [])]:
            _settle(call, _CLOSED)

    def end(self) -> None:
        """Asks the thread to end, from another one."""
        self._ended = True
        if self.worker is not None:
            self.worker.kill()

    def _feed(self) -> bool:
        """Gives the worker calls ahead; waits for one where it has none. False at the end."""
        while not self._ended and len(self._given) < self._most_given():
            call, self._held = self._held, None
            try:
                call = call or self._pool._calls.get(block=not self._given)
            except queue.Empty:
                return True
            if call is None:
                self._ended = True
            elif self._given and len(call.payload) > _SMALL:
                self._held = call
                return True
            elif not call.future.cancelled():
                self._give(call)
        return not self._ended

    def _most_given(self) -> int:
        """Few where few are waiting, so that no worker sits idle behind a slow call of another."""
        waiting = self._pool._calls.qsize()
        return min(_IN_FLIGHT, 1 + waiting // self._pool.num_workers)

    def _give(self, call: _Call) -> None:
        if self._ended:
            _settle(call, _CLOSED)
            return
        self._given.append(call)
        try:
            if self.worker is None:
                self.worker = _Worker(self._pool.settings)
            self.worker.send(call.payload)
        except OSError as error:
            if self.worker is None:  # it could not be started
                self._given.remove(call)
                _settle(call, Verdict("error", None, f"no verifier could be started: {error}"))
            # Else it has died: waiting for the first call says of what.

    def _wait_for_first(self) -> None:
        call, worker = self._given[0], self.worker
        assert worker is not None
        verdict = worker.wait(call.function)
        self._given.popleft()
        if not worker.is_alive:
            worker.discard()
            self.worker = None
            unfinished, self._given = self._given, deque()
            _settle(call, verdict)
            for other in unfinished:
                self._give(other)
        else:
            _settle(call, verdict)


class _Worker:
    """One process, and the pipes to it."""

    def __init__(self, settings: VerifierSettings) -> None:
        self._settings = settings
        self._memory = settings.memory_mb << 20
        # Address space is promised more freely than memory is taken, so its limit is wider; the
        # memory itself is watched.
        code = (
            f"import sys; sys.path[:] = {_path()!r}; from delethink.scoring.worker import main; "
            f"main({os.getpid()}, {4 * self._memory})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
            env=_environment(),
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._calls, self._answers = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._calls, False)
        self._loaded: set[str] = set()
        self._base = 0  # bytes of memory that the libraries take
        self._read = b""
        self._lock = threading.Lock()
        self.pid = self._process.pid
        self.is_alive = True

    def send(self, payload: bytes) -> None:
        """Writes a call; a worker that does not take it is killed.

        Raises:
            OSError: the worker has died.
        """
        rest = memoryview(HEADER.pack(len(payload)) + payload)
        deadline = time.monotonic() + self._settings.start_timeout + self._settings.timeout
        while rest:
            if not select.select([], [self._calls], [], max(0, deadline - time.monotonic()))[1]:
                self.kill()
                raise BrokenPipeError("the worker did not take a call")
            with suppress(BlockingIOError):
                rest = rest[os.write(self._calls, rest) :]

    def wait(self, function: str) -> Verdict:
        """The verdict of the oldest call without one, within the limits."""
        limit, what = self._settings.timeout, "computing the reward"
        if function not in self._loaded:
            limit, what = self._settings.start_timeout, "loading the reward's libraries"
        deadline = time.monotonic() + limit
        while True:
            line = self._line(min(deadline, time.monotonic() + _SLICE))
            if line is None:
                if not self.is_alive:
                    return self._cause_of_death()
                if self._resident() > self._base + self._memory:
                    self.is_alive = False
                    reason = f"took more than {self._settings.memory_mb} MB of memory"
                    return Verdict("memory", None, reason)
                if time.monotonic() >= deadline:
                    self.is_alive = False
                    return Verdict("timeout", None, f"{what} took more than {limit:g} s")
                continue
            answer = json.loads(line)
            if "loaded" in answer:
                self._loaded.add(function)
                self._base = self._resident()
                limit, what = self._settings.timeout, "computing the reward"
                deadline = time.monotonic() + limit
            elif "memory" in answer:
                self.is_alive = False
                reason = f"asked for more than {4 * self._settings.memory_mb} MB of memory at once"
                return Verdict("memory", None, reason)
            elif "error" in answer:
                return Verdict("error", None, answer["error"])
            else:
                self._loaded.add(function)
                return Verdict("ok", answer["value"])

    def _line(self, deadline: float) -> bytes | None:
        """The next line, or None where there is none in time or the worker has ended."""
        while b"\n" not in self._read:
            wait = max(0, deadline - time.monotonic())
            if not select.select([self._answers], [], [], wait)[0]:
                return None
            got = os.read(self._answers, 65_536)
            if not got:
                self.is_alive = False
                return None
            self._read += got
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _resident(self) -> int:
        try:
            with open(f"/proc/{self.pid}/statm", encoding="ascii") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
        except (OSError, IndexError):  # not Linux, or just ended
            return 0

    def _cause_of_death(self) -> Verdict:
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return Verdict("error", None, "the verifier closed its pipe")
        assert self._process.stderr is not None
        said = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        why = f": {said[-1][:300]}" if said else ""
        return Verdict("error", None, f"the verifier died with {how}{why}")

    def kill(self) -> None:
        """Kills the process group and waits for it; from any thread, more than once."""
        with self._lock:
            self.is_alive = False
            if self._process.returncode is None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)
                self._process.wait()

    def discard(self) -> None:
        """Kills it and closes the pipes; for the thread that reads them."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _path() -> list[str]:
    """Where a worker finds what this process finds, this library first of all."""
    return [*dict.fromkeys([LIBRARY, *(os.path.abspath(path) for path in sys.path)])]


def _environment() -> dict[str, str]:
    """No secrets, and one thread: the pool has a process for each core already."""
    kept = {
        key: os.environ[key] for key in ("LD_LIBRARY_PATH", "LANG", "LC_ALL") if key in os.environ
    }
    return kept | {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


_shared: VerifierPool | None = None
_shared_lock = threading.Lock()


def shared_pool() -> VerifierPool:
    """The pool of this process, for rewards that are used without a recipe; made when asked for."""
    global _shared
    with _shared_lock:
        if _shared is None or _shared._closed or _shared._process != os.getpid():
            _shared = VerifierPool()
            atexit.register(_shared.close)
        return _shared
