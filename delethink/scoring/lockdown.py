"""Reduction of the rights of the calling process, for verifiers and untrusted code.

Four mechanisms of the Linux kernel are used, none of which needs privileges:

- resource limits;
- the end of the process with its parent;
- a seccomp filter against the network, new processes, signals to others and higher limits;
- Landlock, which restricts reading and writing to given folders.

``missing`` reports mechanisms the kernel lacks.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

LIBRARY = str(Path(__file__).absolute().parents[2])  # import path for another interpreter

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # equal on all architectures
_CLONE_THREAD = 0x10000

# System calls (linux/arch/*/entry/syscalls) refused with any arguments.
_REFUSED = {
    "x86_64": {
        "socket": 41,
        "shmget": 29,
        "semget": 64,
        "msgget": 68,
        "fork": 57,
        "vfork": 58,
        "ptrace": 101,
        "setpgid": 109,
        "setsid": 112,
        "rt_sigqueueinfo": 129,
        "setpriority": 141,
        "sched_setscheduler": 144,
        "setrlimit": 160,
        "tkill": 200,
        "mq_open": 240,
        "add_key": 248,
        "request_key": 249,
        "keyctl": 250,
        "unshare": 272,
        "rt_tgsigqueueinfo": 297,
        "perf_event_open": 298,
        "open_by_handle_at": 304,
        "setns": 308,
        "process_vm_readv": 310,
        "process_vm_writev": 311,
        "kcmp": 312,
        "memfd_create": 319,
        "bpf": 321,
        "userfaultfd": 323,
    },
    "aarch64": {
        "socket": 198,
        "shmget": 194,
        "semget": 190,
        "msgget": 186,
        "ptrace": 117,
        "setpgid": 154,
        "setsid": 157,
        "rt_sigqueueinfo": 138,
        "setpriority": 140,
        "sched_setscheduler": 119,
        "setrlimit": 164,
        "tkill": 130,
        "mq_open": 180,
        "add_key": 217,
        "request_key": 218,
        "keyctl": 219,
        "unshare": 97,
        "rt_tgsigqueueinfo": 240,
        "perf_event_open": 241,
        "open_by_handle_at": 265,
        "setns": 268,
        "process_vm_readv": 270,
        "process_vm_writev": 271,
        "kcmp": 272,
        "memfd_create": 279,
        "bpf": 280,
        "userfaultfd": 282,
    },
}
_REFUSED_EVERYWHERE = {
    "pidfd_send_signal": 424,
    "io_uring_setup": 425,  # a ring opens sockets without a system call
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "pidfd_open": 434,
    "pidfd_getfd": 438,
}
# System calls refused for certain arguments.
_CHECKED_BY_ARGUMENT = {
    "x86_64": {"clone": 56, "kill": 62, "prctl": 157, "tgkill": 234, "prlimit64": 302},
    "aarch64": {"clone": 220, "kill": 129, "tgkill": 131, "prctl": 167, "prlimit64": 261},
}
_CLONE3 = 435
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_CAPSET = {"x86_64": 126, "aarch64": 91}


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
    if sys.platform != "linux":
        return
    if _libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return
    if not _lacks_landlock():
        _restrict_files(readable, writable)
    _drop_capabilities()
    if platform.machine() in _ARCHITECTURES:
        _filter_system_calls(_program(os.getpid()))


@cache
def missing() -> tuple[str, ...]:
    """Return restrictions missing on this machine: ``"network and processes"``, ``"files"``."""
    lacks = []
    if sys.platform != "linux" or platform.machine() not in _ARCHITECTURES or _lacks_seccomp():
        lacks.append("network and processes")
    if sys.platform != "linux" or _lacks_landlock():
        lacks.append("files")
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


def _lacks_seccomp() -> bool:
    # A kernel with filters rejects the address of this null program.
    _libc().prctl(_PR_SET_SECCOMP, 2, None, 0, 0)
    return ctypes.get_errno() not in (errno.EFAULT, errno.EACCES)


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


def _drop_capabilities() -> None:
    """Drop all capabilities, also of root."""
    number = _CAPSET.get(platform.machine())
    if number is not None:
        header, none = struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", *[0] * 6)
        _libc().syscall(number, header, none)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _filter_system_calls(program: bytes) -> None:
    libc = _libc()
    compiled = _Program(len(program) // 8, program)
    every_thread = 1
    number = _SECCOMP[platform.machine()]
    if libc.syscall(number, 1, every_thread, ctypes.byref(compiled)):
        raise OSError(ctypes.get_errno(), "seccomp")


def _program(own: int) -> bytes:
    """Return the filter in classic BPF over (number, architecture, arguments)."""
    machine = platform.machine()
    numbers = _CHECKED_BY_ARGUMENT[machine]
    refuse, allow = _return_errno(errno.EPERM), _return(0x7FFF0000)
    lines = [_load(4), _unless_equal(_ARCHITECTURES[machine], 1), _skip(1), _return(0x80000000)]
    lines += [_load(0)]
    if machine == "x86_64":  # x32 numbers alias the same calls
        lines += [_if_at_least(0x40000000, 0, 1), _return(0x80000000)]
    for number in sorted((_REFUSED[machine] | _REFUSED_EVERYWHERE).values()):
        lines += [_unless_equal(number, 1), refuse]
    lines += [
        _unless_equal(_CLONE3, 1),
        _return_errno(errno.ENOSYS),
    ]  # the C library falls back to clone
    lines += _block(
        numbers["clone"], [_load(16), _if_any(_CLONE_THREAD, 1, 0), _return_errno(errno.EAGAIN)]
    )
    for name in ("kill", "tgkill"):
        lines += _block(numbers[name], [_load(16), _unless_equal(own, 1), _skip(1), refuse])
    lines += _block(numbers["prctl"], [_load(16), _unless_equal(_PR_SET_PDEATHSIG, 1), refuse])
    is_null = [
        line for half in (32, 36) for line in (_load(half), _unless_equal(0, 1), _skip(1), refuse)
    ]
    lines += _block(numbers["prlimit64"], is_null)  # reading limits is allowed, setting is not
    return b"".join([*lines, allow])


def _block(number: int, body: list[bytes]) -> list[bytes]:
    """Return ``body`` for one system call, then a reload of the call number."""
    return [_unless_equal(number, len(body)), *body, _load(0)]


def _load(offset: int) -> bytes:
    return struct.pack("=HBBI", 0x20, 0, 0, offset)


def _unless_equal(value: int, skip: int) -> bytes:
    """Skip ``skip`` instructions unless equal."""
    return struct.pack("=HBBI", 0x15, 0, skip, value)


def _if_at_least(value: int, then: int, otherwise: int) -> bytes:
    return struct.pack("=HBBI", 0x35, then, otherwise, value)


def _if_any(bits: int, then: int, otherwise: int) -> bytes:
    return struct.pack("=HBBI", 0x45, then, otherwise, bits)


def _skip(lines: int) -> bytes:
    return struct.pack("=HBBI", 0x05, 0, 0, lines)


def _return(value: int) -> bytes:
    return struct.pack("=HBBI", 0x06, 0, 0, value)


def _return_errno(error: int) -> bytes:
    return _return(0x00050000 | error)
