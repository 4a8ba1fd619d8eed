"""A real vLLM server of the toy reasoner, on the loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from delethink.engines.loading import locate

KEY = "a-key-for-this-test-alone"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the server and what it has started, each by its number."""
    with contextlib.suppress(psutil.NoSuchProcess):
        server = psutil.Process(process.pid)
        family = [*server.children(recursive=True), server]
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.terminate()
        _, alive = psutil.wait_procs(family, timeout=10)
        for one in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


@contextmanager
def vllm_server(folder: Path) -> Iterator[str]:
    """Runs the server with its log in a folder, and gives its address."""
    port = free_port()
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", locate("toy"), "--served-model-name", "toy", "--dtype", "float32"]
    command += ["--enforce-eager", "--host", "127.0.0.1", "--port", str(port), "--api-key", KEY]
    command += ["--no-enable-chunked-prefill", "--max-num-seqs", "64"]
    address = f"http://127.0.0.1:{port}/v1"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + 240
            while True:
                with (
                    contextlib.suppress(OSError),
                    urllib.request.urlopen(f"{address[:-3]}/health") as health,
                ):
                    if health.status == 200:
                        break
                said = (folder / "log").read_text(errors="replace")[-3000:]
                assert process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.2)
            yield address
        finally:
            stop(process)
