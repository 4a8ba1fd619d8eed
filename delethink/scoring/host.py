"""Verifier host: one process that runs rewards and programs for ``delethink.scoring.pool``.

The host reads calls on standard input and answers on standard output. It runs no model output
itself:

- a reward that only reads text runs in a worker of a ``pebble`` pool;
- a reward that evaluates model output runs in a fork of a warm process inside the isolation
  (``delethink.scoring.warm``);
- a program runs in an isolated process of its own.

The answers are JSON. Everything from an isolated process is read as hostile: a surprise ends that
process and becomes a verdict.
"""

from __future__ import annotations

import base64
import os
import pickle
import queue
import re
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from delethink.scoring.frames import BrokenChannelError, FrameReader, frame, write_all
from delethink.scoring.isolation import (
    IsolatedProcess,
    Isolation,
    confine,
    drop_capabilities,
    exit_with_parent,
    python_folders,
    start_process,
)
from delethink.scoring.programs import remove_folder, run_program
from delethink.scoring.reasons import describe
from delethink.scoring.warm import (
    MAX_CALL_BYTES,
    call_function,
    is_value,
    load_function,
)

HEARTBEAT_INTERVAL_S = 1.0
_MAX_FILE_BYTES = 1 << 20
_MAX_ANSWER_BYTES = 1 << 20
_NETWORK_ERROR = re.compile(r"Connection|URLError|gaierror|[Nn]etwork|socket")
_NO_NETWORK = (
    "a reward that evaluates output has no network (without the mark evaluates_output it has one)"
)
_GRACE_S = 1.0  # beyond its time limit, for the fork to be ended by the warm process
_MAX_CONTROL_SHARE = 0.25  # of the time limit, for a harmless call on a machine that is not busy
_OUT_OF_MEMORY = 77  # exit code of a worker: the interpreter is unreliable after such an error
_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {}  # inherited by the workers' forks

Key = tuple[str, str]


