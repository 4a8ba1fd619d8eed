"""Runs attempts in the sandbox, and checks after each that nothing outside has changed.

Usage: ``attack_driver.py FOLDER [--refuse-namespaces] NAME...``, where each name is of an attack.
Prints JSON: the isolation in force, and of each attack its outcome and the harm it did. A process
of its own per mode is needed, as the isolation is chosen once per process.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import secrets
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from attacks import ATTACKS, Attack

from delethink.scoring.isolation import find_isolation
from delethink.scoring.pool import VerifierPool, VerifierSettings
from delethink.scoring.sandbox import SandboxLimits

_PATIENCE_S = 10.0
_SECRET = "DELETHINK_TEST_SECRET"


class Target:
    """Processes, files and sockets for attempts to aim at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "victim"
        self.folder.mkdir()
        self.file = self.folder / "file"
        self.file.write_text("kept")
        os.setxattr(self.file, "user.kept", b"1")
        self.name = f"delethink-test-{secrets.token_hex(8)}"
        self.key = secrets.randbelow(1 << 30) + 1
        self.process = subprocess.Popen(
            ["sleep", "600"], start_new_session=True, stdout=subprocess.DEVNULL
        )
        self.signals: list[int] = []
        signal.signal(signal.SIGURG, lambda number, _: self.signals.append(number))
        self.sockets = {
            "unix": _bound(socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "unix")),
            "unix_dgram": _bound(socket.AF_UNIX, socket.SOCK_DGRAM, str(folder / "unix_dgram")),
            "abstract": _bound(socket.AF_UNIX, socket.SOCK_STREAM, f"\0{self.name}"),
            "tcp": _bound(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            "udp": _bound(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            "udp6": _bound(socket.AF_INET6, socket.SOCK_DGRAM, ("::1", 0)),
        }

    def aims(self) -> dict[str, Any]:
        """Return what the programs get as ``T``."""
        names = {name: box.getsockname() for name, box in self.sockets.items()}
        ports = {name: names[name][1] for name in ("tcp", "udp", "udp6")}
        pid = self.process.pid
        return (
            names
            | ports
            | {
                "abstract": self.name,
                "driver": os.getpid(),
                "victim": pid,
                "victim_group": pid,
                "file": str(self.file),
                "folder": str(self.folder),
                "key": self.key,
                "name": self.name,
                "secret": [_SECRET],
            }
        )

    def state(self, host: int) -> dict[str, Any]:
        """Return everything that an attempt must leave as it is."""
        state = {f"file {path}": _file_state(path) for path in _tree(self.folder)}
        for name, pid in (("victim", self.process.pid), ("driver", os.getpid()), ("host", host)):
            state |= {f"{name} {key}": value for key, value in _process_state(pid).items()}
        state["signals to the driver"] = len(self.signals)
        for name, box in self.sockets.items():
            state[f"socket {name}"] = _heard(box)
        for place in ("/dev/shm", "/tmp", tempfile.gettempdir()):
            state[f"made in {place}"] = os.path.lexists(f"{place}/{self.name}")
        for kind in ("shm", "sem", "msg"):
            rows = Path("/proc/sysvipc", kind).read_text().splitlines()[1:]
            state[f"made by {kind}"] = any(int(row.split()[0]) == self.key for row in rows)
        return state

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def _bound(family: int, kind: int, address: Any) -> socket.socket:
    box = socket.socket(family, kind)
    box.bind(address)
    box.setblocking(False)
    if kind == socket.SOCK_STREAM:
        box.listen()
    return box


def _heard(box: socket.socket) -> str:
    try:
        if box.type == socket.SOCK_STREAM:
            box.accept()[0].close()
            return "a connection"
        return f"a packet: {box.recv(100)!r}"
    except BlockingIOError:
        return ""


def _tree(folder: Path) -> list[Path]:
    return [folder, *sorted(folder.rglob("*"))]


def _file_state(path: Path) -> Any:
    found = path.lstat()
    content = path.read_text() if stat.S_ISREG(found.st_mode) else ""
    attributes = {name: os.getxattr(path, name).hex() for name in os.listxattr(path)}
    times = found.st_mtime_ns, found.st_ctime_ns  # any change of attributes changes the second
    return found.st_mode, found.st_uid, found.st_gid, found.st_nlink, times, attributes, content


def _process_state(pid: int) -> dict[str, Any]:
    process = psutil.Process(pid)
    limits = {name: getattr(resource, name) for name in dir(resource) if "RLIMIT" in name}
    return {
        "is stopped": process.status() in ("stopped", "zombie", "dead", "tracing-stop"),
        "priority": process.nice(),
        "cores": process.cpu_affinity(),
        "disk priority": [int(value) for value in process.ionice()],
        "scheduler": os.sched_getscheduler(pid),
        "group": os.getpgid(pid),
        "session": os.getsid(pid),
        "limits": {name: resource.prlimit(pid, limit) for name, limit in limits.items()},
        "oom": Path(f"/proc/{pid}/oom_score_adj").read_text(),
        "started": process.create_time(),
    }


def descendants() -> dict[int, str]:
    """Return the running descendants of this process, orphans included."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = " ".join(process.cmdline())[:80]
        except psutil.NoSuchProcess:
            continue
    return found


def leftovers(base: set[int], host: int) -> list[str]:
    """Return new processes and folders, when they have had time to go away."""
    roots = [tempfile.gettempdir()]
    if find_isolation() == "bubblewrap":
        inside = psutil.Process(host).children(recursive=True)
        roots = [f"/proc/{process.pid}/root/tmp" for process in inside]
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        left = [f"process {pid}: {name}" for pid, name in descendants().items() if pid not in base]
        left += [f"file {name}" for root in roots for name in _files(root)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.01)


def _files(root: str) -> list[str]:
    """Return everything below ``root`` but the folder of the verifiers' host and import paths."""
    imported = {path.split("/")[2] for path in sys.path if path.startswith("/tmp/")}
    found = [name for name in os.listdir(root) if name not in imported]
    inner = [f"{name}/{file}" for name in found for file in os.listdir(f"{root}/{name}")]
    return inner + [name for name in found if not name.startswith("delethink-host-")]


def run(pool: VerifierPool, target: Target, attack: Attack, base: set[int]) -> dict[str, Any]:
    """Run an attack; return its outcome and the harm."""
    (host,) = pool.verifier_ids()
    started = time.monotonic()
    before = target.state(host)
    limits = SandboxLimits(attack.seconds, memory_mb=300, file_mb=1)
    ran = pool.run_program(attack.program, json.dumps(target.aims()) + "\n", limits)
    harm = leftovers(base, host)
    if pool.verifier_ids() != [host]:
        harm.append("the host of the verifiers ended")
        return {"outcome": "", "detail": ran.stderr[-2000:], "harm": harm}
    after = target.state(host)
    harm += [
        f"{key}: {before.get(key)} became {after.get(key)}"
        for key in before | after
        if before.get(key) != after.get(key)
    ]
    outcome = "timeout" if ran.status == "timeout" else f"exit {ran.exit_code}"
    lines = ran.stdout[-2000:].splitlines()
    if outcome == "exit 0" and lines and lines[-1].startswith(("passed", "refused", "harmless")):
        outcome = lines[-1].split()[0]
    detail = ran.stdout[-1000:] + ran.stderr[-1000:]
    seconds = time.monotonic() - started
    return {"outcome": outcome, "detail": detail, "harm": harm, "seconds": seconds}


def refuse_namespaces() -> None:
    """Refuse new namespaces and mounts to this process and its children, as Docker does.

    The filter answers clone3 with ENOSYS, as its flags are out of reach, and libraries then use
    clone.
    """
    new_namespace = 0x7E020000
    load, jump_if, jump_any, answer = 0x20, 0x15, 0x45, 0x06
    refused, unknown, allowed = 0x00050001, 0x00050026, 0x7FFF0000
    code = [
        (load, 0, 0, 0),  # the number of the call
        (jump_if, 6, 0, 272),  # unshare
        (jump_if, 5, 0, 165),  # mount
        (jump_if, 5, 0, 435),  # clone3
        (jump_if, 1, 0, 56),  # clone
        (answer, 0, 0, allowed),
        (load, 0, 0, 16),  # its first argument: flags
        (jump_any, 0, 2, new_namespace),
        (answer, 0, 0, refused),
        (answer, 0, 0, unknown),
        (answer, 0, 0, allowed),
    ]
    body = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in code))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(body))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, by_filter = 38, 22, 2
    libc.prctl(no_new_privileges, 1, 0, 0, 0)
    if libc.prctl(set_seccomp, by_filter, program, 0, 0):
        raise OSError(ctypes.get_errno(), "cannot install the filter")


def main(folder: Path, names: list[str]) -> None:
    if "--refuse-namespaces" in names:
        refuse_namespaces()
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans become children of this process
    os.environ[_SECRET] = "hush"
    os.environ["TMPDIR"] = str(folder / "tmp")
    (folder / "tmp").mkdir()
    target = Target(folder)
    results = {}
    try:
        with VerifierPool(VerifierSettings(num_verifiers=1)) as pool:
            assert pool.run_program("print(1)", "", SandboxLimits()).stdout == "1\n"
            base = set(descendants())
            for attack in ATTACKS:
                if attack.name in names:
                    results[attack.name] = run(pool, target, attack, base)
    finally:
        target.end()
    print(json.dumps({"isolation": find_isolation(), "user": os.getuid(), "results": results}))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main(Path(sys.argv[1]), sys.argv[2:])
