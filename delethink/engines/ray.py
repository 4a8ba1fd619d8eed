"""Engines in Ray workers, on one machine or many, behind the ``Engine`` protocol.

    config = EngineConfig(num_engines=2)
    with contextlib.closing(VllmPool("Qwen/Qwen2.5-1.5B", config, eos_ids=(151643,))) as pool:
        traces = asyncio.run(run_rollouts(pool, spec, queries, samplings))
        pool.update_weights(model.state_dict(), version=1)

A chunk takes this way: ``RayPool.generate`` -> ``WorkerPool.generate`` in the thread of the pool ->
``_RayWorkerHandle.generate``, a plain call of a Ray actor -> ``generate`` of the worker class.

The pool joins a running Ray cluster (``RAY_ADDRESS``, ``ray start``, or a submitted job). Otherwise
it starts Ray on this machine, reachable from this machine alone.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import math
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, TypeVar

from delethink.config import EngineConfig
from delethink.engines.base import (
    EngineCounts,
    Worker,
    WorkerHandle,
    WorkerPlace,
    WorkerSpec,
    WorkerState,
)
from delethink.engines.cluster import EarlyConnection, cause
from delethink.engines.pool import WorkerPool
from delethink.engines.pool_records import FaultCounts, WorkerRecord
from delethink.errors import (
    ConfigError,
    MissingExtraError,
    ModelError,
    PolicyError,
    WeightSyncError,
)
from delethink.policy import Completion, Sampling, TokenListener, join_completions
from delethink.tokens import Logprobs, token_array
from delethink.types import TokenIds

try:
    import ray
except ImportError:  # the constructor raises MissingExtraError
    ray = None

if TYPE_CHECKING:
    import torch

    from delethink.engines.low_rank import LowRankChange
    from delethink.engines.weight_sync import SharedHandle, SharedWeights

T = TypeVar("T")

_MAX_CALLS = 10_000  # concurrent calls of a worker; the pool's slots are the real limit
_CLOSE_TIMEOUT_S = 60.0


class RayPool:
    """An engine over workers in Ray actors.

    Subclasses set ``worker_class``; see ``delethink.engines.vllm.VllmPool``.

    Args:
        model: folder or Hugging Face id of the checkpoint.
        config: the section ``engine:`` of a recipe.
        eos_ids: tokens to end an answer; the model's own configuration is not read.
        max_model_tokens: longest sequence; ``None`` takes the model's own limit.
        trust_remote_code: run code from the model's repository.
        seed: seed of the engines' own streams, for requests without a seed.
        connection: a connection to Ray that was begun before; the pool takes it over.
        places: one for each worker, beside the rank of the same number; ``None``: Ray's choice.
        wait: return once the workers have started; otherwise call the method ``wait`` later.

    Raises:
        MissingExtraError: Ray, or the engine's package on a worker, is not installed.
        ConfigError: Ray cannot provide the resources, or a worker did not start; the text says why.

    Chunks wait in this process until a worker has a free slot (``delethink.engines.scheduler``).
    The chunks of a dead or hanging worker go to others, and the worker restarts with the current
    weights (``delethink.engines.pool``). The pool has a thread of its own and is bound to no event
    loop: each training step may bring another one.
    """

    worker_class: ClassVar[type[Worker]]
    computes_elsewhere = True

    def __init__(
        self,
        model: str | os.PathLike[str],
        config: EngineConfig,
        *,
        eos_ids: TokenIds,
        max_model_tokens: int | None = None,
        trust_remote_code: bool = False,
        seed: int = 0,
        connection: EarlyConnection | None = None,
        places: Sequence[WorkerPlace] | None = None,
        wait: bool = True,
    ) -> None:
        if ray is None:
            raise MissingExtraError("ray", "ray")
        self.config = config
        self.max_model_tokens = 0
        cpus = cpus_per_engine(config)
        self._spec = WorkerSpec(
            model=os.fspath(model),
            config=config,
            eos_ids=tuple(eos_ids),
            max_model_tokens=max_model_tokens,
            trust_remote_code=trust_remote_code,
            seed=seed,
            threads=max(1, int(cpus)),
        )
        self._places = places
        # The ranks have reserved the GPUs beside them.
        self._resources = {"num_cpus": cpus, "num_gpus": 0 if places else config.gpus_per_engine}
        self._placement_group: Any = None
        self._ray_metrics: dict[str, Any] = {}
        self._base: tuple[Any, int] | None = None  # the last whole weights and their version
        self._shared: SharedWeights | None = None  # of the last update with weight_transfer=ipc
        self._pool = WorkerPool(self._launch, config)
        self._close_lock = threading.Lock()
        self._thread = _LoopThread()
        self._connection = connection or self.connect_early(config)
        try:
            self._connection.wait()
            self._placement_group = _reserve(config, self._resources)
            self._start = self._thread.submit(self._pool.start())
        except BaseException:
            self.close()
            raise
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until all workers have started; see ``StartingEngine``."""
        try:
            self._start.result()
        except concurrent.futures.CancelledError:
            self.close()
            raise PolicyError("the pool is closed") from None
        except BaseException:
            self.close()
            raise
        self.max_model_tokens = self._pool.max_model_tokens

    @classmethod
    def connect_early(cls, config: EngineConfig) -> EarlyConnection:
        """Begin to connect to Ray; see ``StartingEngine``."""
        if ray is None:
            raise MissingExtraError("ray", "ray")
        return EarlyConnection(
            max(_num_cores(), math.ceil(cpus_per_engine(config) * config.num_engines))
        )

    @classmethod
    def begin(
        cls,
        config: EngineConfig,
        model_path: str,
        shell: Any,
        tokenizer: Any,
        *,
        trust_remote_code: bool,
        seed: int,
        connection: EarlyConnection,
        places: Sequence[WorkerPlace] | None = None,
    ) -> Self:
        """Begin to start the workers, at ``places`` if given; see ``StartingEngine``."""
        from delethink.engines.loading import engine_window, eos_ids, find_source

        return cls(
            find_source(model_path),
            config,
            eos_ids=eos_ids(shell, tokenizer),
            max_model_tokens=engine_window(shell, config.max_model_tokens),
            trust_remote_code=trust_remote_code,
            seed=seed,
            connection=connection,
            places=places,
            wait=False,
        )

    @classmethod
    def create(
        cls,
        config: EngineConfig,
        model_path: str,
        model: Any,
        tokenizer: Any,
        *,
        trust_remote_code: bool,
        seed: int,
        is_trained: bool,
    ) -> Self:
        """Make an engine; see ``Engine.create``."""
        from delethink.engines.loading import (
            check_checkpoint,
            engine_window,
            eos_ids,
            find_adapter,
            find_source,
            load_model,
            load_shell,
        )

        # A trainer sends its own weights; the workers start with those of the base model.
        adapter = find_adapter(model_path) if model is None else None
        merged: Any = None
        if adapter is not None:
            merged = load_model(model_path, config.engine_dtype, trust_remote_code)
        elif model is None:
            check_checkpoint(model_path, trust_remote_code)  # once, not in each worker
        shell = load_shell(model_path, trust_remote_code) if model is None else model
        pool = cls(
            find_source(model_path),
            config,
            eos_ids=eos_ids(shell, tokenizer),
            max_model_tokens=engine_window(shell, config.max_model_tokens),
            trust_remote_code=trust_remote_code,
            seed=seed,
        )
        if adapter is not None:
            try:
                pool.update_weights(merged.state_dict(), 0)
            except BaseException as error:
                pool.close()
                if isinstance(error, WeightSyncError):
                    raise ModelError(
                        f"the engine does not take the merged weights of {model_path}: {error}; "
                        "set engine=transformers, or save the model that merge_and_unload() of "
                        "PEFT returns, and name its folder"
                    ) from None
                raise
        return pool

    @property
    def workers(self) -> list[WorkerRecord]:
        """Return the workers; none after ``close``."""
        return self._pool.workers

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """Sample a chunk on any worker; see ``WorkerPool.generate``.

        Raises:
            ConfigError: the request is longer than ``max_model_tokens``, or invalid for the engine.
            Exception: as ``WorkerPool.generate``.
        """
        return await self._submit(prompt_ids, max_new_tokens, sampling)

    def _submit(
        self,
        prompt_ids: TokenIds,
        max_new_tokens: int,
        sampling: Sampling,
        listener: TokenListener | None = None,
    ) -> asyncio.Future[Completion]:
        needed = len(prompt_ids) + max_new_tokens
        if self._thread.is_open and needed > self.max_model_tokens:
            raise ConfigError(
                f"a request of {needed} tokens, prompt and new ones together, is longer than "
                f"max_model_tokens={self.max_model_tokens}"
            )
        sampled = self._pool.generate(prompt_ids, max_new_tokens, sampling, listener)
        return asyncio.wrap_future(self._thread.submit(sampled))

    async def stream(
        self,
        prompt_ids: TokenIds,
        max_new_tokens: int,
        sampling: Sampling,
        on_tokens: TokenListener,
    ) -> Completion:
        """Sample a chunk on any worker, and pass on its tokens; see ``StreamingPolicy``.

        A worker class without ``stream`` gives all tokens at the end of the chunk.

        Raises:
            PolicyError: as ``generate``, or a worker failed after tokens that were passed on.
            Exception: as ``generate``.
        """
        if not hasattr(self.worker_class, "stream"):
            completion = await self.generate(prompt_ids, max_new_tokens, sampling)
            on_tokens(completion.token_ids, completion.logprobs)
            return completion
        loop = asyncio.get_running_loop()

        def receive(token_ids: TokenIds, logprobs: Logprobs) -> None:
            if call.done():  # the caller has left
                return
            try:
                on_tokens(token_ids, logprobs)
            except asyncio.CancelledError:
                call.cancel()

        def listen(token_ids: TokenIds, logprobs: Logprobs) -> None:
            loop.call_soon_threadsafe(receive, token_ids, logprobs)

        call = self._submit(prompt_ids, max_new_tokens, sampling, listen)
        return await call

    def update_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Load new weights into all workers; see ``Engine`` and ``WorkerPool.update_weights``."""
        _wait(self.begin_update(weights, version))

    def begin_update(
        self, weights: Mapping[str, torch.Tensor], version: int
    ) -> concurrent.futures.Future[None]:
        """Copy weights, and begin to load them into all workers; see ``BackgroundEngine``."""
        import torch

        from delethink.engines.weight_sync import SharedWeights, Snapshot, local_device, pack

        copy: Any
        if self.config.weight_transfer == "store":
            copy = ray.put(pack(weights))
            self._base = copy, version
        elif self.config.weight_transfer == "nccl":
            copy = Snapshot(weights, local_device())
        else:
            before, dtype = self._shared, getattr(torch, self.config.engine_dtype)
            device = local_device() if self.config.gpus_per_engine else torch.device("cpu")
            self._shared = SharedWeights(weights, device, dtype)
            copy = _SharedCopies([self._shared.handle] * self.config.num_engines)
            update = self._thread.submit(self._pool.update_weights(copy, version))
            if before is not None:
                update.add_done_callback(lambda _: before.close())
            return update
        return self._thread.submit(self._pool.update_weights(copy, version))

    def read_weights(self, handles: Sequence[SharedHandle], version: int) -> None:
        """Load weights that ranks share with the workers beside them; see ``SharingEngine``."""
        copies = _SharedCopies(list(handles))
        self._thread.run(self._pool.update_weights(copies, version))

    def merge_obstacle(self) -> str | None:
        """Return why the workers need whole weights; see ``MergingEngine``."""
        if (transfer := self.config.weight_transfer) != "store":
            return f"engine.weight_transfer={transfer} sends whole weights"
        if not hasattr(self.worker_class, "merge_weights"):
            return f"{self.worker_class.__name__} cannot merge them"
        return None

    def merge_weights(self, changes: Mapping[str, LowRankChange], version: int) -> None:
        """Load base weights with low-rank changes into all workers; see ``MergingEngine``."""
        _wait(self.begin_merge(changes, version))

    def begin_merge(
        self, changes: Mapping[str, LowRankChange], version: int
    ) -> concurrent.futures.Future[None]:
        """Copy low-rank changes, and begin to load them; see ``BackgroundEngine``."""
        from delethink.engines.low_rank import pack_changes

        if self._base is None:
            raise PolicyError("low-rank changes need base weights of an earlier update_weights")
        update = _MergedWeights(*self._base, ray.put(pack_changes(changes)))
        return self._thread.submit(self._pool.update_weights(update, version))

    def sleep(self) -> None:
        """Free the GPUs until the next request or update, if ``config.sleep`` is set."""
        if self.config.sleep:
            self._thread.run(self._pool.sleep())

    def take_metrics(self) -> dict[str, float]:
        """Return the metrics of ``WorkerPool.take_metrics``, and export them to Ray."""
        if not self._thread.is_open:
            return {}
        metrics = self._thread.run(self._pool.take_metrics())
        self._export(metrics)
        return {f"engine/{name}": float(value) for name, value in metrics.items()}

    def _export(self, metrics: Mapping[str, float]) -> None:
        """Set Ray's ``delethink_<name>`` and ``delethink_worker_<name>``; faults are counters."""
        from ray.util.metrics import Counter, Gauge

        faults = {field.name for field in dataclasses.fields(FaultCounts)}
        for name, value in metrics.items():
            worker, _, metric = name.rpartition("/")
            key = f"delethink_worker_{metric}" if worker else f"delethink_{metric}"
            is_counter = not worker and metric in faults
            if key not in self._ray_metrics:
                self._ray_metrics[key] = (Counter if is_counter else Gauge)(
                    key, f"{metric} of the pool", tag_keys=("worker",) if worker else ()
                )
            if not is_counter:
                self._ray_metrics[key].set(value, {"worker": worker} if worker else None)
            elif value > 0:
                self._ray_metrics[key].inc(value)

    def close(self) -> None:
        """Stop the workers, and Ray if this pool started it. Safe to call twice, from any thread.

        A second caller returns once the first has closed the pool.
        """
        with self._close_lock:
            if self._thread.is_open:
                with contextlib.suppress(TimeoutError, PolicyError):
                    self._thread.run(self._pool.close(), _CLOSE_TIMEOUT_S)
                self._thread.close()
                self._pool.kill_workers()  # the ones too late to stop
            if self._placement_group is not None and ray.is_initialized():
                ray.util.remove_placement_group(self._placement_group)
            self._placement_group = None
            if self._shared is not None:
                self._shared.close()
            self._connection.close()

    def make_sender(self, actor: Any) -> Any:
        """Make the path of weights from this process's GPU into one worker (nccl).

        Returns:
            An object with the methods of ``delethink.engines.vllm_transfer.VllmWeightSender``; the
            pool makes each call in a thread.

        Raises:
            ConfigError: the engine has no transfer between GPUs.
        """
        raise ConfigError(
            f"{type(self).__name__} does not support weight_transfer="
            f"{self.config.weight_transfer}; use weight_transfer=store"
        )

    def _launch(self, index: int) -> WorkerHandle:
        options: dict[str, Any] = dict(self._resources)
        if self._placement_group is not None:
            from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._placement_group, placement_group_bundle_index=index
            )
        gpu = None
        if self._places is not None:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            node, gpu = self._places[index].node, self._places[index].gpu
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        # Each engine has its own seed, else all would draw alike for requests without one.
        spec = dataclasses.replace(self._spec, seed=self._spec.seed + index, gpu=gpu)
        remote = ray.remote(max_concurrency=_MAX_CALLS, **options)(self.worker_class)
        actor = remote.remote(spec)
        sender = self.make_sender(actor) if self.config.weight_transfer == "nccl" else None
        return _RayWorkerHandle(actor, self.config.startup_timeout, self._resources, sender, index)


