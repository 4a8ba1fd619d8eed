"""A Ray head with its dashboard, as ``ray start --head`` makes one, closed to other machines."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_MARK = "DELETHINK_TEST_HEAD"  # in the environment of whatever the cluster runs
_RAY = [sys.executable, "-m", "ray.scripts.scripts"]  # the `ray` command of this interpreter


@dataclass(frozen=True)
class RayHead:
    """A running cluster of one machine.

    Attributes:
        folder: its sessions and its token.
        environment: of commands that talk to it.
    """

    folder: Path
    environment: dict[str, str]

    def start(self, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        """Starts a ``ray`` command; what it writes comes on ``stdout``, errors too."""
        return subprocess.Popen(
            [*_RAY, *arguments],
            cwd=cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ray(
        self, *arguments: str, cwd: Path | None = None, timeout_s: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """Runs a ``ray`` command; what it wrote is in ``stdout``, errors too."""
        process = self.start(*arguments, cwd=cwd)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, process.returncode, output)

    def processes(self, *words: str) -> list[psutil.Process]:
        """What runs in the cluster, only those with one of ``words`` in their command if any."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.cmdline())
                if process.environ().get(_MARK) != str(self.folder):
                    continue
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if not words or any(word in command for word in words):
                    found.append(process)
        return found


@contextlib.contextmanager
def ray_head(num_cpus: int) -> Iterator[RayHead]:
    """Starts a head and stops it by process id, also after a failure."""
    # Short, because Ray puts sockets into it.
    folder = Path(tempfile.mkdtemp(prefix="dlt-"))
    (folder / "token").write_text(secrets.token_hex(32))
    port, dashboard, client, agent = _free_ports(4)
    of_others = ("RAY_ADDRESS", "RAY_AUTH_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in of_others} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray's own ports are open to the network
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": "60",  # a busy machine takes longer to end than Ray's 3 s
        "HF_HUB_OFFLINE": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        _MARK: str(folder),
    }
    head = RayHead(folder, environment)
    command = [*_RAY, "start", "--head", "--block", f"--num-cpus={num_cpus}"]
    command += [f"--temp-dir={folder}", "--node-ip-address=127.0.0.1", f"--port={port}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    log = folder / "head.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        _wait_for(head, process, log)
        yield head
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        left = head.processes()
        for orphan in left:
            with contextlib.suppress(psutil.Error):
                orphan.kill()
        psutil.wait_procs(left, timeout=20)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(head: RayHead, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the job server answers."""
    for _ in range(60):
        assert process.poll() is None, log.read_text()
        if head.ray("job", "list").returncode == 0:
            return
        time.sleep(1)
    raise AssertionError(f"the job server does not answer: {log.read_text()}")


def _free_ports(number: int) -> list[int]:
    """Ports that nobody listens to at this moment."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for some in sockets:
            some.bind(("127.0.0.1", 0))
        return [some.getsockname()[1] for some in sockets]
    finally:
        for some in sockets:
            some.close()