class Host:
    """Answers the calls of one pool.

    Args:
        settings: the fields of ``delethink.scoring.pool.VerifierSettings``, and ``isolation``.
        calls: pipe to read calls from.
        answers: pipe to write answers to.
    """

    def __init__(self, settings: Mapping[str, Any], calls: int, answers: int) -> None:
        self._settings, self._calls, self._answers = settings, calls, answers
        self._num_verifiers = int(settings["num_verifiers"])
        self._pools: dict[Key, Any] = {}
        self._lock = threading.Lock()
        self._loader = ThreadPoolExecutor(1, "load")
        self._threads = ThreadPoolExecutor(self._num_verifiers, "isolated")
        self._idle: queue.LifoQueue[_WarmProcess] = queue.LifoQueue()

    def run(self) -> None:
        """Answer calls until the pipe ends."""
        threading.Thread(target=self._send_heartbeats, daemon=True).start()
        reader = FrameReader(self._calls, MAX_CALL_BYTES)
        kinds = {
            "text": self._run_text,
            "isolated": self._run_isolated,
            "program": self._run_program,
        }
        while True:
            try:
                call = reader.read()
            except BrokenChannelError:
                return
            kinds[call["kind"]](call)

    def answer(self, call: Mapping[str, Any], **fields: Any) -> None:
        """Answer a call with these fields."""
        self._write({"id": call["id"], **fields})

    def _write(self, message: dict[str, Any]) -> None:
        data = frame(message)
        with self._lock:
            try:
                write_all(self._answers, data)
            except OSError:  # the pool is gone
                end_group()

    def _send_heartbeats(self) -> None:
        parent = os.getppid()
        while os.getppid() == parent:  # a fork of the owner may keep the pipe open
            time.sleep(HEARTBEAT_INTERVAL_S)
            self._write({"heartbeat": True})
        end_group()

    # Rewards that only read text

    def _run_text(self, call: dict[str, Any]) -> None:
        pool = self._pools.get(key_of(call))
        if pool is not None and pool.active:
            self._schedule(pool, call)
        else:
            self._loader.submit(self._load_and_schedule, call)

    def _load_and_schedule(self, call: dict[str, Any]) -> None:
        key = key_of(call)
        pool = self._pools.get(key)
        if pool is None or not pool.active:
            limit = float(self._settings["start_timeout"])
            watchdog = threading.Timer(limit, self._give_up_loading, (call,))
            watchdog.start()
            try:
                _FUNCTIONS[key] = load_function(*key)
                pool = self._pools[key] = self._make_pool()
            except BaseException as error:  # a module may raise anything
                self.answer(call, status="error", reason=describe(error))
                return
            finally:
                watchdog.cancel()
        self._schedule(pool, call)

    def _give_up_loading(self, call: dict[str, Any]) -> None:
        """Answer, and end the host: a thread that imports cannot be stopped."""
        limit = self._settings["start_timeout"]
        reason = f"loading the reward's libraries took more than {limit:g} s"
        self.answer(call, status="timeout", reason=reason)
        end_group()

    def _make_pool(self) -> Any:
        import pebble

        pebble.CONSTS.term_timeout = 0.1  # seconds until a worker is killed
        arguments = (
            os.getpid(),
            int(self._settings["memory_mb"]) << 20,
            self._calls,
            self._answers,
        )
        return pebble.ProcessPool(
            max_workers=self._num_verifiers, initializer=_start_worker, initargs=arguments
        )

    def _schedule(self, pool: Any, call: dict[str, Any]) -> None:
        try:
            future = pool.schedule(
                _run_in_worker,
                (key_of(call), call["kwargs"]),
                timeout=float(self._settings["timeout"]),
            )
        except RuntimeError:  # the pool broke a moment ago
            self._loader.submit(self._load_and_schedule, call)
            return
        future.add_done_callback(lambda done: self._finish_text(call, done))

    def _finish_text(self, call: dict[str, Any], done: Future[Any]) -> None:
        from concurrent.futures.process import BrokenProcessPool

        error = done.exception()
        if error is None:
            status, value, reason = done.result()
            self.answer(call, status=status, value=value, reason=reason)
        elif isinstance(error, BrokenProcessPool) and not call.get("again"):
            call["again"] = True  # another call broke the pool
            self._loader.submit(self._load_and_schedule, call)
        else:
            status, reason = self._explain(error)
            self.answer(call, status=status, reason=reason)

    def _explain(self, error: BaseException) -> tuple[str, str]:
        """Return status and reason of a call whose worker ended."""
        code = getattr(error, "exitcode", None)
        if isinstance(error, TimeoutError) and code is None:
            return "timeout", self._timeout_reason()
        if code == _OUT_OF_MEMORY:
            return "memory", self._memory_reason()
        if code is not None:
            cause = f"signal {-code}" if code < 0 else f"exit code {code}"
            return "error", f"the verifier ended with {cause}"
        return "error", describe(error)

    def _timeout_reason(self) -> str:
        return f"computing the reward took more than {self._settings['timeout']:g} s"

    def _memory_reason(self) -> str:
        return f"used more than {self._settings['memory_mb']} MB of memory"

    # Rewards that evaluate model output

    def _run_isolated(self, call: dict[str, Any]) -> None:
        self._threads.submit(self._answer_isolated, call)

    def _answer_isolated(self, call: dict[str, Any]) -> None:
        try:
            self.answer(call, **self._judge(call))
        except Exception as error:  # no call without an answer
            self.answer(call, status="error", reason=describe(error))

    def _judge(self, call: dict[str, Any]) -> dict[str, Any]:
        """Return the verdict. A failure is 0 if the reward works on a harmless output."""
        found = self._call_warm(call, control=False)
        if "value" in found:
            return {"status": "ok", "value": found["value"]}
        status, reason = self._reason(found)
        if "broken" not in found:
            control = self._call_warm(call, control=True)
            limit = _MAX_CONTROL_SHARE * float(self._settings["timeout"])
            is_slow = float(control.get("seconds", 0.0)) > limit
            if "value" in control and status == "timeout" and is_slow:
                reason = f"{reason}; a harmless output takes long too, so the machine is busy"
            elif "value" in control:
                return {"status": "ok", "value": 0.0, "reason": f"{status}: {reason}"}
            else:
                other = self._reason(control)[1]
                same = "the same on a harmless output"
                reason = (
                    f"{reason}; {same if other == reason else f'on a harmless output: {other}'}"
                )
                if _NETWORK_ERROR.search(reason):
                    reason = f"{_NO_NETWORK}: {reason}"
        return {"status": status, "reason": reason}

    def _reason(self, found: Mapping[str, Any]) -> tuple[str, str]:
        if "timeout" in found:
            return "timeout", self._timeout_reason()
        if "memory" in found:
            return "memory", self._memory_reason()
        return "error", str(found.get("error") or found.get("died") or found.get("broken"))

    def _call_warm(self, call: Mapping[str, Any], control: bool) -> dict[str, Any]:
        """Run a call in a warm process. A process that surprises is ended."""
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            try:
                process = _WarmProcess(self._settings)
            except OSError as error:
                return {"broken": str(error)}
        try:
            answer = process.call(call, control)
        except TimeoutError:
            process.end()
            return {"timeout": True}
        except (BrokenChannelError, OSError) as error:
            process.end()
            return {"died": f"its process ended: {error}"}
        self._idle.put(process)
        return answer

    # Programs

    def _run_program(self, call: dict[str, Any]) -> None:
        self._threads.submit(self._answer_program, call)

    def _answer_program(self, call: dict[str, Any]) -> None:
        isolation: Isolation = self._settings["isolation"]
        try:
            result = run_program(call["code"], call["stdin"], call["limits"], isolation)
            self.answer(call, result=result)
        except Exception as error:  # no call without an answer
            self.answer(call, error=describe(error))


