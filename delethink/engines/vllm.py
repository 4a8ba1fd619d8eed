"""One vLLM engine in a Ray actor: token ids go in and come out; nothing is tokenized here.

    RayPool (driver)  ──►  VllmWorker (Ray actor)  ──►  AsyncLLM  ──►  engine process

vLLM is imported where it is used, because the driver loads this module to describe the actor and
need not have vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from delethink.config import WeightTransfer
from delethink.engines.channel import Listener
from delethink.engines.cluster import address_for
from delethink.engines.exchange import (
    Answer,
    Job,
    Report,
    WorkerState,
    decode_jobs,
    encode_report,
)
from delethink.engines.vllm_process import EXECUTOR
from delethink.engines.vllm_weights import Packed, WeightUpdates, write
from delethink.errors import MissingExtraError, PolicyError, WeightSyncError
from delethink.types import StopReason, TokenIds

T = TypeVar("T")

_STOP = {"stop": StopReason.EOS, "length": StopReason.LENGTH, "abort": StopReason.ABORT}
_LINGER_SHARE = 0.5  # of the time that a chunk takes, for which an answer waits for others
_HASTE = 0.04  # the share of that where the engine has nothing left to begin
_MOST_LINGER_S = 1.0
_LOG_BYTES = 65_536  # how far back the last error is looked for
# vLLM's own errors only refer to what its engine process wrote; this is what is looked for there.
_ERROR = re.compile(
    r"\b(?!EngineDeadError|EngineGenerateError)\w*(?:Error|Exception): (?!Engine core ).+"
)
_RPC_PREFIX = "Call to collective_rpc method failed: "


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker needs to know to start its engine."""

    model: str  # folder or hub id
    eos_ids: TokenIds  # tokens that end an answer, and no others
    max_model_tokens: int | None  # None takes the model's own limit
    dtype: str
    seed: int
    on_gpu: bool
    threads: int  # of the engine, on the CPU
    kv_cache_gib: float  # on the CPU
    gpu_memory_utilization: float  # on a GPU
    trust_remote_code: bool
    max_batch_size: int | None = None  # None takes vLLM's own
    tensor_parallel_size: int = 1
    can_sleep: bool = False
    weight_transfer: WeightTransfer = "store"