class _MergedWeights(NamedTuple):
    """Base weights and their low-rank changes, in Ray's object store."""

    base: Any
    base_version: int
    changes: Any


class _SharedCopies(NamedTuple):
    """Handles of weights in shared memory, by worker."""

    handles: list[SharedHandle]


@dataclasses.dataclass(eq=False)
class _RayWorkerHandle:
    """``WorkerHandle`` of a Ray actor."""

    actor: Any
    startup_timeout_s: float
    resources: Mapping[str, float]
    sender: Any  # result of RayPool.make_sender with weight_transfer=nccl; else None
    index: int = 0

    async def start(self) -> WorkerState:
        is_up = False
        limit = asyncio.timeout(self.startup_timeout_s)
        try:
            async with limit:
                state: WorkerState = await _result(self.actor.start.remote())
                is_up = True
                if self.sender is not None:
                    await _run_in_thread(self.sender.connect)
        except TimeoutError:
            if not limit.expired():
                raise  # raised by the engine or Ray
            within = f"within {self.startup_timeout_s:g} s (startup_timeout)"
            text = f"its engine is up, but the weight transfer did not connect {within}"
            if not is_up:
                needed = dict(self.resources)
                free = {name: ray.available_resources().get(name, 0) for name in ("CPU", "GPU")}
                text = f"gave no answer {within}; it needs {needed}, and Ray has {free} free"
            raise TimeoutError(text) from None
        return state

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        call = self.actor.generate.remote(
            token_array(prompt_ids),  # pickled as one block of bytes
            max_new_tokens,
            dataclasses.replace(sampling, hint=None),  # the hint is for the scheduler alone
        )
        try:
            return await _result(call)
        except asyncio.CancelledError:
            if ray.is_initialized():
                ray.cancel(call)
            raise

    async def stream(
        self,
        prompt_ids: TokenIds,
        max_new_tokens: int,
        sampling: Sampling,
        on_tokens: TokenListener,
    ) -> Completion:
        call = self.actor.stream.options(num_returns="streaming").remote(
            token_array(prompt_ids), max_new_tokens, dataclasses.replace(sampling, hint=None)
        )
        pieces = list[Completion]()
        try:
            async for piece in call:
                pieces.append(await piece)
                on_tokens(pieces[-1].token_ids, pieces[-1].logprobs)
        except ray.exceptions.RayError as error:
            raise cause(error) from None
        except asyncio.CancelledError:
            if ray.is_initialized():
                ray.cancel(call)
            raise
        if not pieces:
            raise PolicyError("ended a stream without a piece")
        return join_completions(pieces)

    async def health(self) -> EngineCounts:
        return await _result(self.actor.health.remote())

    async def update_weights(self, weights: Any, version: int) -> int:
        if (sender := self.sender) is not None:
            return await _run_in_thread(lambda: sender.send(weights, version))
        if isinstance(weights, _SharedCopies):
            weights = weights.handles[self.index]
        if isinstance(weights, _MergedWeights):
            base = [weights.base]  # in a list, Ray sends only the reference
            arguments = base, weights.base_version, weights.changes, version
            return await _result(self.actor.merge_weights.remote(*arguments))
        return await _result(self.actor.update_weights.remote(weights, version))

    async def sleep(self) -> None:
        await _result(self.actor.sleep.remote())

    async def wake(self) -> None:
        await _result(self.actor.wake.remote())

    async def stop(self) -> None:
        await _result(self.actor.stop.remote())

    def kill(self) -> None:
        if ray.is_initialized():
            ray.kill(self.actor)
        if self.sender is not None:  # in a thread: the call may wait for the worker
            threading.Thread(target=self.sender.close, daemon=True).start()


