"""A real vLLM server of the toy reasoner, on the loopback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server_process import started

from delethink.engines.loading import locate

KEY = "a-key-for-this-test-alone"


@contextmanager
def vllm_server(folder: Path, *options: str) -> Iterator[str]:
    """Runs the server with its log in a folder, and gives its address."""
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCH_COMPILE_DISABLE": "1",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", locate("toy"), "--served-model-name", "toy", "--dtype", "float32"]
    command += ["--enforce-eager", "--api-key", KEY]
    command += ["--no-enable-chunked-prefill", "--max-num-seqs", "64", *options]
    with started(command, environment, folder) as address:
        yield f"{address}/v1"
