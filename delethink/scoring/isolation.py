"""Isolation of processes that evaluate model output: bubblewrap and sandlock.

``sandlock`` confines one process with Landlock, seccomp and a supervisor in the parent process. It
works without privileges, as root, and in containers without user namespaces. ``bubblewrap`` adds
namespaces around the verifier host: own file system, process table, network and users. The
strongest isolation of the machine is used.

docs/guide/isolation.md is the threat model: it lists what each isolation protects.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from delethink.errors import ConfigError

Isolation = Literal["bubblewrap", "sandlock", "none"]

LIBRARY = str(Path(__file__).absolute().parents[2])  # import path for another interpreter
ADVICE = (
    "install sandlock (pip install sandlock; Linux 6.12 or newer) or bubblewrap (apt install "
    "bubblewrap; it needs user namespaces), or set scoring.allow_unsafe_code: true "
    "(--allow-unsafe-code) to run the code of the model with the rights of your user"
)
_PROBE_TIMEOUT_S = 20.0
_SCRATCH_BYTES = 256 << 20  # of the file system in memory, inside bubblewrap
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP = 1, 24
_NUM_CAPABILITIES = 64

# sandlock refuses system calls that load code into the kernel, trace, mount or unshare. Landlock
# restricts the contents of files, signals and connections. The following calls change the
# attributes of files or processes out of Landlock's reach, or leave something behind.
_REFUSED_CALLS = (
    # attributes of files
    *("chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat"),
    *("utime", "utimes", "utimensat", "futimesat", "mknod", "mknodat"),
    *("setxattr", "lsetxattr", "fsetxattr", "setxattrat"),
    *("removexattr", "lremovexattr", "fremovexattr", "removexattrat", "file_setattr"),
    # limits, priorities and memory of other processes
    *("setpriority", "sched_setaffinity", "sched_setscheduler", "sched_setparam"),
    *("sched_setattr", "ioprio_set", "prlimit64", "setrlimit", "process_madvise"),
    *("migrate_pages", "move_pages", "pidfd_open", "pidfd_getfd", "pidfd_send_signal"),
    *("process_mrelease", "set_mempolicy_home_node", "quotactl", "quotactl_fd"),
    # objects of the kernel without a process or a path
    *("memfd_create", "memfd_secret", "mq_open", "mq_unlink", "inotify_init", "inotify_init1"),
    *("fanotify_init", "listen", "accept", "accept4"),
    # the machine
    *("settimeofday", "clock_settime", "clock_adjtime", "adjtimex", "personality", "syslog"),
    *("vhangup", "seccomp"),
)


class IsolatedProcess(Protocol):
    """Process with pipes, started by ``start_process``."""

    pid: int
    stdin: BinaryIO
    stdout: BinaryIO
    stderr: BinaryIO | None

    def end(self) -> int:
        """Kill the process and return its exit code; negative for a signal."""


@cache
def find_isolation() -> Isolation:
    """Return the strongest isolation of this machine. Try each one out, once."""
    if _sandlock_works():
        return "bubblewrap" if _bubblewrap_works() else "sandlock"
    if _has_sandlock() and _bubblewrap_works():
        return "bubblewrap"
    return "none"


def check_isolation(allow_unsafe_code: bool = False) -> None:
    """Check that the machine can isolate code.

    Raises:
        ConfigError: it cannot, and ``allow_unsafe_code`` is not set.
    """
    if not allow_unsafe_code and find_isolation() == "none":
        raise ConfigError(f"this machine has no isolation for the code of a model: {ADVICE}")


def host_command(isolation: Isolation, command: Sequence[str], path: Sequence[str]) -> list[str]:
    """Return ``command`` of the verifier host, inside bubblewrap where that is in force.

    Args:
        isolation: the isolation in force.
        command: program and arguments.
        path: import path of the host, readable inside.
    """
    return [*_bubblewrap(path), *command] if isolation == "bubblewrap" else list(command)


def start_process(
    isolation: Isolation,
    command: Sequence[str],
    folder: str,
    *,
    path: Sequence[str] = (),
    max_processes: int = 1,
    with_stderr: bool = False,
    environment: Mapping[str, str] = {},
) -> IsolatedProcess:
    """Start a process with pipes, isolated from everything but its own folder.

    Args:
        isolation: the isolation in force; ``"none"`` starts an ordinary process.
        command: program and arguments.
        folder: working directory, the only writable one.
        path: import path, readable besides the interpreter.
        max_processes: processes at a time, this one included; threads do not count.
        with_stderr: whether to open a pipe for standard error, else it is discarded.
        environment: further variables.

    Raises:
        OSError: the process cannot be started.
    """
    own = {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
    variables = own | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | dict(environment)
    if isolation == "none":
        return _PlainProcess(command, folder, variables, with_stderr)
    return _ConfinedProcess(
        command,
        with_stderr,
        fs_readable=python_folders(path),
        fs_writable=[folder],
        cwd=folder,
        clean_env=True,
        env=variables,
        max_processes=max_processes,
        extra_deny_syscalls=_REFUSED_CALLS,
        net_deny=["*:*"],  # makes sandlock judge each connection, also those unknown to Landlock
        no_coredump=True,
        allow_degraded=_protections() if isolation == "bubblewrap" else (),
    )


def confine(readable: Sequence[str], writable: Sequence[str] = ()) -> None:
    """Restrict this process to files and signals of its own, if sandlock is there."""
    if sys.platform == "linux" and _has_sandlock():
        import sandlock

        policy = sandlock.Sandbox(
            fs_readable=list(readable),
            fs_writable=list(writable),
            allow_degraded=_protections(),
        )
        with suppress(sandlock.SandlockError):  # the kernel has no Landlock
            sandlock.confine(policy)


def python_folders(path: Sequence[str] = ()) -> list[str]:
    """Return the files and folders needed by an interpreter, and ``path``."""
    own = [*path, sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(sys.executable)]
    system = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"]
    system += ["/dev/null", "/dev/urandom"]
    found = {os.path.realpath(name) for name in own + system if name and os.path.exists(name)}
    return sorted(found - {"/"})


def exit_with_parent(parent: int) -> None:
    """Make the kernel kill this process when the parent thread ends."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(1)