class _LoopThread:
    """An event loop in a daemon thread, for callers from any thread or event loop."""

    def __init__(self) -> None:
        self.is_open = True
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="delethink-pool", daemon=True
        )
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        with contextlib.suppress(RuntimeError):  # the loop was closed
            if self.is_open:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise PolicyError("the pool is closed")

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        try:
            return self.submit(work).result(timeout_s)
        except concurrent.futures.CancelledError:
            raise PolicyError("the pool is closed") from None

    def close(self) -> None:
        """Cancel all coroutines and end the thread."""
        self.is_open = False

        async def cancel_all() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        with contextlib.suppress(concurrent.futures.TimeoutError):
            asyncio.run_coroutine_threadsafe(cancel_all(), self._loop).result(_CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_TIMEOUT_S)
        if not self._loop.is_running():
            self._loop.close()


def _wait(work: concurrent.futures.Future[T]) -> T:
    try:
        return work.result()
    except concurrent.futures.CancelledError:
        raise PolicyError("the pool is closed") from None


async def _result(call: Awaitable[T]) -> T:
    """Await a call of an actor; raise what the actor raised, without Ray's wrapping."""
    try:
        return await call
    except ray.exceptions.RayError as error:
        raise cause(error) from None


async def _run_in_thread(work: Callable[[], T]) -> T:
    """Run a blocking call in a daemon thread: the call may never return."""
    done: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:  # raised by Ray, the engine or CUDA; the pool handles all
            done.set_exception(cause(error))

    done.set_running_or_notify_cancel()
    threading.Thread(target=run, name="delethink-weights", daemon=True).start()
    return await asyncio.wrap_future(done)


def _reserve(config: EngineConfig, resources: Mapping[str, float]) -> Any:
    """Return a placement group with one bundle per worker, or ``None`` if none is configured."""
    if config.node_placement is None:
        return None
    amounts = {"CPU": resources["num_cpus"], "GPU": resources["num_gpus"]}
    bundle = {name: amount for name, amount in amounts.items() if amount}
    group = ray.util.placement_group(
        [bundle] * config.num_engines, strategy=config.node_placement.upper()
    )
    if not group.wait(config.startup_timeout):
        ray.util.remove_placement_group(group)
        free = {name: ray.available_resources().get(name, 0) for name in bundle}
        raise ConfigError(
            f"Ray has no room for {config.num_engines} workers of {bundle} each; {free} is free"
        )
    return group


def cpus_per_engine(config: EngineConfig) -> float:
    """Return the CPUs reserved for each engine."""
    if config.cpus_per_engine is not None:
        return config.cpus_per_engine
    if config.gpus_per_engine > 0:
        return 1.0
    # One core is left to the driver: engine threads on a shared core wait for each other.
    return max(1.0, (_num_cores() - 1) // config.num_engines)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))
