"""How chunks go to a Ray actor: over a connection of their own, or by Ray where that cannot be."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_up_worker
import psutil
import pytest
from processes import assert_gone, started

from delethink.chunking import ChunkSpec
from delethink.policy import Sampling
from delethink.rollout import run_rollouts
from delethink.types import Trace, TraceStop

ray = pytest.importorskip("ray")

from delethink.engines import ray_worker  # noqa: E402
from delethink.engines.channel import Channel  # noqa: E402
from delethink.engines.cluster import connect  # noqa: E402
from delethink.engines.ray import RayPool  # noqa: E402

pytestmark = pytest.mark.integration

SPEC = ChunkSpec(context_size=64, carryover_size=32, max_chunks=4, head_size=0)
TRACES = 12


@pytest.fixture(scope="module")
def cluster(others: set[psutil.Process], own_ray: None) -> Iterator[None]:
    """A Ray for all tests here, whose workers find the helper."""
    folder = str(Path(made_up_worker.__file__).parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", folder, prepend=os.pathsep)
        connect(num_cpus=2)
        yield
        processes = started() - others
        ray.shutdown()
    assert_gone(processes)


@pytest.fixture
def made_up(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers have no engine."""
    monkeypatch.setattr(ray_worker, "VllmWorker", made_up_worker.MadeUpWorker)


@pytest.fixture
def pool(
    request: pytest.FixtureRequest, made_up: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RayPool]:
    """One worker; what the test asks for is put in place before."""
    request.param(monkeypatch)
    with contextlib.closing(RayPool("none", eos_ids=(1,), max_model_tokens=256)) as pool:
        yield pool


def leave(patch: pytest.MonkeyPatch) -> None:
    """As it is."""


def encrypt(patch: pytest.MonkeyPatch) -> None:
    """As the driver of a cluster that encrypts has it; this one's processes started without."""
    patch.setenv("RAY_USE_TLS", "1")


def cut_off(patch: pytest.MonkeyPatch) -> None:
    """As where nodes do not reach each other's ports."""

    async def refuse(self: Channel, host: str, port: int, secret: bytes) -> None:
        raise ConnectionRefusedError("no way there")

    patch.setattr(Channel, "open", refuse)


def unbound(patch: pytest.MonkeyPatch) -> None:
    """As where a node goes by an address that it has not got itself."""
    patch.setattr(ray_worker, "VllmWorker", made_up_worker.Unbound)


def play(pool: RayPool) -> list[Trace]:
    queries = [(5, 9, 2 + i) for i in range(TRACES)]
    return asyncio.run(run_rollouts(pool, SPEC, queries, [Sampling()] * TRACES))


def assert_played(traces: list[Trace]) -> None:
    assert [trace.stop for trace in traces] == [TraceStop.BUDGET] * TRACES
    assert all(len(trace.chunks) == SPEC.max_chunks for trace in traces)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each message that goes over a worker's own connection, from now on."""
    sent: list[int] = []
    send = Channel.send

    def counted(self: Channel, said: bytes) -> None:
        sent.append(len(said))
        send(self, said)

    monkeypatch.setattr(Channel, "send", counted)
    return sent


@pytest.mark.parametrize("pool", [leave], indirect=True)
def test_chunks_go_over_a_connection_of_their_own(
    pool: RayPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = watch(monkeypatch)
    assert_played(play(pool))
    assert sent


@pytest.mark.parametrize("pool", [encrypt, cut_off, unbound], indirect=True)
def test_they_go_by_way_of_ray_where_that_must_not_or_cannot_be(
    pool: RayPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = watch(monkeypatch)
    assert_played(play(pool))
    assert not sent


def test_a_worker_that_cannot_be_reached_is_told_of(
    made_up: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cut_off(monkeypatch)
    with caplog.at_level(logging.WARNING):
        RayPool("none", eos_ids=(1,), max_model_tokens=256).close()
    assert "cannot be reached at 127.0.0.1, port" in caplog.text
    assert "no way there" in caplog.text


@pytest.mark.parametrize("pool", [leave], indirect=True)
def test_ray_tells_why_a_worker_was_lost(pool: RayPool, caplog: pytest.LogCaptureFixture) -> None:
    (worker,) = pool.workers
    with caplog.at_level(logging.WARNING):
        os.kill(worker.pid, signal.SIGKILL)
        assert_played(play(pool))
    assert worker.restarts == 1
    assert "is dead: The actor died" in caplog.text


@pytest.mark.parametrize("pool", [leave], indirect=True)
def test_a_lost_connection_is_a_lost_worker(
    pool: RayPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_worker, "_ACCOUNT_S", 0.1)
    (worker,) = pool.workers
    pid = worker.pid
    with caplog.at_level(logging.WARNING):
        handle: Any = worker.handle
        pool._thread.call(handle._channel._frames._transport.abort)
        assert_played(play(pool))
    assert worker.restarts == 1
    assert "has closed its connection" in caplog.text
    assert not psutil.pid_exists(pid)
