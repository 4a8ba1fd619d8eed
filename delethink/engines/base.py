"""Interfaces of engines, and of the workers of the Ray pool, which hold one engine each.

There are two ways to add an engine. An engine in this process, or behind HTTP, implements
``Engine``. An engine in Ray workers needs a class with the methods of ``Worker``, and a subclass of
``delethink.engines.ray.RayPool`` with this class as ``worker_class``; the pool brings dispatch,
retries, health checks, restarts and weight updates. Either class is then registered in the group
``delethink.engines``.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from delethink.config import EngineConfig
from delethink.policy import Completion, Policy, Sampling, TokenListener
from delethink.types import TokenIds

if TYPE_CHECKING:
    import torch

    from delethink.engines.low_rank import LowRankChange
    from delethink.engines.weight_sync import SharedHandle


class Engine(Policy, Protocol):
    """A policy with replaceable weights.

    Attributes:
        max_model_tokens: longest sequence (prompt and new tokens) of the engine.

    An engine with the attribute ``shares_weights`` set samples from the trainer's own model: its
    ``update_weights`` only counts.

    An engine with the attribute ``computes_elsewhere`` set leaves the event loop of its caller free
    while it samples. The others get a thread of their own where it matters.
    """

    max_model_tokens: int

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
        """Make an engine.

        Args:
            config: the section ``engine:`` of a recipe.
            model_path: folder or Hugging Face id of the checkpoint.
            model: the model of the trainer, in this process; ``None`` if nothing is trained, and
                the engine loads the checkpoint.
            tokenizer: tokenizer of the model.
            trust_remote_code: run code from the model's repository.
            seed: seed of requests without a seed of their own.
            is_trained: the trainer updates ``model`` itself.

        Raises:
            UserError: the settings or the checkpoint cannot be used.
        """

    def update_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Load new weights; every token sampled after the return comes from them.

        Args:
            weights: whole state of the model under the names of its checkpoint.
            version: number of weight updates so far; the ``policy_version`` of completions.

        Raises:
            WeightSyncError: the engine refused the weights, or computes with others afterwards.
        """

    def take_metrics(self) -> dict[str, float]:
        """Return the metrics since the last call, under keys ``engine/<name>``."""

    def sleep(self) -> None:
        """Free the GPU for the trainer, if configured; the next request wakes the engine."""

    def close(self) -> None:
        """Release everything, worker processes included. Safe to call twice."""


class StartingEngine(Engine, Protocol):
    """An engine that starts while the trainer's libraries load; optional."""

    @classmethod
    def connect_early(cls, config: EngineConfig) -> Any:
        """Begin what needs the settings only; return it, with ``close`` if it is not used."""

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
        connection: Any,
    ) -> Self:
        """Begin to make an engine for training, and return at once.

        The arguments are those of ``create``. ``shell`` has ``config`` and ``generation_config`` of
        the model, and ``connection`` is the result of ``connect_early``.
        """

    def wait(self) -> None:
        """Wait until the engine can sample; raise as ``create``, and close it then."""


class MergingEngine(Engine, Protocol):
    """An engine that merges low-rank changes into base weights itself; optional."""

    def merge_obstacle(self) -> str | None:
        """Return why the engine needs whole weights after all, or ``None``."""

    def merge_weights(self, changes: Mapping[str, LowRankChange], version: int) -> None:
        """Load the weights of the last ``update_weights``, with low-rank changes added.

        Args:
            changes: the change of each adapted weight, under the name of the weight.
            version: as ``update_weights``.

        Raises:
            WeightSyncError: as ``update_weights``.
        """


class SharingEngine(Engine, Protocol):
    """An engine that reads weights in memory shared with the trainer's ranks; optional."""

    def read_weights(self, handles: Sequence[SharedHandle], version: int) -> None:
        """Load new weights, as ``update_weights`` does.

        Args:
            handles: one for each worker, of memory on its machine. The memory stays unchanged until
                the next call, or until the engine sleeps.
            version: as ``update_weights``.

        Raises:
            WeightSyncError: as ``update_weights``.
        """


class BackgroundEngine(Engine, Protocol):
    """An engine that takes weights while the trainer goes on; optional."""

    def begin_update(
        self, weights: Mapping[str, torch.Tensor], version: int
    ) -> concurrent.futures.Future[None]:
        """Begin ``update_weights``; the weights may change as soon as this returns.

        Chunks of later calls of ``generate`` come from these weights or newer ones.
        """

    def begin_merge(
        self, changes: Mapping[str, LowRankChange], version: int
    ) -> concurrent.futures.Future[None]:
        """Begin ``merge_weights``, in the same way."""


@dataclass(frozen=True)
class WorkerPlace:
    """A place of a worker in a Ray cluster, beside a rank of the trainer."""

    node: str  # id of the node
    gpu: str | None  # id of the rank's GPU on the node; None without


