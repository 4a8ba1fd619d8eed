"""Chaos around the server: no trace is lost without an error to its client, and nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("transformers")

import openai
import serve_chaos
from made_up_reasoner import EOS, MARK, TOKENIZER
from serve_chaos import ANSWERED, BAD_KINDS, GOOD_KINDS, LEFT, PROMPTS, TOLD, Scene, ask, crowd
from served import service_of, serving

from delethink import ChunkSpec, ScriptedPolicy
from delethink.cli.serve import say
from delethink.errors import PolicyError, WorkersLostError
from delethink.output import echo
from delethink.serve.start import _has_workers

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.2)


@pytest.fixture
def made() -> Iterator[Scene]:
    with serve_chaos.scene() as scene:
        yield scene


def check_quiet(made: Scene) -> None:
    """Nothing is left, and the next request works."""
    made.upstream.faults.clear()
    assert not any(made.settle().values()), made.left_over()
    for stream in (False, True):
        assert asyncio.run(ask(made, PROMPTS[1], stream=stream))[0] == ANSWERED


def test_faults_upstream_are_answers_or_errors(made: Scene) -> None:
    made.upstream.faults = serve_chaos.shuffled_faults(0, 400, 0.4)
    counted = asyncio.run(crowd(made, list(GOOD_KINDS) * 20))
    assert {outcome for _, outcome in counted} == {ANSWERED, TOLD}
    check_quiet(made)


def test_an_upstream_that_restarts(made: Scene) -> None:
    with serve_chaos.restarting(made):
        counted = asyncio.run(crowd(made, list(GOOD_KINDS) * 10))
    assert {outcome for _, outcome in counted} <= {ANSWERED, TOLD}
    check_quiet(made)


def test_clients_that_misbehave_among_others(made: Scene) -> None:
    kinds = [*GOOD_KINDS, *BAD_KINDS] * 6 + ["100 MB", "100 MB in chunks"]
    counted = asyncio.run(crowd(made, kinds))
    for (kind, outcome), number in counted.items():
        wanted = ANSWERED if kind in GOOD_KINDS else LEFT if "leaves" in kind else TOLD
        assert outcome == wanted, (kind, outcome, number)
    check_quiet(made)


@pytest.mark.parametrize("requests", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_more_requests_at_once_than_the_queue_takes(requests: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 3 * requests:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 3 * requests), hard))
    with serve_chaos.scene(max_traces=4, max_queue=40) as made:
        counted = asyncio.run(crowd(made, ["whole", "stream"] * (requests // 2)))
        assert {outcome for _, outcome in counted} == {ANSWERED, TOLD}
        assert sum(n for (_, outcome), n in counted.items() if outcome == ANSWERED) >= 44
        check_quiet(made)


@pytest.mark.parametrize("reads", [False, True], ids=["nothing", "a byte at a time"])
def test_a_client_that_reads_too_slowly_is_left_with_its_connection(reads: bool) -> None:
    letters = tuple(TOKENIZER("a")["input_ids"]) * 60_000
    ids = (*letters, *TOKENIZER(MARK)["input_ids"], *TOKENIZER("c")["input_ids"], EOS)
    spec = ChunkSpec(70_000, 0, 1)
    policy = ScriptedPolicy(lambda *_: ids, EOS)
    made = Scene(serve_chaos.FakeUpstream())
    made.service = service_of(policy, spec, window=80_000, send_time_s=0.5)
    with serve_chaos.listening_app(made.app(), deaf_s=0.5) as url, socket.socket() as deaf:
        made.host, made.port = "127.0.0.1", int(url.rpartition(":")[2])
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((made.host, made.port))
        body = b'{"messages": [{"role": "user", "content": "x"}], "stream": true, "logprobs": true}'
        deaf.sendall(serve_chaos._head(made, len(body)) + body)
        deadline = time.monotonic() + 60
        while not made.service.board._tasks and time.monotonic() < deadline:
            time.sleep(0.01)
        deaf.settimeout(0.05)
        while reads and any(made.left_over().values()) and time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # in the end the server resets the connection
                deaf.recv(1)
            time.sleep(0.05)
        assert not any(made.settle().values()), made.left_over()


def test_a_log_that_takes_no_line_keeps_nobody_from_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class FullDisk:
        """A file of a full disk; ``/dev/full`` itself cannot be closed after a write."""

        encoding = "utf-8"

        def write(self, text: str) -> int:
            with Path("/dev/full").open("wb", buffering=0) as full:
                return full.write(text.encode())

        def flush(self) -> None: ...

    monkeypatch.setattr("sys.stderr", FullDisk())
    with pytest.raises(OSError, match="No space left"):
        echo("a line", stderr=True)
    made = Scene(serve_chaos.FakeUpstream())
    ids = (*TOKENIZER(f"a{MARK}c")["input_ids"], EOS)
    policy = ScriptedPolicy([PolicyError("fails"), *[ids] * 3], EOS)
    made.service = service_of(policy, ChunkSpec(60, 0, 1), log=say)
    with serve_chaos.listening_app(made.app()) as url:
        made.host, made.port = "127.0.0.1", int(url.rpartition(":")[2])
        outcomes = [asyncio.run(ask(made, "x", stream=bool(i % 2)))[0] for i in range(4)]
    assert outcomes == [TOLD, ANSWERED, ANSWERED, ANSWERED]


def test_health_tells_of_an_engine_whose_workers_are_all_lost() -> None:
    workers = [SimpleNamespace(in_service=True), SimpleNamespace(in_service=False)]
    alive = partial(_has_workers, SimpleNamespace(workers=workers))
    policy = ScriptedPolicy([WorkersLostError("all 2 workers are lost")] * 2, EOS)
    with serving(service_of(policy, engine_is_healthy=alive)) as url:
        host = url.removesuffix("/v1")
        with urllib.request.urlopen(f"{host}/health") as reply:
            assert reply.status == 200
        workers[0].in_service = False
        with pytest.raises(urllib.error.HTTPError, match="503") as raised:
            urllib.request.urlopen(f"{host}/health")
        assert b"no worker" in raised.value.read()
        raised.value.close()
        asking = openai.OpenAI(base_url=url, api_key="any", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="all 2 workers are lost") as told:
            asking.chat.completions.create(
                model="made-up", messages=[{"role": "user", "content": "x"}]
            )
        assert told.value.status_code == 503


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delethink.serve.app._BODY_TIME_S", 0.2)
    made = Scene(serve_chaos.FakeUpstream())
    made.service = service_of(ScriptedPolicy([]))
    with serve_chaos.listening_app(made.app()) as url, socket.socket() as silent:
        made.host, made.port = "127.0.0.1", int(url.rpartition(":")[2])
        silent.connect((made.host, made.port))
        silent.settimeout(60)
        silent.sendall(serve_chaos._head(made, 1000) + b"{")
        answered = b""
        while piece := silent.recv(4096):
            answered += piece
        assert answered.startswith(b"HTTP/1.1 408")
        assert serve_chaos.read_answer(answered)[0] == TOLD
        assert not any(made.settle().values()), made.left_over()
