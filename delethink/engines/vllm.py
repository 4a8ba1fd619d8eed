"""vLLM engines in Ray workers: token ids in, token ids out; nothing is tokenized here.

    VllmPool (driver) -> VllmWorker (Ray actor) -> AsyncLLM -> engine process

vLLM is imported inside functions: the driver loads this module to describe the actor and need not
have vLLM.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import os
import re
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from delethink.engines.base import EngineCounts, WorkerSpec, WorkerState
from delethink.engines.engine_faults import explain_start
from delethink.engines.loading import import_transformers, split_revision
from delethink.engines.ray import RayPool
from delethink.errors import ConfigError, MissingExtraError, PolicyError, WeightSyncError
from delethink.policy import Completion, Sampling, join_completions
from delethink.tokens import as_list, logprob_array, token_array
from delethink.types import StopReason, TokenIds

if TYPE_CHECKING:
    from delethink.engines.weight_sync import WeightSlot

_STOP = {"stop": StopReason.EOS, "length": StopReason.LENGTH, "abort": StopReason.ABORT}
_PIECE_S = 0.05  # between two pieces of a stream, which people read without a stutter
_PIECE_SHARE_S = 0.002  # the same for each stream of a worker: a piece costs the driver a call
_LOWEST_TEMPERATURE = 0.01  # vLLM uses this value for anything between 0 and this
_VERIFIED_UPDATES = 2  # since the start of a worker: the initial weights and the first update
_LOG_BYTES = 65_536  # end of the logs, searched for the last error
# vLLM's own errors only refer to the log of its engine process, where the reason is.
_ERROR = re.compile(
    r"\b(?!EngineDeadError|EngineGenerateError)\w*(?:Error|Exception): (?!Engine core ).+"
)
_RPC_PREFIX = "Call to collective_rpc method failed: "
_EXECUTOR = "delethink.engines.vllm_extension.Executor"


class VllmWorker:
    """A vLLM engine in an asynchronous Ray actor; implements ``Worker``."""

    extension: str = "delethink.engines.vllm_extension.WorkerExtension"

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._engine: Any = None
        self._counter: Any = None
        self._version = self._updates = 0
        self._refused = ""  # reason to sample nothing before the next weights
        self._request_ids = itertools.count(1)
        self._in_flight: set[str] = set()  # ids of requests
        self._base_version: int | None = None  # of the whole weights that low-rank changes change
        self._kept: tuple[int, list[WeightSlot]] | None = None  # file of the weights beneath them
        self._num_streams = 0

    async def start(self) -> WorkerState:
        """Start the engine, and sample one token to warm up.

        Raises:
            MissingExtraError: vLLM is not installed on this node.
            RuntimeError: vLLM did not start; the text is the error of its engine process.
        """
        _set_environment(self._spec)
        gc.set_threshold(50_000)  # the defaults scan vLLM's many long-lived objects too often
        try:
            import_transformers()
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise MissingExtraError("vllm", "vllm") from error
        self._counter = _make_counter()
        try:
            self._engine = AsyncLLM.from_engine_args(
                _engine_args(self._spec, self.extension), stat_loggers=[lambda *_: self._counter]
            )
            async for _ in self._engine.generate(
                {"prompt_token_ids": [0]}, _sampling_params(1, Sampling(), ()), "warm-up"
            ):
                pass
        except Exception as error:
            text = explain_start(_last_error() or str(error), self._spec.config)
            raise RuntimeError(text) from error
        self._counter.counts = EngineCounts()
        vllm_config = self._engine.vllm_config
        return WorkerState(
            pid=os.getpid(),
            max_model_tokens=vllm_config.model_config.max_model_len,
            batch_size=vllm_config.scheduler_config.max_num_seqs,
        )

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """Sample a chunk; see ``Worker.generate``."""
        async with aclosing(self._sample(prompt_ids, max_new_tokens, sampling)) as pieces:
            return [piece async for piece in pieces][-1]

    async def stream(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> AsyncIterator[Completion]:
        """Sample a chunk in pieces; see ``StreamingWorker``.

        The first piece comes with its first token, and the others after a while each, as a piece
        costs the driver as much as a chunk.
        """
        now = asyncio.get_running_loop().time
        held, given_at = list[Completion](), -math.inf
        pieces = self._sample(prompt_ids, max_new_tokens, sampling, in_pieces=True)
        self._num_streams += 1
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    held.append(piece)
                    is_last = piece.stop is not StopReason.LENGTH
                    pause_s = max(_PIECE_S, _PIECE_SHARE_S * self._num_streams)
                    if is_last or now() - given_at >= pause_s:
                        given_at = now()
                        yield join_completions(held)
                        held = []
                if held:
                    yield join_completions(held)
        finally:
            self._num_streams -= 1

    async def _sample(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling, in_pieces: bool = False
    ) -> AsyncGenerator[Completion, None]:
        """Yield a chunk whole, or each of its tokens as soon as it is there."""
        temperature = sampling.temperature
        if temperature < 0 or 0 < temperature < _LOWEST_TEMPERATURE:
            raise ConfigError(
                f"temperature must be 0 or at least {_LOWEST_TEMPERATURE}, got {temperature}"
            )
        if self._refused:
            raise PolicyError(f"takes no requests since an update of weights {self._refused}")
        params = _sampling_params(max_new_tokens, sampling, self._spec.eos_ids, in_pieces)
        request_id = str(next(self._request_ids))
        self._in_flight.add(request_id)
        try:
            async for output in self._engine.generate(
                {"prompt_token_ids": as_list(prompt_ids)}, params, request_id
            ):
                last = output.outputs[0]
                reason = last.finish_reason or "length"
                if reason not in _STOP:
                    raise PolicyError(f"ended a request with {reason!r}: {_last_error()}")
                yield Completion(
                    token_array(array("q", last.token_ids)),
                    logprob_array(array("d", last.logprobs.logprobs)),
                    _STOP[reason],
                    self._version,
                )
        except PolicyError:
            raise
        except Exception as error:
            raise self._explain(error) from None
        finally:
            self._in_flight.discard(request_id)

    async def health(self) -> EngineCounts:
        """Return the counters of the engine; raise ``ConnectionError`` if its process is dead."""
        if self._engine.errored:
            raise self._explain(RuntimeError("errored"))
        counts: EngineCounts = self._counter.counts
        return counts

    def _explain(self, error: Exception) -> Exception:
        """Return an error with the reason from the engine."""
        if self._engine.errored:
            logged = _last_error() or "none"
            return ConnectionError(f"has lost its vLLM engine process; last error logged: {logged}")
        return PolicyError(f"failed: {error.__cause__ or error}".replace(_RPC_PREFIX, ""))

    async def update_weights(self, weights: Any, version: int) -> int:
        """Load new weights; see ``Worker.update_weights``."""
        from delethink.engines.weight_sync import SharedHandle, write

        await self._begin_update()
        self._base_version = None
        if self._kept is not None:
            os.close(self._kept[0])
            self._kept = None
        if isinstance(weights, SharedHandle):
            place, slots = weights.place, weights.slots
            return await self._load("delethink_load", place, slots, version, self._verifies)
        file, slots = write(weights)
        try:
            loaded = await self._load("delethink_load", _path(file), slots, version, self._verifies)
        finally:
            os.close(file)
        self._base_version = version
        return loaded

    async def merge_weights(
        self, base: list[Any], base_version: int, changes: Any, version: int
    ) -> int:
        """Load base weights with low-rank changes; see ``MergingWorker``."""
        from delethink.engines.weight_sync import write

        (whole,) = base
        if self._base_version != base_version:  # since a restart
            await self.update_weights(await whole, base_version)
        await self._begin_update()
        if self._kept is None:
            self._kept = await self._keep(await whole, list(changes.scales))
        file, slots = write(changes.matrices)
        kept, own = (_path(self._kept[0]), self._kept[1]), (_path(file), slots)
        try:
            return await self._load(
                "delethink_merge", kept, own, changes.scales, version, self._verifies
            )
        finally:
            os.close(file)

    async def _keep(self, base: Any, changed: list[str]) -> tuple[int, list[WeightSlot]]:
        """Write the weights beneath low-rank changes into a file; return it and its slots."""
        from delethink.engines.low_rank import narrow
        from delethink.engines.weight_sync import write

        shapes = {name: shape for name, (_, _, shape) in base.items()}
        needed, *_ = await self._call_ranks("delethink_needed", shapes, changed)
        return write(narrow({name: base[name] for name in needed}))

    async def prepare_transfer(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Get ready for weights by vLLM's own transfer (``VllmWeightSender``).

        Returns:
            ``confirm_transfer`` needs digests of the weights, to verify the update.
        """
        await self._begin_update()
        await self._call_ranks("delethink_prepare", shapes, self._verifies)
        return self._verifies

    async def call_engine(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the engine, for vLLM's trainer side too."""
        try:
            return await getattr(self._engine, method)(*arguments, **options)
        except Exception as error:  # vLLM can raise anything; the pool handles all
            raise self._explain(error) from None

    async def confirm_transfer(self, version: int, digests: Mapping[str, str] | None) -> int:
        """End the update begun by ``prepare_transfer``; return the version."""
        return await self._load("delethink_confirm", version, digests)

    @property
    def _verifies(self) -> bool:
        """Return whether this update is verified."""
        return self._spec.config.verify_weights == "every" or self._updates < _VERIFIED_UPDATES

    async def _begin_update(self) -> None:
        """Abort requests abandoned by the pool, and sample nothing until the end of the update."""
        self._refused = "was interrupted"
        await self._engine.abort(list(self._in_flight))

    async def _load(self, method: str, *arguments: Any) -> int:
        versions = await self._call_ranks(method, *arguments)
        if len(set(versions)) != 1:
            self._refuse(f"its {len(versions)} ranks run different versions: {versions}")
        if not await self._engine.reset_prefix_cache():
            self._refuse("vLLM did not empty its prefix cache")
        self._updates += 1
        self._version, self._refused = int(versions[0]), ""
        return self._version

    async def _call_ranks(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of ``WorkerExtension`` in each rank of the engine."""
        answers = await self.call_engine("collective_rpc", method, args=arguments)
        for answer in answers:
            if isinstance(answer, str):
                self._refuse(f"failed: {answer}")
        return list(answers)

    def _refuse(self, reason: str) -> NoReturn:
        self._refused = reason
        raise WeightSyncError(reason) from None

    async def sleep(self) -> None:
        """Move the weights to host memory and drop the KV cache."""
        await self._engine.sleep(level=1)

    async def wake(self) -> None:
        """Move the weights back to the GPU."""
        await self._engine.wake_up()

    async def stop(self) -> None:
        """End the engine process."""
        if self._engine is not None:
            self._engine.shutdown()


class VllmPool(RayPool):
    """vLLM engines in Ray workers."""

    worker_class = VllmWorker

    def make_sender(self, actor: Any) -> Any:
        """Make vLLM's own weight transfer into one worker."""
        from delethink.engines.weight_sync import local_device

        try:
            from delethink.engines.vllm_transfer import VllmWeightSender
        except ImportError as error:
            raise MissingExtraError("vllm", "vllm") from error
        return VllmWeightSender(actor, self.config.tensor_parallel_size, local_device())


def _path(file: int) -> str:
    """Return the path of an open file for other processes."""
    return f"/proc/{os.getpid()}/fd/{file}"


def _sampling_params(
    max_new_tokens: int, sampling: Sampling, eos_ids: TokenIds, in_pieces: bool = False
) -> Any:
    """Return parameters for the model's own distribution at a temperature, cut if asked."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        max_tokens=max_new_tokens,
        ignore_eos=True,  # ignores the model's configuration: eos_ids alone end an answer
        stop_token_ids=list(eos_ids),
        logprobs=0,  # the log-prob of the sampled token alone
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if in_pieces else RequestOutputKind.FINAL_ONLY,
    )


def _engine_args(spec: WorkerSpec, extension: str) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    config = spec.config
    more: dict[str, Any]
    if config.gpus_per_engine:
        more = {"gpu_memory_utilization": config.gpu_memory_utilization}
        more["enable_sleep_mode"] = config.sleep
    else:
        more = {
            "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
            "enforce_eager": True,
            # Splitting the prompt of a request with a seed kills vLLM's engine on the CPU, because
            # generators of the CPU cannot be wound back.
            "enable_chunked_prefill": False,
        }
    if config.max_batch_size is not None:
        more["max_num_seqs"] = config.max_batch_size
    if config.weight_transfer == "nccl":
        from vllm.config import WeightTransferConfig

        more["weight_transfer_config"] = WeightTransferConfig("nccl")
    name, revision = split_revision(spec.model)
    return AsyncEngineArgs(
        model=name,
        revision=revision,
        load_format="safetensors",  # the default also unpickles
        skip_tokenizer_init=True,
        trust_remote_code=spec.trust_remote_code,
        dtype=config.engine_dtype,
        seed=spec.seed,
        max_model_len=spec.max_model_tokens,
        generation_config="vllm",
        # Log-probs after temperature; vLLM does not scale greedy requests (temperature 1).
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=True,
        distributed_executor_backend="uni" if config.tensor_parallel_size == 1 else _EXECUTOR,
        worker_extension_cls=extension,
        disable_log_stats=True,  # the counter of this module still counts
        tensor_parallel_size=config.tensor_parallel_size,
        **more,
    )


def _set_environment(spec: WorkerSpec) -> None:
    """Set environment variables for vLLM, before its import; the engine process inherits them."""
    config = spec.config
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if spec.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = spec.gpu
    if not config.gpus_per_engine:
        ranks = config.tensor_parallel_size
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else "uni" becomes one more process
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # in whole GiB only, and overrides ours
        os.environ["OMP_NUM_THREADS"] = str(max(1, spec.threads // ranks))
        if ranks > 1:  # else vLLM wants a NUMA node for each rank
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # vLLM compiles a helper of its sampler even in eager mode: half a minute for nothing here.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def _make_counter() -> Any:
    """Return a statistics logger for vLLM, with ``counts``."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Counter(StatLoggerBase):  # type: ignore[misc]  # vLLM's classes are untyped here
        def __init__(self) -> None:
            self.counts = EngineCounts()

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any
        ) -> None:
            """Count a step; vLLM may leave out either part."""
            counts = self.counts
            if iteration_stats is not None:
                tokens = iteration_stats.num_generation_tokens
                counts = replace(counts, steps=counts.steps + 1, tokens=counts.tokens + tokens)
            if scheduler_stats is not None:
                cache = scheduler_stats.prefix_cache_stats
                counts = replace(
                    counts,
                    running=counts.running + scheduler_stats.num_running_reqs,
                    waiting=scheduler_stats.num_waiting_reqs,
                    prefix_queries=counts.prefix_queries + cache.queries,
                    prefix_hits=counts.prefix_hits + cache.hits,
                )
            self.counts = counts

        def log_engine_initialized(self) -> None:
            """Log nothing."""

    return Counter()


def _last_error() -> str:
    """Return the last error in the logs of this process and its engine, or an empty text."""
    text = ""
    for descriptor in (1, 2):  # files, in a Ray actor
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if path.is_file():
            text += path.read_text(errors="replace")[-_LOG_BYTES:]
    found: list[str] = _ERROR.findall(text)
    return found[-1] if found else ""
