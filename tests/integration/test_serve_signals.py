"""The end of the server by a signal: every client with an open stream is told."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("transformers")

import openai
import slow_server
from processes import wait_until

pytestmark = pytest.mark.integration

MESSAGES: list[Any] = [{"role": "user", "content": "x"}]


@contextmanager
def slow_process(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, slow_server.__file__], stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port.isdigit(), (folder / "log").read_text()
        yield process, f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def running(url: str) -> float:
    with urllib.request.urlopen(f"{url.removesuffix('/v1')}/metrics", timeout=60) as reply:
        found = re.search(r"^vllm:num_requests_running\S* (\S+)$", reply.read().decode(), re.M)
    return float(found[1]) if found else -1.0


@pytest.mark.parametrize("sign", ["SIGTERM", "SIGHUP"])
def test_open_streams_are_told_that_the_server_closes(sign: str, tmp_path: Path) -> None:
    told = list[str]()

    def read(url: str, api: str) -> None:
        asking = openai.OpenAI(base_url=url, api_key="any", max_retries=0)
        try:
            if api == "responses":
                for event in asking.responses.create(model="made-up", input="x", stream=True):
                    if event.type == "response.failed":
                        told.append(str(event.response.error.message))
            else:
                stream = api == "stream"
                reply = asking.chat.completions.create(
                    model="made-up", messages=MESSAGES, stream=stream
                )
                list(reply if stream else ())
        except openai.APIError as error:
            told.append(str(error))

    with slow_process(tmp_path) as (process, url):
        kinds = ("stream", "stream", "whole", "responses")
        clients = [threading.Thread(target=read, args=(url, kind)) for kind in kinds]
        for client in clients:
            client.start()
        wait_until(lambda: running(url) == len(kinds))
        process.send_signal(getattr(signal, sign))
        for client in clients:
            client.join(60)
        assert process.wait(60) in (-signal.SIGTERM, 0)
    assert len(told) == len(kinds), told
    assert all("the server is closing" in text for text in told), told
    assert "Traceback" not in (tmp_path / "log").read_text()
