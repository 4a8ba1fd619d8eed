"""The pool in its thread, over Ray actors without an engine, called from any event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from processes import assert_gone, started, wait_until

from delethink.chunking import ChunkSpec
from delethink.config import EngineConfig
from delethink.errors import ConfigError, PolicyError
from delethink.policy import Completion, Sampling
from delethink.rollout import run_rollouts
from delethink.tokens import Logprobs
from delethink.types import TokenIds, Trace, TraceStop

ray = pytest.importorskip("ray")

import made_up_worker  # noqa: E402
from made_up_worker import MadeUpPool  # noqa: E402

from delethink.engines.base import WorkerPlace  # noqa: E402
from delethink.engines.cluster import connect  # noqa: E402
from delethink.engines.weight_sync import SharedWeights  # noqa: E402

if TYPE_CHECKING:
    from delethink.engines.ray import RayPool

pytestmark = pytest.mark.integration

SPEC = ChunkSpec(context_size=64, carryover_size=32, max_chunks=4, head_size=0)
TRACES = 12
QUICK, SLOW = Sampling(0.01), Sampling(1000.0)


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
def pool(cluster: None) -> Iterator[RayPool]:
    """A pool of one worker."""
    config = EngineConfig(heartbeat_timeout=5, hang_timeout=30)
    with contextlib.closing(MadeUpPool("none", config, eos_ids=(1,), max_model_tokens=256)) as pool:
        yield pool


async def sample(pool: RayPool, sampling: Sampling, *last: int) -> list[Completion]:
    return await asyncio.gather(*[pool.generate((5, token), 4, sampling) for token in last])


def roll_out(pool: RayPool) -> list[Trace]:
    queries = [(5, 9, 2 + i) for i in range(TRACES)]
    return asyncio.run(run_rollouts(pool, SPEC, queries, [QUICK] * TRACES))


def assert_complete(traces: list[Trace]) -> None:
    assert [trace.stop for trace in traces] == [TraceStop.BUDGET] * TRACES
    assert all(len(trace.chunks) == SPEC.max_chunks for trace in traces)


def test_ray_tells_why_a_worker_was_lost(pool: RayPool, caplog: pytest.LogCaptureFixture) -> None:
    (worker,) = pool.workers
    with caplog.at_level(logging.WARNING):
        os.kill(worker.pid, signal.SIGKILL)
        assert_complete(roll_out(pool))
    assert worker.restarts == 1
    assert "is dead: The actor died" in caplog.text


def test_callers_in_threads_of_their_own_have_their_own_answers(pool: RayPool) -> None:
    def call(first: int) -> list[int]:
        done = asyncio.run(sample(pool, QUICK, *range(first, first + 32)))
        return [completion.token_ids[0] for completion in done]

    with ThreadPoolExecutor(4) as others:
        for first, done in zip(range(8), others.map(call, range(8)), strict=True):
            assert done == list(range(first, first + 32))


def test_a_cancelled_chunk_is_cancelled_in_its_worker(pool: RayPool) -> None:
    async def give_up() -> None:
        waiting = asyncio.ensure_future(sample(pool, SLOW, 1, 2, 3))
        while not pool.workers[0].chunks:
            await asyncio.sleep(0.01)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting

    asyncio.run(give_up())
    wait_until(lambda: not pool.workers[0].chunks)

    def cancelled() -> int:
        pool.take_metrics()
        return pool.workers[0].counts.tokens

    wait_until(lambda: cancelled() == 3)


def test_a_stream_comes_in_pieces_and_can_be_cancelled(pool: RayPool) -> None:
    async def read(sampling: Sampling, enough: int) -> tuple[list[TokenIds], Completion | None]:
        pieces, full = list[TokenIds](), asyncio.Event()

        def listen(ids: TokenIds, logprobs: Logprobs) -> None:
            assert len(ids) == len(logprobs)
            pieces.append(ids)
            if len(pieces) == enough:
                full.set()
            if len(pieces) > 50:
                raise asyncio.CancelledError

        call = asyncio.ensure_future(pool.stream((5, 9), 100, sampling, listen))
        waiting = asyncio.ensure_future(full.wait())
        await asyncio.wait({call, waiting}, return_when=asyncio.FIRST_COMPLETED)
        call.cancel()
        waiting.cancel()
        try:
            return pieces, await call
        except asyncio.CancelledError:
            return pieces, None

    async def short() -> tuple[list[TokenIds], Completion]:
        pieces = list[TokenIds]()
        done = await pool.stream((5, 9), 7, QUICK, lambda ids, _: pieces.append(ids))
        return pieces, done

    pieces, done = asyncio.run(short())
    assert [tuple(piece) for piece in pieces] == [(9,)] * 7
    assert (tuple(done.token_ids), tuple(done.logprobs)) == ((9,) * 7, (-0.5,) * 7)
    assert done.worker == "worker 0"
    pieces, left = asyncio.run(read(QUICK, 3))  # its task is cancelled
    assert (len(pieces), left) == (3, None)
    wait_until(lambda: not pool.workers[0].chunks)
    pieces, left = asyncio.run(read(QUICK, 1000))  # its listener raises
    assert (len(pieces), left) == (51, None)
    wait_until(lambda: not pool.workers[0].chunks)

    def cancelled() -> int:
        pool.take_metrics()
        return pool.workers[0].counts.tokens

    wait_until(lambda: cancelled() == 2)


def test_a_caller_that_is_gone_harms_nobody(pool: RayPool) -> None:
    loop = asyncio.new_event_loop()
    left = loop.create_task(sample(pool, Sampling(0.2), 1, 2))  # neither cancelled nor awaited
    left._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.run_until_complete(asyncio.sleep(0.05))
    loop.close()
    time.sleep(0.4)
    assert len(asyncio.run(sample(pool, QUICK, *range(8)))) == 8


def test_a_request_that_does_not_fit_is_refused(pool: RayPool) -> None:
    with pytest.raises(ConfigError, match="257 tokens.*max_model_tokens=256"):
        asyncio.run(pool.generate((5,) * 250, 7, QUICK))


def test_callers_that_wait_when_the_pool_is_closed_get_an_error(pool: RayPool) -> None:
    async def wait_and_close() -> None:
        waiting = asyncio.ensure_future(sample(pool, SLOW, 1))
        await asyncio.sleep(0.1)
        closing = threading.Thread(target=pool.close)
        closing.start()
        async with asyncio.timeout(30):
            await waiting

    with pytest.raises(PolicyError, match="the pool is closed"):
        asyncio.run(wait_and_close())
    for use in (lambda: asyncio.run(sample(pool, QUICK, 1)), lambda: pool.update_weights({}, 1)):
        with pytest.raises(PolicyError, match="the pool is closed"):
            use()
    pool.close()  # while the first caller may still be closing it
    assert pool.take_metrics() == {}


def test_a_worker_beside_each_rank_reads_the_weights_of_its_own(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They pass by Ray's object store, and the scheduler has all workers as ever."""
    torch = pytest.importorskip("torch")
    node = ray.get_runtime_context().get_node_id()
    config = EngineConfig(num_engines=2, placement="colocated", weight_transfer="ipc")
    places = [WorkerPlace(node, None)] * 2

    def put(*args: object) -> None:
        raise AssertionError("weights went through the object store")

    monkeypatch.setattr(ray, "put", put)
    copies = [
        SharedWeights({"logprob": torch.tensor(value)}, torch.device("cpu"), torch.float32)
        for value in (-1.0, -2.0)
    ]
    made = MadeUpPool("none", config, eos_ids=(1,), max_model_tokens=256, places=places)
    with contextlib.closing(made) as pool:
        pool.read_weights([copy.handle for copy in copies], 3)
        done = asyncio.run(sample(pool, QUICK, *range(16)))
        assert {completion.policy_version for completion in done} == {3}
        workers = {f"worker {i}": float(value) for i, value in enumerate((-1.0, -2.0))}
        assert {c.worker for c in done} == set(workers)
        assert all(c.logprobs[0] == workers[str(c.worker)] for c in done)
    for copy in copies:
        copy.close()


def test_an_update_in_the_background_waits_for_no_chunk(pool: RayPool) -> None:
    async def scenario() -> None:
        slow = asyncio.ensure_future(sample(pool, SLOW, 1))
        while not pool.workers[0].chunks:
            await asyncio.sleep(0.01)
        begun = pool.begin_update({}, 7)  # returns, although the chunk would take 1,000 s
        assert not begun.done()
        slow.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await slow
        await asyncio.wrap_future(begun)
        (after,) = await sample(pool, QUICK, 2)
        assert after.policy_version == 7

    asyncio.run(scenario())


def test_an_engine_without_gpu_transfer_refuses_it(cluster: None) -> None:
    config = EngineConfig.model_construct(
        **{**EngineConfig().model_dump(), "weight_transfer": "nccl"}
    )
    with pytest.raises(ConfigError, match="MadeUpPool does not support weight_transfer=nccl"):
        MadeUpPool("none", config, eos_ids=(1,))
