"""Two Ray nodes on one machine, of which one is lost while traces are sampled."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from installed import need
from processes import assert_gone, started, wait_until

from delethink.chunking import ChunkSpec
from delethink.config import EngineConfig
from delethink.errors import ConfigError
from delethink.policy import Sampling
from delethink.rollout import run_rollouts
from delethink.types import Trace

ray = pytest.importorskip("ray")
need("vllm", "torch")

from ray._private import ray_constants  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from delethink.engines.vllm import VllmPool  # noqa: E402

if TYPE_CHECKING:
    from conftest import TinyModel

pytestmark = pytest.mark.integration

SPEC = ChunkSpec(context_size=64, carryover_size=32, max_chunks=8, head_size=4)
QUERIES = [(5, 9, 3, 2 + i // 4) for i in range(64)]
NODE = {"num_cpus": 1}
TOO_MANY = {"num_engines": 5, "node_placement": "pack", "startup_timeout": 2}


@pytest.fixture
def cluster(others: set[psutil.Process], own_ray: None) -> Iterator[Cluster]:
    """Two nodes of a core each, that listen on loopback."""
    assert not ray.is_initialized()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)  # else Ray finds another address
        head = {**NODE, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.add_node(**NODE)
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
        finally:
            processes = started() - others
            ray.shutdown()
            cluster.shutdown()
            assert_gone(processes)


def node_of(pid: int) -> int:
    """The process of the raylet that a Ray worker belongs to."""
    return psutil.Process(pid).ppid()


def raylet_of(node: Any) -> int:
    (raylet,) = node.all_processes["raylet"]
    return int(raylet.process.pid)


def roll_out(pool: VllmPool, on_end: Any = lambda index, trace: None) -> list[Trace]:
    samplings = [Sampling(seed=i) for i in range(len(QUERIES))]
    return asyncio.run(
        run_rollouts(pool, SPEC, QUERIES, samplings, pool.max_model_tokens, on_end=on_end)
    )


@pytest.mark.slow
def test_traces_outlive_a_node(cluster: Cluster, tiny_models: tuple[TinyModel, TinyModel]) -> None:
    config = EngineConfig(
        num_engines=2,
        cpus_per_engine=1,
        kv_cache_gib=0.1,
        node_placement="spread",
        weight_sync_timeout=300,
        hang_timeout=30,
        max_attempts=10,
        max_restarts=20,
    )
    pool = VllmPool(tiny_models[0].folder, config, eos_ids=(1,), max_model_tokens=128)
    with closing(pool):
        (lost,) = cluster.worker_nodes
        raylets = [node_of(worker.pid) for worker in pool.workers]
        assert sorted(raylets) == sorted(map(raylet_of, (cluster.head_node, lost)))
        victim = pool.workers[raylets.index(raylet_of(lost))]
        pool.update_weights(tiny_models[1].model.state_dict(), version=1)
        undisturbed = roll_out(pool)
        process = psutil.Process(victim.pid)
        gone = [process, *process.children(recursive=True)]

        def lose_node(index: int, trace: Trace) -> None:
            if lost in cluster.worker_nodes:
                cluster.remove_node(lost, allow_graceful=False)
                assert_gone(gone)  # else all traces might be done before it is

        traces = roll_out(pool, on_end=lose_node)
        assert [trace.output_ids for trace in traces] == [t.output_ids for t in undisturbed]
        assert all(trace.error is None for trace in traces)

        cluster.add_node(**NODE)
        wait_until(lambda: victim.restarts and victim.in_service)
        assert node_of(victim.pid) not in raylets
        before = victim.completions
        traces = roll_out(pool)
        assert {c.policy_version for trace in traces for c in trace.chunks} == {1}
        assert [trace.output_ids for trace in traces] == [t.output_ids for t in undisturbed]
        assert victim.completions > before

    with pytest.raises(ConfigError, match=r"Ray has no room for 5 workers of \{'CPU': 1.0\} each"):
        VllmPool("x", config.model_copy(update=TOO_MANY), eos_ids=(1,))
