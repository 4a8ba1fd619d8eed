"""Workers in Ray actors: room for them in the cluster, and each life of one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from delethink.engines.channel import SECRET_BYTES, Channel
from delethink.engines.cluster import cause
from delethink.engines.exchange import (
    Job,
    Report,
    WorkerHandle,
    WorkerState,
    decode_report,
    encode_jobs,
)
from delethink.engines.pool_worker import say
from delethink.engines.vllm import VllmWorker, WorkerConfig
from delethink.errors import ConfigError

try:
    import ray
except ImportError:  # the pool says so when one is made
    ray = None

if TYPE_CHECKING:
    import torch

    from delethink.engines.weight_sync import Transfer

T = TypeVar("T")
_logger = logging.getLogger(__name__)

_MAX_CALLS = 1_000  # at one worker at a time
_SILENCE_S = 2.0  # after which a worker says that it is alive
_CONNECT_TIMEOUT_S = 10.0
_ACCOUNT_S = 5.0  # for which Ray's account of a lost worker is waited for


class Room:
    """What Ray sets aside for each of a pool's workers.

    Args:
        resources: of a worker, as options of an actor.
        num_workers: how many there are.
        placement: "pack" or "spread" sets all aside at once; ``None`` as each worker starts.
        timeout_s: seconds that this may take, and each start of a worker.
        sends_from: the GPU from which weights go to workers, where they do not go by Ray.

    Raises:
        ConfigError: the cluster has not got it.
    """

    def __init__(
        self,
        resources: Mapping[str, float],
        num_workers: int,
        placement: str | None,
        timeout_s: float,
        sends_from: torch.device | None = None,
    ) -> None:
        self.resources, self.timeout_s, self.sends_from = resources, timeout_s, sends_from
        self._group = _reserve(placement, resources, num_workers, timeout_s)

    def launch(self, index: int, config: WorkerConfig) -> WorkerHandle:
        """Begins a life of the worker of an index."""
        options: dict[str, Any] = dict(self.resources)
        if self._group is not None:
            from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=index
            )
        remote = ray.remote(max_concurrency=_MAX_CALLS, **options)(VllmWorker)
        return _RayWorker(remote.remote(config), config, self)

    def give_up(self) -> None:
        """Lets others have it."""
        if self._group is not None and ray.is_initialized():
            ray.util.remove_placement_group(self._group)
        self._group = None


class _RayWorker:
    """A worker in a Ray actor: ``WorkerHandle``."""

    def __init__(self, actor: Any, config: WorkerConfig, room: Room) -> None:
        self._actor, self._config, self._room = actor, config, room
        self._channel: Channel | None = None  # None: by way of Ray
        self._tasks: set[asyncio.Task[None]] = set()
        self._lose: Callable[[Exception], None] | None = None
        self._transfer: Transfer | None = None
        if room.sends_from is not None:
            from delethink.engines.weight_sync import Transfer

            ranks = config.tensor_parallel_size
            self._transfer = Transfer(config.weight_transfer, actor, ranks, room.sends_from)

    async def start(self) -> WorkerState:
        state: WorkerState | None = None
        limit = asyncio.timeout(self._room.timeout_s)
        try:
            async with limit:
                state = await _ask(self._actor.start.remote())
                if self._transfer is not None:
                    await _in_thread(self._transfer.meet)
        except TimeoutError:
            if not limit.expired():
                raise  # of vLLM or Ray
            raise TimeoutError(self._what_is_late(has_engine=state is not None)) from None
        await self._connect()
        return state

    def _what_is_late(self, has_engine: bool) -> str:
        within = f"within {self._room.timeout_s:g} s"
        if has_engine:
            return (
                f"its engine is up, but it did not meet the trainer {within} for the transfer of "
                f"weights (weight_transfer={self._config.weight_transfer!r})"
            )
        free = {name: ray.available_resources().get(name, 0) for name in ("CPU", "GPU")}
        asked = dict(self._room.resources)
        return f"gave no answer {within}; it asks for {asked}, and Ray has {free} left"

    async def _connect(self) -> None:
        """Chunks go over a connection of their own, unless that cannot be or must not."""
        if _is_encrypted():
            return
        secret, node = secrets.token_bytes(SECRET_BYTES), ray.get_runtime_context().get_node_id()
        channel, where = Channel(), "its node"
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                host, port = await _ask(self._actor.listen.remote(secret, node, _SILENCE_S))
                where = f"{host}, port {port}"
                await channel.open(host, port, secret)
        except OSError as error:  # TimeoutError among them
            _logger.warning(
                "a worker cannot be reached at %s (%s): its chunks go by way of Ray, which takes "
                "the driver longer; nodes of the cluster must reach each other's ports",
                *(where, say(error)),
            )
            return
        self._channel = channel

    def attend(self, hear: Callable[[Report], None], lose: Callable[[Exception], None]) -> None:
        self._lose = lose
        self._spawn(self._live())
        if self._channel is None:
            self._spawn(self._ask_for_reports(hear))
            return
        self._channel.attend(
            lambda said: hear(decode_report(said)), lambda why: self._spawn(self._disconnected(why))
        )

    async def _live(self) -> None:
        """Ray knows why a worker was lost, and also that a whole node was."""
        await _ask(self._actor.live.remote())

    async def _ask_for_reports(self, hear: Callable[[Report], None]) -> None:
        while True:
            hear(decode_report(await _ask(self._actor.report.remote(_SILENCE_S))))

    async def _disconnected(self, why: Exception) -> None:
        """Where the worker did not say why, Ray may know, soon."""
        if isinstance(why, OSError):
            await asyncio.sleep(_ACCOUNT_S)
        raise why

    def send(self, jobs: Sequence[Job], dropped: Sequence[int]) -> None:
        sent = encode_jobs(jobs, dropped)
        if self._channel is not None:
            self._channel.send(sent)
        else:
            self._spawn(self._take(sent))

    async def _take(self, sent: bytes) -> None:
        await _ask(self._actor.take.remote(sent))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """What it raises is the end of the worker."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or not isinstance(problem := task.exception(), Exception):
            return
        lose, self._lose = self._lose, None
        if lose is not None:
            lose(problem)

    async def update(self, weights: Any, version: int) -> int:
        if (transfer := self._transfer) is not None:
            return await _in_thread(lambda: transfer.send(weights, version))
        said: int = await _ask(self._actor.update.remote(weights, version))
        return said

    async def sleep(self) -> None:
        await _ask(self._actor.sleep.remote())

    async def wake(self) -> None:
        await _ask(self._actor.wake.remote())

    async def stop(self) -> None:
        await _ask(self._actor.stop.remote())

    def kill(self) -> None:
        self._lose = None
        if self._channel is not None:
            self._channel.close()
        for task in self._tasks:
            task.cancel()
        if ray.is_initialized():
            ray.kill(self._actor)
        if self._transfer is not None:  # it may be waiting for the worker
            threading.Thread(target=self._transfer.close, daemon=True).start()


