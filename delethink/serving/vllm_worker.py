"""One vLLM engine in a Ray actor: token ids go in and come out; nothing is tokenized here.

    RayPool (driver)  ──►  VllmWorker (Ray actor)  ──►  AsyncLLM  ──►  engine process

vLLM is imported where it is used, because the driver loads this module to describe the actor and
need not have vLLM.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delethink.errors import MissingExtraError, PolicyError, WeightSyncError
from delethink.policy import Completion, Sampling
from delethink.serving.vllm_weights import Packed, WeightUpdates, write
from delethink.types import StopReason, TokenIds

_STOP = {"stop": StopReason.EOS, "length": StopReason.LENGTH, "abort": StopReason.ABORT}
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


@dataclass(frozen=True)
class WorkerState:
    """What a worker says of itself once it has started."""

    pid: int
    max_model_tokens: int


class VllmWorker:
    """A vLLM engine behind the policy protocol; made to be an asynchronous Ray actor."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._engine: Any = None
        self._ids = itertools.count()
        self._version = 0
        self._broken = ""  # why no request is taken, if so
        self._in_flight = 0
        self._gate = asyncio.Lock()  # held while weights change
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> WorkerState:
        """Starts the engine.

        Raises:
            MissingExtraError: vLLM is not installed here.
            RuntimeError: vLLM did not start; the text is what its engine process said.
        """
        _set_environment(self._config)
        try:
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise MissingExtraError("vllm", "vllm") from error
        try:
            self._engine = AsyncLLM.from_engine_args(_engine_args(self._config))
        except Exception as error:
            raise RuntimeError(_last_error() or str(error)) from error
        return WorkerState(os.getpid(), self._engine.model_config.max_model_len)

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """Samples from ``prompt_ids``; waits while weights change.

        Raises:
            PolicyError: the worker is without sound weights, or vLLM ended the request in error.
            ConnectionError: the engine process died.
        """
        async with self._gate:
            if self._broken:
                raise PolicyError(f"takes no requests since an update of weights {self._broken}")
            self._in_flight += 1
            self._idle.clear()
        try:
            return await self._sample(prompt_ids, max_new_tokens, sampling)
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def _sample(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        params = _sampling_params(max_new_tokens, sampling, self._config.eos_ids)
        prompt = {"prompt_token_ids": list(prompt_ids)}
        try:
            async for output in self._engine.generate(prompt, params, str(next(self._ids))):
                last = output.outputs[0]
        except Exception as error:
            raise self._explain(error) from None
        if last.finish_reason not in _STOP:
            raise PolicyError(f"ended a request with {last.finish_reason!r}: {_last_error()}")
        return Completion(
            token_ids=tuple(last.token_ids),
            logprobs=tuple(last.logprobs.logprobs),
            stop=_STOP[last.finish_reason],
            policy_version=self._version,
        )

    def _explain(self, error: Exception) -> Exception:
        """What went wrong in the engine, in words of its own where it has any."""
        if self._engine.errored:
            said = _last_error() or "none"
            return ConnectionError(f"has lost its vLLM engine process; last error logged: {said}")
        return PolicyError(f"failed: {error.__cause__ or error}".replace(_RPC_PREFIX, ""))

    async def update(self, weights: Packed, version: int) -> int:
        """Takes up new weights once no request is in flight; holds new requests until then.

        Returns:
            The version that the engine process says it runs.

        Raises:
            WeightSyncError: they do not fit the model, or the engine runs others afterwards. The
                worker takes no requests until an update succeeds.
        """
        async with self._gate:
            await self._idle.wait()
            self._broken = "was interrupted"
            try:
                self._version = await self._load(weights, version)
            except Exception as error:
                self._broken = str(self._explain(error))
                raise WeightSyncError(self._broken) from None
            self._broken = ""
            return self._version

    async def _load(self, weights: Packed, version: int) -> int:
        file, slots = write(weights)
        try:
            path = f"/proc/{os.getpid()}/fd/{file}"
            arguments = (path, slots, version)
            (said,) = await self._engine.collective_rpc("delethink_load", args=arguments)
        finally:
            os.close(file)
        if not await self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache")
        return int(said)

    async def stop(self) -> None:
        """Ends the engine process."""
        if self._engine is not None:
            self._engine.shutdown()


def _sampling_params(max_new_tokens: int, sampling: Sampling, eos_ids: TokenIds) -> Any:
    """The distribution of the model itself, at a temperature, and nothing else."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        seed=sampling.seed,
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


def _engine_args(config: WorkerConfig) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    on_device: dict[str, Any] = {
        "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
        "enforce_eager": True,
        # Where vLLM splits the prompt of a request with a seed, its engine dies on the CPU, because
        # generators of the CPU cannot be wound back.
        "enable_chunked_prefill": False,
        "distributed_executor_backend": "uni",
    }
    if config.on_gpu:
        on_device = {"gpu_memory_utilization": config.gpu_memory_utilization}
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
        worker_extension_cls=f"{WeightUpdates.__module__}.{WeightUpdates.__qualname__}",
        disable_log_stats=True,
        **on_device,
    )


def _set_environment(config: WorkerConfig) -> None:
    """Must come before vLLM is imported; the engine process inherits it."""
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if not config.on_gpu:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else "uni" becomes one more process
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # in whole GiB only, and overrides ours
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
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