class _WarmProcess:
    """A warm process inside the isolation, for one call at a time."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._folder = tempfile.mkdtemp(prefix="delethink-verifier-")
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from delethink.scoring.warm import serve; "
            "serve()"
        )
        self._process: IsolatedProcess = start_process(
            settings["isolation"],
            [sys.executable, "-I", "-c", code],
            self._folder,
            path=sys.path,
            max_processes=2,  # the process and one fork
        )
        self._reader = FrameReader(self._process.stdout.fileno(), _MAX_ANSWER_BYTES)
        self._loaded: set[Key] = set()
        self._number = 0

    def call(self, call: Mapping[str, Any], control: bool) -> dict[str, Any]:
        """Run a call, within its limits.

        Raises:
            TimeoutError: the process did not answer in time.
            BrokenChannelError: the process ended, or answered something else.
            OSError: the process ended.
        """
        key = key_of(call)
        if key not in self._loaded:
            self._limit_memory(None)
            answer = self._ask(call, float(self._settings["start_timeout"]), load=True)
            if "loaded" not in answer:
                return {"broken": str(answer.get("error"))}
            self._loaded.add(key)
            self._limit_memory(int(self._settings["memory_mb"]) << 20)
        timeout = float(self._settings["timeout"])
        return self._ask(
            call, timeout + _GRACE_S, kwargs=call["kwargs"], timeout=timeout, control=control
        )

    def _ask(self, call: Mapping[str, Any], seconds: float, **fields: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "module": call["module"], "name": call["name"], **fields}
        write_all(self._process.stdin.fileno(), frame(message))
        answer = self._reader.read(time.monotonic() + seconds)
        if answer.pop("id", None) != self._number or not is_value(answer.get("value")):
            raise BrokenChannelError("the answer belongs to no call")
        return answer

    def _limit_memory(self, memory: int | None) -> None:
        """Limit the memory of later forks to that of the loaded libraries and ``memory``."""
        data, space = _memory_of(self._process.pid)
        limits = (
            (resource.RLIM_INFINITY,) * 2 if memory is None else (data + memory, space + 4 * memory)
        )
        with suppress(OSError, AttributeError):  # not Linux
            resource.prlimit(self._process.pid, resource.RLIMIT_DATA, _soft(limits[0]))
            resource.prlimit(self._process.pid, resource.RLIMIT_AS, _soft(limits[1]))

    def end(self) -> None:
        self._process.end()
        remove_folder(self._folder)


def key_of(call: Mapping[str, Any]) -> Key:
    """Return module and name of the function of a call."""
    return call["module"], call["name"]


def run_host(settings: dict[str, Any]) -> None:
    """Run the host on standard input and output until its pool is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer handles Ctrl-C
    calls, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):  # prints of a reward are no answers
        os.dup2(null, number)
    drop_capabilities()
    for limit in (resource.RLIMIT_CORE, getattr(resource, "RLIMIT_MSGQUEUE", resource.RLIMIT_CORE)):
        resource.setrlimit(limit, (0, 0))
    # The pool removes its folder; inside bubblewrap, the folder is in memory.
    tempfile.tempdir = settings["folder"] or tempfile.mkdtemp(prefix="delethink-host-")
    Host(settings, calls, answers).run()
    end_group()  # the pool was killed


def end_group() -> None:
    """End this process and everything it started, and remove its folder."""
    if tempfile.tempdir:
        remove_folder(tempfile.tempdir)
    with suppress(OSError):
        if os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _start_worker(host: int, memory: int, *pipes: int) -> None:
    """Prepare a worker of the pool: limits, and no way to the host's pipes."""
    exit_with_parent(host)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for pipe in pipes:
        os.close(pipe)
    data, space = _memory_of(os.getpid())
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_FILE_BYTES, _MAX_FILE_BYTES))
        resource.setrlimit(resource.RLIMIT_DATA, _soft(data + memory))
        resource.setrlimit(resource.RLIMIT_AS, _soft(space + 4 * memory))
    confine(python_folders(sys.path))


def _run_in_worker(key: Key, kwargs: str) -> tuple[str, float | None, str | None]:
    """Return status, value and reason of a call."""
    try:
        return "ok", call_function(_FUNCTIONS[key], pickle.loads(base64.b64decode(kwargs))), None
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    except BaseException as error:  # math-verify's own timeout is not an Exception
        return "error", None, describe(error)


def _memory_of(pid: int) -> tuple[int, int]:
    """Return the bytes of private data and of address space of a process; 0 if unknown."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return int(found.get("VmData", 0)) << 10, int(found.get("VmSize", 0)) << 10


def _soft(limit: int) -> tuple[int, int]:
    return limit, resource.RLIM_INFINITY