def _is_encrypted() -> bool:
    """Whether the cluster encrypts what is said in it, which a connection of our own does not."""
    return os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true")


async def _ask(call: Any) -> Any:
    try:
        return await call
    except ray.exceptions.RayError as error:
        raise cause(error) from None


async def _in_thread(work: Callable[[], T]) -> T:
    """Of its own, which dies with the process: what waits in it may never end."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(tell: Callable[[Any], None], outcome: Any) -> None:
        if not done.done():
            tell(outcome)

    def run() -> None:
        outcome: tuple[Callable[[Any], None], Any]
        try:
            outcome = done.set_result, work()
        except Exception as error:  # of Ray, vLLM or CUDA: the pool judges
            outcome = done.set_exception, cause(error)
        with contextlib.suppress(RuntimeError):  # the pool is closed
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name="delethink-weights", daemon=True).start()
    return await done


def _reserve(
    placement: str | None, resources: Mapping[str, float], num_workers: int, timeout_s: float
) -> Any:
    """A placement group with a bundle for each worker, or ``None`` where none was asked for."""
    if placement is None:
        return None
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    bundle = {names[name]: amount for name, amount in resources.items() if amount}
    group = ray.util.placement_group([bundle] * num_workers, strategy=placement.upper())
    if not group.wait(timeout_s):
        ray.util.remove_placement_group(group)
        raise ConfigError(
            f"Ray has no room for {num_workers} workers of {bundle} each; it has "
            f"{ {name: ray.available_resources().get(name, 0) for name in bundle} } left"
        )
    return group