@dataclass(frozen=True)
class WorkerSpec:
    """Everything needed to start the engine of a worker."""

    model: str  # folder, or Hugging Face id with its revision (``split_revision``)
    config: EngineConfig
    eos_ids: TokenIds  # the only tokens to end an answer
    max_model_tokens: int | None  # None: the model's own limit
    trust_remote_code: bool
    seed: int
    threads: int  # CPU threads of an engine without a GPU
    gpu: str | None = None  # the one GPU it sees, as in CUDA_VISIBLE_DEVICES; None: Ray's choice


@dataclass(frozen=True)
class WorkerState:
    """Properties of a started engine."""

    pid: int
    max_model_tokens: int
    batch_size: int  # chunks sampled at once


@dataclass(frozen=True)
class EngineCounts:
    """Counters of an engine since its start."""

    steps: int = 0  # forward passes
    tokens: int = 0  # sampled tokens
    running: int = 0  # sum over steps of the chunks in the batch
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits: int = 0  # prompt tokens found there
    waiting: int = 0  # chunks without room in the batch, after the last step: no sum


class Worker(Protocol):
    """Duties of a worker: an engine in the Ray pool is a class with these methods.

    The pool makes the class an asynchronous Ray actor with one argument, a ``WorkerSpec``, and
    calls ``start`` first. Calls of ``generate`` and ``health`` overlap; the pool calls the other
    methods only between chunks. An exception ends the attempt at a chunk:

    - ``ConnectionError``: the engine is gone, and the pool restarts the worker.
    - ``UserError`` (``ConfigError``, say): the request is at fault, and its caller gets the error.
    - any other: the chunk goes to another worker. If there is another, the pool restarts a worker
      after several errors without a chunk in between.

    The worker itself applies the settings of ``spec.config`` for its engine: ``engine_dtype``,
    ``max_batch_size``, ``tensor_parallel_size``, ``kv_cache_gib``, ``gpu_memory_utilization``,
    ``sleep``, and ``verify_weights`` (``weight_check.py``, used in ``vllm_extension.py``).
    """

    async def start(self) -> WorkerState:
        """Start the engine and return once sampling is possible."""

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """Sample a chunk, as ``Policy.generate`` does.

        The tokens must depend on the prompt, the seed and the weights alone, because any worker may
        repeat the chunk. ``policy_version`` is the version of the last ``update_weights``. A
        cancelled call frees its place in the batch.
        """

    async def health(self) -> EngineCounts:
        """Return the counters of the engine at once, also while the engine is busy.

        The pool calls this every two seconds. A worker with chunks counts as hung if its ``steps``
        stay the same for ``hang_timeout``.
        """

    async def update_weights(self, weights: Any, version: int) -> int:
        """Load new weights, drop the prefix cache, and return the version of the weights.

        Args:
            weights: a mapping from names to bytes, dtype and shape (``weight_sync.pack``), which an
                engine in another process gets by ``weight_sync.write`` and ``read``. With
                ``weight_transfer=ipc``, a ``weight_sync.SharedHandle`` for ``read``.
            version: number of the update.

        Raises:
            WeightSyncError: the weights do not fit the model. The worker then samples nothing until
                an update succeeds.
        """

    async def sleep(self) -> None:
        """Free the memory of the GPU; only called with ``engine.sleep=true``."""

    async def wake(self) -> None:
        """Take the memory of the GPU back."""

    async def stop(self) -> None:
        """Shut the engine down; the pool kills the actor afterwards."""


class MergingWorker(Worker, Protocol):
    """A worker that merges low-rank changes into base weights; optional."""

    async def merge_weights(
        self, base: list[Any], base_version: int, changes: Any, version: int
    ) -> int:
        """Load base weights with low-rank changes added, and return the version.

        Args:
            base: one awaitable of the argument of ``update_weights``, for a worker without them.
            base_version: version of the base weights.
            changes: ``low_rank.PackedChanges``.
            version: number of the update.

        Raises:
            WeightSyncError: as ``update_weights``.
        """


class StreamingWorker(Worker, Protocol):
    """A worker that gives tokens out while it samples; optional."""

    def stream(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> AsyncIterator[Completion]:
        """Sample a chunk as ``generate`` does, in pieces.

        Yields:
            The tokens since the piece before. The stop reason of the last piece is the chunk's, and
            that of the others is ``length``.
        """


class WorkerHandle(Worker, Protocol):
    """A running worker as the pool holds it, from one start to the next."""

    async def stream(
        self,
        prompt_ids: TokenIds,
        max_new_tokens: int,
        sampling: Sampling,
        on_tokens: TokenListener,
    ) -> Completion:
        """Sample a chunk as ``generate`` does, and pass on its tokens; see ``StreamingPolicy``."""

    def kill(self) -> None:
        """End the worker and its engine at once, whatever they do."""