class VllmWorker:
    """A vLLM engine that is given chunks and reports them; made to be an asynchronous Ray actor."""

    extension: type = WeightUpdates  # what is mixed into vLLM's worker

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._engine: Any = None
        self._version = 0
        self._broken = ""  # why no chunk is sampled, if so
        self._tasks: dict[int, asyncio.Task[None]] = {}  # by the number of the job
        self._answers: list[Answer] = []
        self._counter: Any = None
        self._batch_size = 0
        self._news = asyncio.Event()
        self._seconds_per_chunk = 0.0  # smoothed
        self._listener: Listener | None = None

    async def start(self) -> WorkerState:
        """Starts the engine, and samples a token, so that the first chunk finds it warm.

        Raises:
            MissingExtraError: vLLM is not installed here.
            RuntimeError: vLLM did not start; the text is what its engine process said.
        """
        _set_environment(self._config)
        gc.set_threshold(50_000)  # as delethink.cli.process does
        try:
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise MissingExtraError("vllm", "vllm") from error
        from delethink.engines.vllm_counter import make_counter

        counters: list[Any] = []
        try:
            self._engine = AsyncLLM.from_engine_args(
                _engine_args(self._config, self.extension), stat_loggers=[make_counter(counters)]
            )
            async for _ in self._engine.generate(
                {"prompt_token_ids": [0]}, _sampling_params(1, 1.0, None, ()), "warm-up"
            ):
                pass
        except Exception as error:
            raise RuntimeError(_last_error() or str(error)) from error
        (self._counter,) = counters
        self._counter.clear()
        vllm_config = self._engine.vllm_config
        self._batch_size = vllm_config.scheduler_config.max_num_seqs
        return WorkerState(
            pid=os.getpid(),
            max_model_tokens=vllm_config.model_config.max_model_len,
            batch_size=self._batch_size,
        )

    async def listen(self, secret: bytes, peer: str, silence_s: float) -> tuple[str, int]:
        """Takes jobs and reports over a connection as well, with who knows the secret.

        Args:
            secret: see ``Listener``.
            peer: Ray's id of the node where the other end is.
            silence_s: see ``report``.

        Returns:
            Host and port.
        """
        host = address_for(peer)
        self._listener = Listener(self._take, lambda: self.report(silence_s), secret)
        return host, await self._listener.start(host)

    async def live(self) -> None:
        """Does not return: who waits for it is told by Ray when the worker is lost."""
        await asyncio.Event().wait()

    async def take(self, sent: bytes) -> None:
        """Takes jobs on and gives others up.

        Args:
            sent: encoded, the jobs and the numbers of those that are taken back.
        """
        self._take(sent)

    def _take(self, sent: bytes | bytearray) -> None:
        jobs, dropped = decode_jobs(sent)
        for job in jobs:
            self._tasks[job.number] = asyncio.create_task(self._do(job))
        for number in dropped:
            if (task := self._tasks.pop(number, None)) is not None:
                task.cancel()

    async def report(self, silence_s: float) -> bytes:
        """What has been done since the last report, encoded.

        It waits for something to report, for ``silence_s`` at most, and for a little more to come,
        so that the driver need not look at each chunk on its own.
        """
        await self._wait(silence_s, lambda: not self._answers)
        if self._answers:
            await self._linger()
        answers, self._answers = self._answers, []
        return encode_report(Report(answers, self._counter.counts()))

    async def _linger(self) -> None:
        """Waits for more answers, for longer while the engine has chunks that it has not begun."""
        most = min(_MOST_LINGER_S, _LINGER_SHARE * self._seconds_per_chunk)
        await self._wait(most, lambda: len(self._tasks) > self._batch_size)
        await self._wait(most * _HASTE, lambda: True)

    async def _wait(self, seconds: float, goes_on: Callable[[], bool]) -> None:
        """Until time is up, or an answer has ended the reason."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while goes_on():
                    self._news.clear()
                    await self._news.wait()

    async def _do(self, job: Job) -> None:
        """A job, to its answer."""
        started = time.monotonic()
        try:
            answer = await self._sample(job)
        except Exception as error:  # the boundary to vLLM: it is the driver's to judge
            answer = Answer(job.number, error=error)
        took = time.monotonic() - started
        self._seconds_per_chunk += 0.1 * (took - self._seconds_per_chunk)
        if self._tasks.pop(job.number, None) is not None:  # else it was given up meanwhile
            self._answers.append(answer)
            self._news.set()

    async def _sample(self, job: Job) -> Answer:
        if self._broken:
            raise PolicyError(f"takes no requests since an update of weights {self._broken}")
        params = _sampling_params(
            job.max_new_tokens, job.temperature, job.seed, self._config.eos_ids
        )
        prompt = {"prompt_token_ids": job.prompt_ids}
        try:
            async for output in self._engine.generate(prompt, params, str(job.number)):
                last = output.outputs[0]
        except Exception as error:
            raise self._explain(error) from None
        if last.finish_reason not in _STOP:
            raise PolicyError(f"ended a request with {last.finish_reason!r}: {_last_error()}")
        return Answer.pack(
            job.number,
            last.token_ids,
            last.logprobs.logprobs,
            _STOP[last.finish_reason],
            self._version,
        )

    def _explain(self, error: Exception) -> Exception:
        """What went wrong in the engine, in words of its own where it has any."""
        if self._engine.errored:
            said = _last_error() or "none"
            return ConnectionError(f"has lost its vLLM engine process; last error logged: {said}")
        return PolicyError(f"failed: {error.__cause__ or error}".replace(_RPC_PREFIX, ""))

    async def update(self, weights: Packed, version: int) -> int:
        """Takes up new weights; the pool sees to it that nothing is being sampled.

        Returns:
            The version that the engine process says it runs.

        Raises:
            WeightSyncError: they do not fit the model, or the engine runs others afterwards. The
                worker samples nothing until an update succeeds.
            ConnectionError: the engine process died.
        """
        await self._rest()
        file, slots = write(weights)
        try:
            path = f"/proc/{os.getpid()}/fd/{file}"
            return await self._take_up("delethink_load", path, slots, version)
        finally:
            os.close(file)

    async def expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Gets ready for weights by vLLM's own transfer: see ``weight_transfer``.

        Raises:
            WeightSyncError: they do not fit the model.
            ConnectionError: the engine process died.
        """
        await self._rest()
        await self._ask_engine("delethink_expect", shapes)

    async def init_weight_transfer_engine(self, request: Any) -> None:
        """For vLLM's trainer side: meets it."""
        await self._pass_on(self._engine.init_weight_transfer_engine(request))

    async def start_weight_update(self) -> None:
        """For vLLM's trainer side: begins an update."""
        await self._pass_on(self._engine.start_weight_update())

    async def update_weights(self, request: Any) -> None:
        """For vLLM's trainer side: receives weights."""
        await self._pass_on(self._engine.update_weights(request))

    async def finish_weight_update(self) -> None:
        """For vLLM's trainer side: ends an update."""
        await self._pass_on(self._engine.finish_weight_update())

    async def confirm(self, version: int, digests: Mapping[str, str]) -> int:
        """Ends what ``expect`` began; raises and returns as ``update`` does."""
        return await self._take_up("delethink_confirm", version, digests)

    async def _pass_on(self, call: Awaitable[T]) -> T:
        """A call of the engine; what goes wrong is raised in words of its own."""
        try:
            return await call
        except Exception as error:  # the boundary to vLLM: the pool judges
            raise self._explain(error) from None

    async def _rest(self) -> None:
        """Samples nothing until weights have been taken up."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._broken = "was interrupted"

    async def _take_up(self, method: str, *arguments: Any) -> int:
        """Lets the engine run other weights; it samples again if it says that it does."""
        said = await self._ask_engine(method, *arguments)
        if len(set(said)) != 1:
            self._refuse(f"its {len(said)} parts run different versions: {said}")
        if not await self._engine.reset_prefix_cache():
            self._refuse("vLLM did not empty its prefix cache")
        self._version, self._broken = int(said[0]), ""
        return self._version

    async def _ask_engine(self, method: str, *arguments: Any) -> list[int]:
        """What each rank of the engine says to a call of ``WeightUpdates``."""
        said = await self._pass_on(self._engine.collective_rpc(method, args=arguments))
        for answer in said:
            if isinstance(answer, str):
                self._refuse(f"failed: {answer}")
        return list(said)

    def _refuse(self, why: str) -> NoReturn:
        self._broken = why
        raise WeightSyncError(why) from None

    async def sleep(self) -> None:
        """Moves the weights to the host and gives up the cache, so that the GPU is free."""
        await self._engine.sleep(level=1)

    async def wake(self) -> None:
        """Takes the GPU again."""
        await self._engine.wake_up()

    async def stop(self) -> None:
        """Ends the engine process."""
        if self._listener is not None:
            self._listener.close()
        if self._engine is not None:
            self._engine.shutdown()


def _sampling_params(
    max_new_tokens: int, temperature: float, seed: int | None, eos_ids: TokenIds
) -> Any:
    """The distribution of the model itself, at a temperature, and nothing else."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=temperature,
        seed=seed,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        repetition_penalty=1.0,
        max_tokens=max_new_tokens,
        ignore_eos=True,  # of the model's configuration: the pool says which tokens end an answer
        stop_token_ids=list(eos_ids),
        logprobs=0,  # of the sampled token alone
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _engine_args(config: WorkerConfig, extension: type) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    on_device: dict[str, Any] = {
        "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
        "enforce_eager": True,
        # Where vLLM splits the prompt of a request with a seed, its engine dies on the CPU, because
        # generators of the CPU cannot be wound back.
        "enable_chunked_prefill": False,
    }
    if config.on_gpu:
        on_device = {
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "enable_sleep_mode": config.can_sleep,
        }
    if config.weight_transfer != "store":
        from vllm.config import WeightTransferConfig

        on_device["weight_transfer_config"] = WeightTransferConfig(config.weight_transfer)
    return AsyncEngineArgs(
        model=config.model,
        skip_tokenizer_init=True,
        trust_remote_code=config.trust_remote_code,
        dtype=config.dtype,
        seed=config.seed,
        max_model_len=config.max_model_tokens,
        generation_config="vllm",
        # After temperature; greedy requests are not scaled, so theirs are at temperature 1.
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=True,
        distributed_executor_backend="uni" if config.tensor_parallel_size == 1 else EXECUTOR,
        worker_extension_cls=f"{extension.__module__}.{extension.__qualname__}",
        disable_log_stats=True,  # but for what vllm_counter counts
        tensor_parallel_size=config.tensor_parallel_size,
        **_where_given(max_num_seqs=config.max_batch_size),
        **on_device,
    )


def _where_given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _set_environment(config: WorkerConfig) -> None:
    """Must come before vLLM is imported; the engine process inherits it."""
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if config.weight_transfer == "ipc":
        # Handles of memory go from the actor to its own engine process in Python's format.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if not config.on_gpu:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else "uni" becomes one more process
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # in whole GiB only, and overrides ours
        os.environ["OMP_NUM_THREADS"] = str(max(1, config.threads // config.tensor_parallel_size))
        if config.tensor_parallel_size > 1:  # else vLLM wants a NUMA node for each rank
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # vLLM compiles a helper of its sampler even in eager mode: half a minute, to no gain here.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def _last_error() -> str:
    """The last error in what this process and its engine wrote; empty where there is none."""
    text = ""
    for descriptor in (1, 2):  # files, in a Ray actor
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if path.is_file():
            text += path.read_text(errors="replace")[-_LOG_BYTES:]
    found: list[str] = _ERROR.findall(text)
    return found[-1] if found else ""
