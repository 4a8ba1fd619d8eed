"""Sandbox for untrusted Python programs, and reduction of the rights of the calling process.

A program runs in its own process group and a private temporary folder, with an empty environment
and limits on CPU time, wall-clock time, memory and file size. The kernel denies the network, new
processes, signals to other processes, and all files but the interpreter's and the program's own.
docs/guide/tasks_and_rewards.md lists the remaining risks. Any function with the signature of
``run_python`` can replace this sandbox.

Four mechanisms of the Linux kernel are used, none of which needs privileges:

- resource limits;
- the end of the process with its parent;
- a seccomp filter against the network, new processes, signals to others and higher limits;
- Landlock, which restricts reading and writing to given folders.

Verifiers use the same mechanisms. ``missing`` reports those the kernel lacks.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Literal

from delethink.errors import ConfigError

LIBRARY = str(Path(__file__).absolute().parents[2])  # import path for another interpreter

_BOOT = """
import sys
sys.path.insert(0, {library!r})
from delethink.scoring import sandbox
sandbox.exit_with_parent({parent})
sandbox.limit_resources({memory}, {cpu}, {file})
sandbox.lock_down(sandbox.python_folders(), [{folder!r}])
for name in [name for name in sys.modules if name.partition(".")[0] == "delethink"]:
    del sys.modules[name]
sys.path[0] = {folder!r}
sys.argv = ["main.py"]
del sandbox, name
with open("main.py", encoding="utf-8") as file:
    source = file.read()