def drop_capabilities() -> None:
    """Leave no capability of root to the programs that this process starts."""
    if sys.platform == "linux" and os.geteuid() == 0:
        libc = ctypes.CDLL(None)
        for number in range(_NUM_CAPABILITIES):
            libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)


class _PlainProcess:
    """Ordinary process, for ``allow_unsafe_code``."""

    def __init__(
        self, command: Sequence[str], folder: str, variables: Mapping[str, str], with_stderr: bool
    ) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if with_stderr else subprocess.DEVNULL,
            cwd=folder,
            env=dict(variables),
            start_new_session=True,
            bufsize=0,
        )
        self.pid = self._process.pid
        self.stdin: Any = self._process.stdin
        self.stdout: Any = self._process.stdout
        self.stderr: Any = self._process.stderr

    def end(self) -> int:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        code = self._process.wait()
        _close(self.stdin, self.stdout, self.stderr)
        return code


class _ConfinedProcess:
    """Process confined by sandlock.

    sandlock's supervisor makes some calls for the process, with the rights of the thread that
    started it. That thread therefore confines itself first. It lives as long as the process, which
    the kernel kills when its parent thread ends.
    """

    def __init__(self, command: Sequence[str], with_stderr: bool, **policy: Any) -> None:
        self._is_started, self._is_over = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        arguments = list(command), with_stderr, policy
        threading.Thread(target=self._supervise, args=arguments, daemon=True).start()
        self._is_started.wait()
        if self._error is not None:
            raise OSError(f"cannot start an isolated process: {self._error}") from None
        self.pid = self._process.pid or 0
        self.stdin: Any = self._process.stdin
        self.stdout: Any = self._process.stdout
        self.stderr: Any = self._process.stderr

    def _supervise(self, command: list[str], with_stderr: bool, policy: dict[str, Any]) -> None:
        try:
            import sandlock
            from sandlock.sandbox import StdioMode

            confine([*policy["fs_readable"], "/proc"], policy["fs_writable"])
            self._process = sandlock.Sandbox(**policy).popen(
                command,
                stdin=StdioMode.PIPED,
                stdout=StdioMode.PIPED,
                stderr=StdioMode.PIPED if with_stderr else StdioMode.NULL,
            )
        except Exception as error:  # raised by the constructor
            self._error = error
        finally:
            self._is_started.set()
        if self._error is None:
            self._is_over.wait()

    def end(self) -> int:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, signal.SIGKILL)  # the group may be another one by now
        with suppress(OSError, RuntimeError):
            self._process.kill()
        try:
            result = self._process.wait(timeout=_PROBE_TIMEOUT_S)
        finally:
            self._is_over.set()
        _close(self.stdin, self.stdout, self.stderr)
        return int(result.exit_code) if int(result.reason or 0) == 0 else -signal.SIGKILL


def _close(*files: Any) -> None:
    for file in files:
        if file is not None:
            with suppress(OSError):  # the reader is gone
                file.close()


def _has_sandlock() -> bool:
    return sys.platform == "linux" and find_spec("sandlock") is not None


def _protections() -> list[int]:
    """Return sandlock's protections, for kernels without some of them."""
    import sandlock

    return list(sandlock.Protection)


def _sandlock_works() -> bool:
    if not _has_sandlock():
        return False
    with tempfile.TemporaryDirectory(prefix="delethink-probe-") as folder:
        try:
            process = start_process(
                "sandlock", [sys.executable, "-I", "-S", "-c", "print(1)"], folder
            )
            printed = process.stdout.read()
            return process.end() in (0, -signal.SIGKILL) and printed == b"1\n"
        except (OSError, ImportError):
            return False


def _bubblewrap_works() -> bool:
    if shutil.which("bwrap") is None:
        return False
    command = [*_bubblewrap(sys.path), sys.executable, "-I", "-S", "-c", "print(1)"]
    try:
        ran = subprocess.run(command, capture_output=True, timeout=_PROBE_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return False
    return ran.returncode == 0 and ran.stdout == b"1\n"


def _bubblewrap(path: Sequence[str]) -> list[str]:
    """Return the arguments of bubblewrap: an empty file system with Python, read-only."""
    arguments = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--die-with-parent"]
    arguments += ["--new-session", "--cap-drop", "ALL", "--proc", "/proc", "--dev", "/dev"]
    arguments += ["--size", str(_SCRATCH_BYTES), "--tmpfs", "/tmp"]
    for name in ("/lib", "/lib64", "/bin"):
        if os.path.islink(name):
            arguments += ["--symlink", os.readlink(name), name]
    for name in python_folders(path):
        if not name.startswith("/dev/") and name != "/tmp":  # the scratch folder is there
            arguments += ["--ro-bind", name, name]
    for name in {*map(os.path.abspath, path), sys.prefix, os.path.dirname(sys.executable)}:
        if os.path.realpath(name) != name and os.path.exists(name):
            arguments += ["--ro-bind", os.path.realpath(name), name]
    return [*arguments, "--remount-ro", "/", "--chdir", "/tmp"]
