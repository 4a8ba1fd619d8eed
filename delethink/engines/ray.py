"""vLLM engines in Ray actors: one machine or many, behind the same protocol.

    with contextlib.closing(RayPool("Qwen/Qwen2.5-1.5B", num_workers=2, eos_ids=(151643,))) as pool:
        traces = asyncio.run(run_rollouts(pool, spec, queries, samplings))
        pool.update_weights(model.state_dict(), version=1)

The pool joins the Ray cluster that it finds (``RAY_ADDRESS``, ``ray start``, or a submitted job);
where there is none, it starts one that this machine alone can reach.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from delethink.config import WeightTransfer
from delethink.engines.cluster import connect
from delethink.engines.exchange import WorkerHandle
from delethink.engines.pool import WorkerPool
from delethink.engines.pool_metrics import PoolMetrics
from delethink.engines.pool_settings import PoolSettings
from delethink.engines.pool_thread import PoolThread
from delethink.engines.pool_worker import PoolWorker
from delethink.engines.ray_worker import Room
from delethink.engines.vllm import WorkerConfig
from delethink.engines.vllm_weights import pack
from delethink.errors import ConfigError, MissingExtraError, PolicyError
from delethink.policy import Completion, Sampling
from delethink.types import TokenIds

try:
    import ray
except ImportError:  # the constructor says so
    ray = None

if TYPE_CHECKING:
    import torch

_LOWEST_TEMPERATURE = 0.01  # vLLM raises anything between 0 and this to it


class RayPool:
    """An engine over vLLM workers in Ray actors.

    Args:
        model: folder or hub id of the checkpoint.
        num_workers: how many engines.
        eos_ids: the tokens that end an answer; the model's own configuration is not asked.
        max_model_tokens: the longest sequence; ``None`` takes the model's own limit.
        dtype: of weights and computation in vLLM, say ``"float32"`` or ``"bfloat16"``.
        seed: of the engines' own streams, from which requests without a seed are drawn.
        kv_cache_gib: GiB for the KV cache of each worker, on the CPU.
        gpus_per_worker: GPUs that Ray sets aside for each worker; 0 runs vLLM on the CPU, and a
            fraction shares a GPU, say with the trainer.
        cpus_per_worker: cores that Ray sets aside, and on the CPU the threads of an engine;
            ``None`` is an equal share of all but one core of this machine on the CPU, 1 on GPUs.
        trust_remote_code: run code from the model's repository.
        weight_sync_timeout_s: seconds that a worker has to take up new weights.
        startup_timeout_s: seconds that a worker has to start.
        gpu_memory_utilization: share of a GPU's memory for vLLM, on GPUs.
        max_batch_size: chunks that an engine samples side by side; ``None`` takes vLLM's own.
        tensor_parallel_size: GPUs over which vLLM spreads each engine.
        can_sleep: lets ``sleep`` free the GPUs while somebody else uses them.
        placement: "pack" or "spread" puts the workers on as few, or as many, nodes as there are.
        weight_transfer: "store" sends new weights through Ray's object store; "nccl" and "ipc" by
            vLLM's own weight transfer from this process's GPU, "ipc" where workers share it.
        settings: how workers that fail, hang or are slow are treated, and how chunks are ordered.

    Raises:
        MissingExtraError: Ray, or vLLM on a worker, is not installed.
        ConfigError: an impossible setting, or a worker did not start; the text is what it said.

    Attributes:
        max_model_tokens: the longest sequence (prompt and new tokens) that the workers take.
        workers: the workers, until the pool is closed.

    Chunks wait in this process until a worker has room (``delethink.engines.scheduler``). Those of
    a worker that dies or hangs go to others, and it is restarted with the current weights
    (``delethink.engines.pool``). The pool has a thread of its own and is bound to no event
    loop: each training step may bring its own.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        eos_ids: TokenIds,
        num_workers: int = 1,
        max_model_tokens: int | None = None,
        dtype: str = "float32",
        seed: int = 0,
        kv_cache_gib: float = 1.0,
        gpus_per_worker: float = 0.0,
        cpus_per_worker: float | None = None,
        trust_remote_code: bool = False,
        weight_sync_timeout_s: float = 60.0,
        startup_timeout_s: float = 300.0,
        gpu_memory_utilization: float = 0.9,
        max_batch_size: int | None = None,
        tensor_parallel_size: int = 1,
        can_sleep: bool = False,
        placement: str | None = None,
        weight_transfer: WeightTransfer = "store",
        settings: PoolSettings | None = None,
    ) -> None:
        if ray is None:
            raise MissingExtraError("ray", "ray")
        if num_workers < 1:
            raise ConfigError(f"num_workers must be at least 1, got {num_workers}")
        settings = settings or PoolSettings()
        settings = dataclasses.replace(settings, weight_sync_timeout=weight_sync_timeout_s)
        cpus = _cpus(cpus_per_worker, num_workers, on_gpu=gpus_per_worker > 0)
        self._config = WorkerConfig(
            model=os.fspath(model),
            eos_ids=tuple(eos_ids),
            max_model_tokens=max_model_tokens,
            dtype=dtype,
            seed=seed,
            on_gpu=gpus_per_worker > 0,
            threads=max(1, int(cpus)),
            kv_cache_gib=kv_cache_gib,
            gpu_memory_utilization=gpu_memory_utilization,
            trust_remote_code=trust_remote_code,
            max_batch_size=max_batch_size,
            tensor_parallel_size=tensor_parallel_size,
            can_sleep=can_sleep,
            weight_transfer=weight_transfer,
        )
        self.max_model_tokens = 0
        self._can_sleep = can_sleep
        self._room: Room | None = None
        self._sends_from = _sends_from(weight_transfer)
        self._pool = WorkerPool(self._launch, num_workers, settings)
        self._metrics = PoolMetrics(self._pool)
        self._thread = PoolThread(self._pool)
        self._owns_ray = connect(num_cpus=max(_num_cores(), math.ceil(cpus * num_workers)))
        try:
            resources = {"num_cpus": cpus, "num_gpus": gpus_per_worker}
            self._room = Room(
                resources, num_workers, placement, startup_timeout_s, self._sends_from
            )
            self._thread.start()
            self._thread.run(self._pool.start())
        except BaseException:
            self.close()
            raise
        self.max_model_tokens = self._pool.max_model_tokens

    @property
    def workers(self) -> list[PoolWorker]:
        """The workers, until the pool is closed."""
        return self._pool.workers

    def _launch(self, index: int) -> WorkerHandle:
        assert self._room is not None
        seed = self._config.seed + index  # else requests without one are drawn alike on all workers
        return self._room.launch(index, dataclasses.replace(self._config, seed=seed))

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """Samples at most ``max_new_tokens`` tokens after ``prompt_ids``.

        Raises:
            ConfigError: the request is longer than ``max_model_tokens``, or its temperature is
                between 0 and the lowest that vLLM takes.
            PolicyError: several workers failed over it; the text names the last one and says what
                it said.
            DeadlineError: a worker had it for longer than ``chunk_timeout``.
            WorkersLostError: no worker came back in time.
        """
        self._check(len(prompt_ids) + max_new_tokens, sampling.temperature)
        return await self._thread.sample(prompt_ids, max_new_tokens, sampling)

    def update_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Gives new weights to all workers, each as soon as it has finished its chunks in flight.

        A worker that fails over it is restarted with the new weights; it is enough that one worker
        runs them when this returns, and no chunk is sampled with others from then on.

        Args:
            weights: the whole state of the model under the names of its checkpoint, on any device.
            version: number of weight updates so far; completions carry it as ``policy_version``.

        Raises:
            WeightSyncError: all workers refused them; the text is what each said.
            WorkersLostError: no worker came back in time.
        """
        self._thread.run(self._pool.update_weights(self._copy(weights), version))

    def _copy(self, weights: Mapping[str, torch.Tensor]) -> Any:
        """A copy from which workers take weights up, now or when they restart."""
        if self._sends_from is None:
            return ray.put(pack(weights))
        from delethink.engines.weight_sync import Snapshot

        return Snapshot(weights, self._sends_from)

    def sleep(self) -> None:
        """Frees the GPUs until the next request or weights, if the pool was made to."""
        if self._can_sleep:
            self._thread.run(self._pool.sleep())

    def wake(self) -> None:
        """Takes the GPUs again."""
        self._thread.run(self._pool.wake())

    def take_metrics(self) -> dict[str, float]:
        """What the workers have done and what went wrong since this was last asked."""
        return self._thread.run(self._metrics.take()) if self._thread.is_open else {}

    def close(self) -> None:
        """Ends the workers, and the local Ray if the pool started it. Safe to call twice."""
        self._thread.close()
        if self._room is not None:
            self._room.give_up()
        if self._owns_ray:
            ray.shutdown()
        self._owns_ray = False

    def _check(self, needed: int, temperature: float) -> None:
        if not self._thread.is_open:
            raise PolicyError("the pool is closed")
        if needed > self.max_model_tokens:
            raise ConfigError(
                f"a request of {needed} tokens, prompt and new ones together, is longer than "
                f"max_model_tokens={self.max_model_tokens}"
            )
        if temperature < 0 or 0 < temperature < _LOWEST_TEMPERATURE:
            raise ConfigError(
                f"temperature must be 0 or at least {_LOWEST_TEMPERATURE}, got {temperature}"
            )


def _sends_from(weight_transfer: WeightTransfer) -> torch.device | None:
    """The GPU from which weights go to workers; ``None`` where they go by Ray."""
    if weight_transfer == "store":
        return None
    try:
        from delethink.engines.weight_sync import this_device
    except ImportError as error:
        raise MissingExtraError("vllm", "vllm") from error
    return this_device()


def _cpus(asked: float | None, num_workers: int, on_gpu: bool) -> float:
    if asked is not None:
        return asked
    # One core is left to the rest: threads of an engine that must share theirs wait for each other.
    return 1.0 if on_gpu else max(1.0, (_num_cores() - 1) // num_workers)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))