sys.setrecursionlimit(100_000)
sys.tracebacklimit = 100  # Python 3.13 takes ten seconds to print a deeper recursion
exec(compile(source, "main.py", "exec"), {{"__name__": "__main__", "__builtins__": __builtins__}})
"""


@dataclass(frozen=True)
class SandboxLimits:
    """Limits of a program."""

    seconds: float = 10.0  # wall-clock time; also CPU time, rounded up
    memory_mb: int = 1024  # address space
    file_mb: int = 16  # size of each written file, standard output included


@dataclass(frozen=True)
class SandboxResult:
    """Result of a program."""

    status: Literal["ended", "timeout"]
    exit_code: int  # negative for a signal
    stdout: str
    stderr: str


Sandbox = Callable[[str, str, SandboxLimits], SandboxResult]


def check_sandbox() -> None:
    """Check that the kernel can isolate code.

    Raises:
        ConfigError: the kernel lacks seccomp or Landlock.
    """
    if lacks := missing():
        raise ConfigError(
            f"this machine cannot keep code from {' and '.join(lacks)}: the code reward needs "
            "Linux 5.13 or newer on x86-64 or arm64; on other machines, set args.sandbox to a "
            "sandbox of your own"
        )


def run_python(code: str, stdin: str, limits: SandboxLimits) -> SandboxResult:
    """Run ``code`` with the text ``stdin`` on standard input, within the limits.

    Raises:
        ConfigError: this machine cannot isolate code.
        OSError: the process or the temporary folder cannot be created.
    """
    check_sandbox()
    with (
        tempfile.TemporaryDirectory(prefix="delethink-code-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        Path(folder, "main.py").write_text(code, encoding="utf-8", errors="replace")
        given.write(stdin.encode(errors="replace"))
        given.seek(0)
        boot = _BOOT.format(
            library=LIBRARY,
            parent=os.getpid(),
            memory=limits.memory_mb << 20,
            cpu=int(limits.seconds) + 1,
            file=limits.file_mb << 20,
            folder=os.path.realpath(folder),
        )
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", boot],
            stdin=given,
            stdout=out,
            stderr=err,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        status: Literal["ended", "timeout"] = "timeout"
        try:
            if process.wait(limits.seconds) != -signal.SIGXCPU:
                status = "ended"
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return SandboxResult(status, process.returncode, _read(out, limits), _read(err, limits))


def _read(file: IO[bytes], limits: SandboxLimits) -> str:
    file.seek(0)
    return file.read(limits.file_mb << 20).decode(errors="replace")


_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # equal on all architectures
_CLONE_THREAD = 0x10000
_JUMP, _JUMP_IF_AT_LEAST, _JUMP_IF_ANY_BIT, _RETURN = 0x05, 0x35, 0x45, 0x06  # classic BPF

# System calls (linux/arch/*/entry/syscalls) refused with any arguments: (x86-64, arm64).
_REFUSED = {
    "socket": (41, 198),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "fork": (57, None),
    "vfork": (58, None),
    "ptrace": (101, 117),
    "setpgid": (109, 154),
    "setsid": (112, 157),
    "rt_sigqueueinfo": (129, 138),
    "setpriority": (141, 140),
    "sched_setscheduler": (144, 119),
    "setrlimit": (160, 164),
    "tkill": (200, 130),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "rt_tgsigqueueinfo": (297, 240),
    "perf_event_open": (298, 241),
    "open_by_handle_at": (304, 265),
    "setns": (308, 268),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "memfd_create": (319, 279),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "pidfd_send_signal": (424, 424),
    "io_uring_setup": (425, 425),  # a ring opens sockets without a system call
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
}
_OTHER_CALLS = {
    "capset": (126, 91),
    "clone": (56, 220),
    "clone3": (435, 435),
    "kill": (62, 129),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "seccomp": (317, 277),
    "tgkill": (234, 131),
}
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # in the order of the numbers above


def exit_with_parent(parent: int) -> None:
    """Make the kernel kill this process when the parent thread ends."""
    if sys.platform != "linux":
        return
    _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(1)


def limit_resources(memory: int | None, cpu_seconds: int | None, file_bytes: int) -> None:
    """Set resource limits and disable core dumps. ``None`` leaves a limit unchanged.

    Args:
        memory: bytes of address space.
        cpu_seconds: seconds of CPU time.
        file_bytes: bytes of each written file.
    """
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE if hasattr(resource, "RLIMIT_MSGQUEUE") else None, 0),
    ):
        if limit is None or value is None:
            continue
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def lock_down(readable: Iterable[str], writable: Iterable[str] = ()) -> None:
    """Deny other folders, the network, new processes and signals to others, from now on.

    Mechanisms missing in the kernel are skipped; call ``missing`` first.

    Args:
        readable: files and folders to read.
        writable: folders to read and write.
    """
    if sys.platform != "linux" or _libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return
    if not _lacks_landlock():
        _restrict_files(readable, writable)
    if platform.machine() in _ARCHITECTURES:
        numbers = _call_numbers(_OTHER_CALLS)
        header = struct.pack("=Ii", 0x20080522, 0)
        _libc().syscall(numbers["capset"], header, bytes(24))  # no capabilities, also for root
        program = _filter_program(os.getpid())
        compiled = _Program(len(program) // 8, program)
        every_thread = 1
        if _libc().syscall(numbers["seccomp"], 1, every_thread, ctypes.byref(compiled)):
            raise OSError(ctypes.get_errno(), "seccomp")


@cache
def missing() -> tuple[str, ...]:
    """Return restrictions missing on this machine: ``"network and processes"``, ``"files"``."""
    if sys.platform != "linux":
        return ("network and processes", "files")
    # A kernel with filters rejects the address of this null program.
    _libc().prctl(_PR_SET_SECCOMP, 2, None, 0, 0)
    has_seccomp = ctypes.get_errno() in (errno.EFAULT, errno.EACCES)
    lacks = ["files"] if _lacks_landlock() else []
    if not has_seccomp or platform.machine() not in _ARCHITECTURES:
        lacks.insert(0, "network and processes")
    return tuple(lacks)


def python_folders(path: Iterable[str] = ()) -> list[str]:
    """Return the files and folders needed by an interpreter, and ``path``."""
    own = [*path, sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(sys.executable)]
    system = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"]
    system += ["/dev/null", "/dev/urandom"]
    found = {os.path.realpath(name) for name in own + system if name and os.path.exists(name)}
    return sorted(found - {"/"})


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _lacks_landlock() -> bool:
    return int(_libc().syscall(_LANDLOCK_CREATE, None, 0, 1)) < 1


def _restrict_files(readable: Iterable[str], writable: Iterable[str]) -> None:
    libc = _libc()
    abi = int(libc.syscall(_LANDLOCK_CREATE, None, 0, 1))
    rights = (1 << 13) - 1  # ABI 1: execute, write, read, list, remove, create
    rights |= (1 << 13 if abi >= 2 else 0) | (1 << 14 if abi >= 3 else 0)  # refer, truncate
    rights |= 1 << 15 if abi >= 5 else 0  # ioctl on devices
    attribute = struct.pack("=Q", rights)
    ruleset = libc.syscall(_LANDLOCK_CREATE, attribute, len(attribute), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    read = 1 << 0 | 1 << 2 | 1 << 3  # execute, read files, list folders
    of_files = 1 << 0 | 1 << 1 | 1 << 2 | (1 << 14 if abi >= 3 else 0)
    for path in readable:
        with suppress(OSError):  # a path without read permission stays unreadable
            _allow(ruleset, path, read if os.path.isdir(path) else read & of_files)
    for path in writable:
        _allow(ruleset, path, rights)
    if libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", rights, folder)
        if _libc().syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0):
            raise OSError(ctypes.get_errno(), f"landlock_add_rule for {path}")
    finally:
        os.close(folder)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _call_numbers(calls: Mapping[str, tuple[int | None, int | None]]) -> dict[str, int]:
    """Return the numbers of system calls on this machine, without those it lacks."""
    column = list(_ARCHITECTURES).index(platform.machine())
    found = {name: both[column] for name, both in calls.items()}
    return {name: number for name, number in found.items() if number is not None}


def _filter_program(own: int) -> bytes:
    """Return the filter in classic BPF over (number, architecture, arguments)."""
    machine, numbers = platform.machine(), _call_numbers(_OTHER_CALLS)
    refuse, kill = _return_errno(errno.EPERM), _bpf(_RETURN, 0x80000000)
    skip = _bpf(_JUMP, 1)
    lines = [_load(4), _unless_equal(_ARCHITECTURES[machine], 1), skip, kill, _load(0)]
    if machine == "x86_64":  # x32 numbers alias the same calls
        lines += [_bpf(_JUMP_IF_AT_LEAST, 0x40000000, 0, 1), kill]
    for number in sorted(_call_numbers(_REFUSED).values()):
        lines += [_unless_equal(number, 1), refuse]
    # The C library falls back from clone3 to clone.
    lines += [_unless_equal(numbers["clone3"], 1), _return_errno(errno.ENOSYS)]
    is_thread = _bpf(_JUMP_IF_ANY_BIT, _CLONE_THREAD, 1, 0)
    lines += _block(numbers["clone"], [_load(16), is_thread, _return_errno(errno.EAGAIN)])
    for name in ("kill", "tgkill"):
        lines += _block(numbers[name], [_load(16), _unless_equal(own, 1), skip, refuse])
    lines += _block(numbers["prctl"], [_load(16), _unless_equal(_PR_SET_PDEATHSIG, 1), refuse])
    is_null = [
        line for half in (32, 36) for line in (_load(half), _unless_equal(0, 1), skip, refuse)
    ]
    lines += _block(numbers["prlimit64"], is_null)  # reading limits is allowed, setting is not
    return b"".join([*lines, _bpf(_RETURN, 0x7FFF0000)])


def _block(number: int, body: list[bytes]) -> list[bytes]:
    """Return ``body`` for one system call, then a reload of the call number."""
    return [_unless_equal(number, len(body)), *body, _load(0)]


def _bpf(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    """Return an instruction. A conditional jump skips ``then`` or ``otherwise`` instructions."""
    return struct.pack("=HBBI", code, then, otherwise, value)


def _load(offset: int) -> bytes:
    return _bpf(0x20, offset)


def _unless_equal(value: int, skip: int) -> bytes:
    """Skip ``skip`` instructions unless equal."""
    return _bpf(0x15, value, 0, skip)


def _return_errno(error: int) -> bytes:
    return _bpf(_RETURN, 0x00050000 | error)
