"""New weights by each way, into engines of one rank and of two.

vLLM's own weight transfer runs from GPU to GPU. Here NCCL's part of it is played by stand-ins
(``transfer_without_gpu``), because there is no GPU; the engines, Ray and vLLM's code on both sides
are real. Memory is shared in the way of the CPU; CUDA's handles are in test_shared_weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import psutil
import pytest
from installed import need
from processes import assert_gone, started, wait_until

from delethink.errors import ConfigError, PolicyError, WeightSyncError
from delethink.policy import Completion, Sampling

need("ray", "vllm")
torch = pytest.importorskip("torch")

import transfer_without_gpu  # noqa: E402

from delethink.config import EngineConfig  # noqa: E402
from delethink.engines import ray as ray_module  # noqa: E402
from delethink.engines.base import WorkerState  # noqa: E402
from delethink.engines.pool import WorkerPool  # noqa: E402
from delethink.engines.ray import RayPool  # noqa: E402

if TYPE_CHECKING:
    from conftest import TinyModel

pytestmark = pytest.mark.integration

PROMPT = tuple(2 + i % 22 for i in range(60))
MISFIT = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For this test alone: what they replace is put back."""
    transfer_without_gpu.put_in_place(monkeypatch.setattr)
    folder = str(Path(transfer_without_gpu.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", folder, prepend=os.pathsep)  # of Ray's processes
    yield
    transfer_without_gpu.STANDS_STILL.unlink(missing_ok=True)


def make_pool(
    model: TinyModel, transfer: str, workers: int, ranks: int, **settings: str
) -> contextlib.closing[RayPool]:
    config = EngineConfig(
        num_engines=workers,
        kv_cache_gib=0.25,
        tensor_parallel_size=ranks,
        weight_sync_timeout=30,
        **settings,
    )
    config = config.model_copy(update={"weight_transfer": transfer})  # refused without a GPU
    return contextlib.closing(
        transfer_without_gpu.Pool(model.folder, config, eos_ids=(1,), max_model_tokens=256)
    )


def assert_runs(pool: RayPool, model: TinyModel, version: int) -> None:
    """Every worker samples what a plain forward pass of the model gives."""

    async def scenario() -> list[Completion]:
        greedy = Sampling(temperature=0.0)
        return await asyncio.gather(*[pool.generate(PROMPT, 24, greedy) for _ in range(4)])

    before = [worker.completions for worker in pool.workers]
    for completion in asyncio.run(scenario()):
        choices, logprobs = model.forward(PROMPT, completion.token_ids)
        assert list(completion.token_ids) == choices
        assert list(completion.logprobs) == pytest.approx(logprobs, abs=1e-3)
        assert completion.policy_version == version
    assert all(w.completions > b for w, b in zip(pool.workers, before, strict=True))


@pytest.mark.parametrize(
    ("transfer", "ranks"),
    [
        # Runs that train have one rank and the store.
        pytest.param("ipc", 2, marks=pytest.mark.slow),
        pytest.param("ipc", 1, marks=pytest.mark.slow),
        pytest.param("store", 2, marks=pytest.mark.slow),
        pytest.param("nccl", 2, marks=pytest.mark.slow),
    ],
)
def test_every_rank_takes_weights_up(
    own_ray: None,
    tiny_models: tuple[TinyModel, TinyModel],
    stand_ins: None,
    transfer: str,
    ranks: int,
) -> None:
    first, second = tiny_models
    with make_pool(first, transfer, 1, ranks) as pool:
        assert_runs(pool, first, 0)
        pool.update_weights(second.model.state_dict(), version=1)
        assert_runs(pool, second, 1)
        weights = second.model.state_dict()
        with pytest.raises(WeightSyncError, match="expects the shape"):
            pool.update_weights({**weights, MISFIT: weights[MISFIT][:-1]}, version=2)
        pool.update_weights(first.model.state_dict(), version=3)
        assert_runs(pool, first, 3)


@pytest.mark.slow  # minutes
def test_a_worker_that_stands_still_in_a_transfer_takes_no_other_with_it(
    others: set[psutil.Process],
    own_ray: None,
    tiny_models: tuple[TinyModel, TinyModel],
    stand_ins: None,
) -> None:
    first, second = tiny_models
    with make_pool(first, "nccl", 2, 1) as pool:
        pool.update_weights(second.model.state_dict(), version=1)
        assert_runs(pool, second, 1)
        transfer_without_gpu.STANDS_STILL.touch()  # in the middle of the next one
        weights = {name: tensor.clone() for name, tensor in first.model.state_dict().items()}
        pool.update_weights(weights, version=2)
        (victim,) = [worker for worker in pool.workers if not worker.in_service]
        assert "did not load the weights of version 2 within 30 s" in victim.reason
        for tensor in weights.values():  # as a trainer does, that goes on
            tensor.zero_()
        wait_until(lambda: victim.in_service)
        assert_runs(pool, first, 2)

        transfer_without_gpu.STANDS_STILL.touch()
        waiting = ThreadPoolExecutor(1).submit(pool.update_weights, weights, 3)
        wait_until(lambda: not transfer_without_gpu.STANDS_STILL.exists())
        processes = started() - others
    with pytest.raises(PolicyError, match="the pool is closed"):
        waiting.result()
    assert_gone(processes)


STARTS_AN_ENGINE = """
import asyncio, sys
from delethink.config import EngineConfig
from delethink.engines.base import WorkerSpec
from delethink.engines.vllm import VllmWorker

async def main():
    config = EngineConfig(kv_cache_gib=0.25, tensor_parallel_size=2)
    await VllmWorker(WorkerSpec(sys.argv[1], config, (1,), 256, False, 0, 1)).start()
    print("started", flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.slow
def test_ranks_end_with_the_process_that_started_them(
    tiny_models: tuple[TinyModel, TinyModel], tmp_path: Path
) -> None:
    """Without Ray, which ends them itself where it can; stopped ones, too."""
    script = tmp_path / "starts_an_engine.py"
    script.write_text(STARTS_AN_ENGINE)
    command = [sys.executable, str(script), str(tiny_models[0].folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        try:
            assert starter.stdout is not None
            assert "started\n" in starter.stdout  # reads up to there
            processes = psutil.Process(starter.pid).children(recursive=True)
            ranks = [p for p in processes if any("Worker_TP" in word for word in p.cmdline())]
            assert len(ranks) == 2
            for rank in ranks:
                rank.send_signal(signal.SIGSTOP)
        finally:
            starter.kill()
    assert_gone(processes)


def test_a_worker_that_starts_but_does_not_connect_is_not_called_silent() -> None:
    async def started() -> WorkerState:
        return WorkerState(pid=1, max_model_tokens=256, batch_size=4)

    def late() -> None:
        time.sleep(0.5)

    def failing() -> None:
        raise TimeoutError("the rendezvous took too long")

    for connect, reason in (
        (late, "its engine is up, but the weight transfer did not connect"),
        (failing, "the rendezvous took too long"),
    ):
        actor = SimpleNamespace(start=SimpleNamespace(remote=started))
        sender = SimpleNamespace(connect=connect)
        worker = ray_module._RayWorkerHandle(actor, 0.05, {}, sender)  # type: ignore[arg-type]
        pool = WorkerPool(lambda index, worker=worker: worker, EngineConfig())  # type: ignore[misc]
        with pytest.raises(ConfigError, match=f"did not start: {reason}"):
            asyncio.run(pool.start())
