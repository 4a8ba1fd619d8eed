"""vLLM engines in Ray actors: one machine or many, behind the same protocol.

    with contextlib.closing(RayPool("Qwen/Qwen2.5-1.5B", num_workers=2, eos_ids=(151643,))) as pool:
        traces = asyncio.run(play_traces(pool, spec, queries, samplings))
        pool.update_weights(model.state_dict(), version=1)

The pool joins the Ray cluster that it finds (``RAY_ADDRESS``, ``ray start``, or a submitted job);
where there is none, it starts one that this machine alone can reach.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from delethink.errors import (
    ConfigError,
    MissingExtraError,
    PolicyError,
    UserError,
    WeightSyncError,
)
from delethink.policy import Completion, Sampling
from delethink.serving.ray_calls import cause, connect, gather
from delethink.serving.vllm_weights import pack
from delethink.serving.vllm_worker import VllmWorker, WorkerConfig
from delethink.types import TokenIds

try:
    import ray
except ImportError:  # the constructor says so
    ray = None

if TYPE_CHECKING:
    import torch

_LOWEST_TEMPERATURE = 0.01  # vLLM raises anything between 0 and this to it
_MAX_REQUESTS = 10_000  # in flight at one worker; vLLM queues what it does not run
_STOP_TIMEOUT_S = 10.0


@dataclass(eq=False)
class PoolWorker:
    """A worker as the pool sees it."""

    name: str
    actor: Any
    pid: int = 0  # on its own machine; 0 until it has started
    tokens_in_flight: int = 0  # of its requests: prompts, and as many new tokens as they may have
    completions: int = 0  # that it has returned
    is_dead: bool = False

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid})" if self.pid else self.name


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
        gpus_per_worker: GPUs that Ray sets aside for each worker; 0 runs vLLM on the CPU.
        cpus_per_worker: cores that Ray sets aside, and on the CPU the threads of an engine;
            ``None`` is an equal share of all but one core of this machine on the CPU, 1 on GPUs.
        trust_remote_code: run code from the model's repository.
        weight_sync_timeout_s: seconds that workers have to take up new weights.
        startup_timeout_s: seconds that workers have to start.
        gpu_memory_utilization: share of a GPU's memory for vLLM, on GPUs.

    Raises:
        MissingExtraError: Ray, or vLLM on a worker, is not installed.
        ConfigError: a worker did not start; the text is what it said.

    Attributes:
        max_model_tokens: the longest sequence (prompt and new tokens) that the workers take.
        workers: the workers, until the pool is closed.

    Requests go to the worker with the fewest tokens in flight. A request of a worker that dies
    raises, and the worker gets no more. The pool is bound to no event loop: each training step may
    bring its own.
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
    ) -> None:
        if ray is None:
            raise MissingExtraError("ray", "ray")
        if num_workers < 1:
            raise ConfigError(f"num_workers must be at least 1, got {num_workers}")
        cpus = _cpus(cpus_per_worker, num_workers, on_gpu=gpus_per_worker > 0)
        configs = [
            WorkerConfig(
                model=os.fspath(model),
                eos_ids=tuple(eos_ids),
                max_model_tokens=max_model_tokens,
                dtype=dtype,
                seed=seed + i,  # else requests without a seed are drawn alike on all workers
                on_gpu=gpus_per_worker > 0,
                threads=max(1, int(cpus)),
                kv_cache_gib=kv_cache_gib,
                gpu_memory_utilization=gpu_memory_utilization,
                trust_remote_code=trust_remote_code,
            )
            for i in range(num_workers)
        ]
        self.max_model_tokens = 0
        self._weight_sync_timeout_s = weight_sync_timeout_s
        self.workers: list[PoolWorker] = []
        self._owns_ray = connect(num_cpus=max(_num_cores(), math.ceil(cpus * num_workers)))
        try:
            self._start(configs, {"num_cpus": cpus, "num_gpus": gpus_per_worker}, startup_timeout_s)
        except BaseException:
            self.close()
            raise

    def _start(
        self, configs: list[WorkerConfig], resources: dict[str, float], timeout_s: float
    ) -> None:
        remote = ray.remote(max_concurrency=_MAX_REQUESTS, **resources)(VllmWorker)
        for i, config in enumerate(configs):
            self.workers.append(PoolWorker(f"worker {i}", remote.remote(config)))
        calls = {worker.actor.start.remote(): worker for worker in self.workers}
        for worker, state in gather(calls, timeout_s):
            if isinstance(state, UserError):
                raise state
            if isinstance(state, TimeoutError):
                free = {name: ray.available_resources().get(name, 0) for name in ("CPU", "GPU")}
                state = f"{state}; it asks for {resources}, and Ray has {free} left"
            if isinstance(state, Exception | str):
                raise ConfigError(f"{worker} did not start: {state}")
            worker.pid = state.pid
            self.max_model_tokens = state.max_model_tokens

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """Samples at most ``max_new_tokens`` tokens after ``prompt_ids``.

        Raises:
            ConfigError: the request is longer than ``max_model_tokens``, or its temperature is
                between 0 and the lowest that vLLM takes.
            PolicyError: the worker failed or died; the text names it and says what it said.
        """
        needed = len(prompt_ids) + max_new_tokens
        self._check(needed, sampling.temperature)
        worker = self._least_busy()
        worker.tokens_in_flight += needed
        call = worker.actor.generate.remote(tuple(prompt_ids), max_new_tokens, sampling)
        try:
            completion: Completion = await call
        except asyncio.CancelledError:
            ray.cancel(call)  # else it holds up the next update
            raise
        except ray.exceptions.RayError as error:
            problem = cause(error)
            worker.is_dead = isinstance(problem, ConnectionError)
            raise PolicyError(f"{worker} {problem}") from None
        finally:
            worker.tokens_in_flight -= needed
        worker.completions += 1
        return completion

    def update_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Gives new weights to all workers; they wait for requests in flight to end.

        Args:
            weights: the whole state of the model under the names of its checkpoint, on any device.
            version: number of weight updates so far; completions carry it as ``policy_version``.

        Raises:
            WeightSyncError: names each worker that does not run them in time, and what it said.
        """
        packed = ray.put(pack(weights))
        calls = {worker.actor.update.remote(packed, version): worker for worker in self.workers}
        failures = [
            f"{worker} {answer}"
            for worker, answer in gather(calls, self._weight_sync_timeout_s)
            if answer != version
        ]
        if failures:
            raise WeightSyncError(
                f"{len(failures)} of {len(calls)} workers did not take up the weights of version "
                f"{version}: {'; '.join(failures)}"
            )

    def close(self) -> None:
        """Ends the workers, and the local Ray if the pool started it. Safe to call twice."""
        workers, self.workers = self.workers, []
        if workers and ray.is_initialized():
            calls = {w.actor.stop.remote(): w for w in workers if w.pid and not w.is_dead}
            list(gather(calls, _STOP_TIMEOUT_S))  # in time or not, they are killed next
            for worker in workers:
                ray.kill(worker.actor)
        if self._owns_ray:
            ray.shutdown()
        self._owns_ray = False

    def _check(self, needed: int, temperature: float) -> None:
        if needed > self.max_model_tokens:
            raise ConfigError(
                f"a request of {needed} tokens, prompt and new ones together, is longer than "
                f"max_model_tokens={self.max_model_tokens}"
            )
        if temperature < 0 or 0 < temperature < _LOWEST_TEMPERATURE:
            raise ConfigError(
                f"temperature must be 0 or at least {_LOWEST_TEMPERATURE}, got {temperature}"
            )

    def _least_busy(self) -> PoolWorker:
        alive = [worker for worker in self.workers if not worker.is_dead]
        if not alive:
            raise PolicyError("the pool is closed, or all its workers have died")
        return min(alive, key=lambda worker: worker.tokens_in_flight)


def _cpus(asked: float | None, num_workers: int, on_gpu: bool) -> float:
    if asked is not None:
        return asked
    # One core is left to the rest: threads of an engine that must share theirs wait for each other.
    return 1.0 if on_gpu else max(1.0, (_num_cores() - 1) // num_workers)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))
