"""Real engines are killed and stopped while they sample; what comes out must not show it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil
import pytest
from installed import need
from processes import alive, assert_gone, engine_of, started, wait_until

from delethink.chunking import ChunkSpec
from delethink.config import EngineConfig
from delethink.policy import Completion, Sampling
from delethink.rollout import derive_seed, retrace, run_rollouts
from delethink.types import TokenIds, Trace

need("ray", "vllm", "torch")

from delethink.engines.pool_records import WorkerRecord  # noqa: E402
from delethink.engines.vllm import VllmPool  # noqa: E402

if TYPE_CHECKING:
    from conftest import TinyModel

pytestmark = pytest.mark.integration

SEED = 11
SPEC = ChunkSpec(context_size=32, carryover_size=16, max_chunks=8, head_size=4)
QUERIES = [(5, 9, 3, 2 + i // 4) for i in range(32)]
CHUNKS_BETWEEN_EVENTS = 25
# What is done to whom: a kill or a hang costs a restart, a pause is borne, and in a silence the
# chunks go to others although the worker comes back.
EVENTS = [("kill", "worker")] * 2 + [("kill", "engine")] * 2
EVENTS += [("hang", "worker"), ("hang", "engine")]
EVENTS += [("pause", "worker")] * 7 + [("pause", "engine")] * 8 + [("silence", "worker")]
SECONDS = {"pause": 0.5, "silence": 8.0}  # until SIGCONT


@dataclass
class Chaos:
    """The policy protocol over a pool that it damages as it goes."""

    pool: VllmPool
    rng: random.Random = field(default_factory=lambda: random.Random(SEED))
    to_come: list[tuple[str, str]] = field(default_factory=list)
    done: Counter[tuple[str, str]] = field(default_factory=Counter)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    chunks: int = 0

    def __post_init__(self) -> None:
        self.to_come = self.rng.sample(EVENTS, len(EVENTS))

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        completion = await self.pool.generate(prompt_ids, max_new_tokens, sampling)
        self.chunks += 1
        if self.to_come and self.chunks % CHUNKS_BETWEEN_EVENTS == 0:
            # Every second one strikes at a boundary, the others while chunks are under way.
            delay = self.rng.uniform(0.01, 0.2) * (self.chunks % 2)
            self.tasks.append(asyncio.create_task(self.strike(delay)))
        return completion

    async def strike(self, delay: float) -> None:
        await asyncio.sleep(delay)
        standing = [worker for worker in self.pool.workers if worker.in_service]
        event = next((event for event in self.to_come if self.may(event)), None)
        if event is None or not standing:
            return
        self.to_come.remove(event)
        self.done[event] += 1
        await damage(*event, worker=self.rng.choice(standing))

    def may(self, event: tuple[str, str]) -> bool:
        """One worker is always left alone, so that the test has an end."""
        return event[0] in SECONDS or sum(worker.in_service for worker in self.pool.workers) > 1


async def damage(what: str, whom: str, worker: WorkerRecord) -> None:
    pid = worker.pid if whom == "worker" else engine_of(worker.pid).pid
    os.kill(pid, signal.SIGKILL if what == "kill" else signal.SIGSTOP)
    if what in SECONDS:
        await asyncio.sleep(SECONDS[what])
        os.kill(pid, signal.SIGCONT)


def roll_out_step(policy: VllmPool | Chaos, step: int, longest: int) -> list[Trace]:
    samplings = [Sampling(seed=derive_seed(SEED, step, i)) for i in range(len(QUERIES))]

    async def scenario() -> list[Trace]:
        traces = await run_rollouts(policy, SPEC, QUERIES, samplings, longest)
        if isinstance(policy, Chaos):
            await asyncio.gather(*policy.tasks)
            policy.tasks.clear()
        return traces

    return asyncio.run(scenario())


@pytest.fixture
def pool(
    others: set[psutil.Process], tiny_models: tuple[TinyModel, TinyModel], own_ray: None
) -> Iterator[VllmPool]:
    config = EngineConfig(
        num_engines=3,
        cpus_per_engine=0.5,
        kv_cache_gib=0.1,
        max_batch_size=16,
        weight_sync_timeout=300,
        heartbeat_timeout=4,
        hang_timeout=15,
        max_attempts=100,
        max_restarts=20,
    )
    pool = VllmPool(tiny_models[0].folder, config, eos_ids=(1,), max_model_tokens=128)
    yield pool
    pool.close()


@pytest.mark.slow  # minutes; test_worker_pool and test_ray_worker have each fault on its own
def test_traces_show_nothing_of_what_happened_to_the_workers(
    pool: VllmPool, others: set[psutil.Process], tiny_models: tuple[TinyModel, TinyModel]
) -> None:
    chaos, steps = Chaos(pool), list[list[Trace]]()
    processes = started()
    restarts = rescheduled = 0.0
    while chaos.to_come:
        step = len(steps)
        pool.update_weights(tiny_models[step % 2].model.state_dict(), version=step + 1)
        steps.append(roll_out_step(chaos, step, pool.max_model_tokens))
        processes |= started()
        metrics = pool.take_metrics()
        restarts += metrics["engine/restarts"]
        rescheduled += metrics["engine/chunks_rescheduled"]
        assert metrics["engine/chunks_failed"] == 0
        if chaos.to_come:
            wait_until(lambda: any(map(chaos.may, chaos.to_come)))

    wait_until(lambda: all(worker.in_service for worker in pool.workers))
    restarts += pool.take_metrics()["engine/restarts"]
    assert chaos.done == Counter(EVENTS)
    assert sum(chaos.done.values()) >= 20
    harmful = sum(what not in SECONDS for what, _ in EVENTS)
    assert restarts >= harmful / 2  # two may hit the same life of a worker
    assert rescheduled > 0
    for step, traces in enumerate(steps):
        pool.update_weights(tiny_models[step % 2].model.state_dict(), version=step + 1)
        undisturbed = roll_out_step(pool, step, pool.max_model_tokens)
        assert [trace.query_ids for trace in traces] == QUERIES
        for trace, same in zip(traces, undisturbed, strict=True):
            assert trace.error is None
            assert {chunk.policy_version for chunk in trace.chunks} == {step + 1}
            retrace(SPEC, trace)  # no chunk is missing, or another trace's
            assert trace.output_ids == same.output_ids

    processes |= started()
    pool.close()
    assert_gone(processes - others)
    assert alive(started() - others) == []
