"""``delethink serve`` inside Ray Serve, in a Ray of this machine."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from installed import need

need("ray", "grpc_reflection", "openai", "uvicorn", "prometheus_client", "torch")

import openai  # noqa: E402
import yaml  # noqa: E402
from ray_head import ray_head  # noqa: E402
from server_process import free_port, stop  # noqa: E402

from delethink.cli.ray_serve import build_app  # noqa: E402
from delethink.errors import ConfigError  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.slow]

OPTIONS = "-m toy -C 90 --carryover-size 45 --head-size 0 --max-chunks 25 --answer-tokens 16"
OPTIONS += " engine=transformers"
MESSAGES: Any = [{"role": "user", "content": "99:" + "01" * 6}]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("ray"), free_port()
    app = {
        "name": "thinking",
        "route_prefix": "/",
        "import_path": "delethink.cli.ray_serve:build_app",
        "args": {"options": OPTIONS},
        "deployments": [{"name": "Thinking", "ray_actor_options": {"num_cpus": 1}}],
    }
    config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [app]}
    (folder / "app.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "app.yaml"]
    address = f"http://127.0.0.1:{port}"
    with ray_head(num_cpus=2) as head, (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=head.environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            wait_for(lambda: is_up(address, process, folder / "log"))
            yield f"{address}/v1"
        finally:
            stop(process)


def is_up(address: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text("utf-8")[-3000:]
    try:
        with urllib.request.urlopen(f"{address}/health") as health:
            return bool(health.status == 200)
    except OSError:
        return False


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.5)


def test_a_replica_answers_streams_and_learns_of_clients_that_left(url: str) -> None:
    given: Any = {"model": "toy", "messages": MESSAGES, "temperature": 0}

    def metrics() -> str:
        with urllib.request.urlopen(f"{url.removesuffix('/v1')}/metrics") as response:
            return str(response.read().decode())

    with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as asking:
        reply = asking.chat.completions.create(**given)
        pieces = list(asking.chat.completions.create(**given, stream=True))
        with pytest.raises(openai.NotFoundError, match="this server has 'toy'"):
            asking.chat.completions.create(**{**given, "model": "other"})
        left = asking.chat.completions.create(**given, n=16, stream=True)
        next(iter(left))
        left.close()
        wait_for(lambda: 'num_requests_running{model_name="toy"} 0.0' in metrics())
        again = asking.chat.completions.create(**given)
    message = reply.choices[0].message
    assert reply.delethink["chunks"] > 1
    assert again.choices[0].message == message
    deltas = [piece.choices[0].delta for piece in pieces if piece.choices]
    assert "".join(getattr(d, "reasoning", None) or "" for d in deltas) == message.reasoning
    assert "".join(delta.content or "" for delta in deltas) == message.content
    assert 'delethink_cancelled_total{model_name="toy"} 1.0' in metrics()


def test_mistakes_are_sentences() -> None:
    with pytest.raises(ConfigError, match=r"unknown argument 'option'. Did you mean 'options'"):
        build_app({"option": OPTIONS})
    with pytest.raises(ConfigError, match="no options of delethink serve: '--nothing'"):
        build_app({"options": "--nothing"})
    with pytest.raises(ConfigError, match="name a model with -m"):
        build_app({})
