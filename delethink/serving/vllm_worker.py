"""One vLLM engine: what runs inside a Ray actor, and what runs inside vLLM's own worker.

    RayPool (driver)  ──►  VllmWorker (Ray actor)  ──►  AsyncLLM  ──►  engine process: WeightUpdates

Token ids go in and come out; nothing is tokenized here. vLLM is imported where it is used, because
the driver loads this module to describe the actor and need not have vLLM.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from delethink.errors import MissingExtraError, PolicyError, WeightSyncError
from delethink.policy import Completion, Sampling
from delethink.types import StopReason, TokenIds

if TYPE_CHECKING:
    import numpy as np

Packed = Mapping[str, "tuple[np.ndarray, str, tuple[int, ...]]"]  # bytes, dtype and shape of each
Slot = tuple[str, str, tuple[int, ...], int, int]  # name, dtype, shape, first byte, number of bytes

_ALIGNMENT = 64  # bytes; a view of another dtype must start at a multiple of its size
_PROBED_COLUMNS = 16
_RPC_PREFIX = "Call to collective_rpc method failed: "
_STOP = {"stop": StopReason.EOS, "length": StopReason.LENGTH, "abort": StopReason.ABORT}


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
                raise PolicyError(f"takes no requests, as new weights failed: {self._broken}")
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
        from vllm.v1.engine.exceptions import EngineDeadError

        params = _sampling_params(max_new_tokens, sampling, self._config.eos_ids)
        prompt = {"prompt_token_ids": list(prompt_ids)}
        try:
            async for output in self._engine.generate(prompt, params, str(next(self._ids))):
                last = output.outputs[0]
        except EngineDeadError as error:
            raise ConnectionError(f"its engine died: {_last_error() or error}") from None
        if last.finish_reason not in _STOP:
            raise PolicyError(f"vLLM ended a request with {last.finish_reason!r}")
        return Completion(
            token_ids=tuple(last.token_ids),
            logprobs=tuple(last.logprobs.logprobs),
            stop=_STOP[last.finish_reason],
            policy_version=self._version,
        )

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
            self._broken = "an update was interrupted"
            try:
                self._version = await self._load(weights, version)
            except Exception as error:
                self._broken = str(error).removeprefix(_RPC_PREFIX)
                raise WeightSyncError(self._broken) from error
            self._broken = ""
            return self._version

    async def _load(self, weights: Packed, version: int) -> int:
        file, slots = _write(weights)
        try:
            path = f"/proc/{os.getpid()}/fd/{file}"
            (said,) = await self._engine.collective_rpc(
                "delethink_load", args=(path, slots, version)
            )
        finally:
            os.close(file)
        if not await self._engine.reset_prefix_cache():
            raise WeightSyncError("vLLM did not empty its prefix cache")
        return int(said)

    async def stop(self) -> None:
        """Ends the engine process."""
        if self._engine is not None:
            self._engine.shutdown()


class WeightUpdates:
    """What is mixed into vLLM's worker, in the engine process."""

    model_runner: Any
    model_config: Any

    def __new__(cls, *args: object, **kwargs: object) -> WeightUpdates:
        # The first thing of ours that runs in the engine process, before it loads the model.
        threading.Thread(target=_die_with_parent, daemon=True).start()
        return super().__new__(cls)

    def delethink_load(self, path: str, slots: list[Slot], version: int) -> int:
        """Takes up the weights in a file and checks that the model computes with them."""
        model = self.model_runner.get_model()
        sent = _read(path, slots)
        pairs = list(pair_weights(model, sent))
        self.model_runner.reload_weights(weights_iterator=iter(sent.items()))
        _pack_tied(model)
        stale = [name for name, module, parts in pairs if not _runs(module, name, _join(parts))]
        if stale:
            raise ValueError(
                f"the engine runs other weights than it was sent: {len(stale)} of {len(pairs)} "
                f"differ, the first is {stale[0]!r}"
            )
        return version


def pair_weights(
    model: torch.nn.Module, sent: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.nn.Module, list[torch.Tensor]]]:
    """Finds what was sent for each parameter of a vLLM model.

    Yields:
        The parameter's name, the module that holds it, and the tensors of the checkpoint that make
        it up, one under the other: several where vLLM fuses them (q, k, v; gate, up).

    Raises:
        ValueError: a parameter for which nothing was sent, a name that the model does not have, or
            another shape than the model's.
    """
    fused = getattr(model, "packed_modules_mapping", {})
    tied = _tied(model)
    unused = set(sent)
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}".removeprefix(".")
            sources = _sources(name, fused, tied[parameter])
            names = next((n for n in sources if set(n) <= set(sent)), None)
            if names is None:
                raise ValueError(f"nothing was sent for {name!r}, which the engine has")
            parts = [sent[n] for n in names]
            _check_shape(names, parts, _shape(module, leaf))
            unused -= set(names)
            yield name, module, parts
    if unused:
        raise ValueError(f"the engine has no weight called {min(unused)!r}")


def _check_shape(names: list[str], parts: list[torch.Tensor], expected: list[int]) -> None:
    """A wrong shape must be found before vLLM starts to load, as it does not recover from one."""
    rows = sum(part.shape[0] for part in parts if part.ndim)
    if any(([rows, *part.shape[1:]] if part.ndim else []) != expected for part in parts):
        shapes = ", ".join(f"{n!r} {list(p.shape)}" for n, p in zip(names, parts, strict=True))
        raise ValueError(f"the shapes do not fit: the engine has {expected} for {shapes}")


def _shape(module: torch.nn.Module, leaf: str) -> list[int]:
    """A parameter's shape in a checkpoint: vLLM pads vocabularies and empties packed layers."""
    shape = list(getattr(module, leaf).shape)
    if hasattr(module, "org_vocab_size"):
        return [int(module.org_vocab_size), *shape[1:]]
    if leaf == "weight" and hasattr(module, "output_size"):
        return [int(module.output_size), int(module.input_size)]
    return shape


def _tied(model: torch.nn.Module) -> dict[torch.nn.Parameter, list[str]]:
    """All names of each parameter: tied ones have several."""
    names: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _pack_tied(model: torch.nn.Module) -> None:
    """On the CPU, vLLM leaves the packed copy of a tied output layer as it was."""
    tied = _tied(model)
    for module in model.modules():
        shared = any(len(tied[p]) > 1 for p in module.parameters(recurse=False))
        if shared and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _sources(name: str, fused: Mapping[str, list[str]], tied: list[str]) -> Iterator[list[str]]:
    """The names in a checkpoint that may hold a parameter, the likeliest first."""
    for alias in [name, *tied]:
        yield [alias]
        for whole, parts in fused.items():
            if f".{whole}." in alias:
                yield [alias.replace(f".{whole}.", f".{part}.") for part in parts]


def _runs(module: Any, name: str, sent: torch.Tensor) -> bool:
    """Whether a module computes with the values that were sent for one of its parameters."""
    held = getattr(module, name.rpartition(".")[2])
    if name.endswith(".weight") and hasattr(module, "cpu_linear"):
        # On the CPU a linear layer multiplies with a packed copy, and often keeps nothing else.
        columns = torch.linspace(0, sent.shape[1] - 1, _PROBED_COLUMNS).long()
        probe = torch.zeros(_PROBED_COLUMNS, sent.shape[1], dtype=held.dtype)
        probe[range(_PROBED_COLUMNS), columns] = 1.0  # picks these columns, exactly
        found = module.quant_method.apply(module, probe, bias=None)
        expected = sent[:, columns].T.to(held.dtype)
        return torch.equal(found[:, : len(sent)], expected)
    padded = held[: len(sent)] if sent.ndim else held
    return torch.equal(padded, sent.to(held.device, held.dtype))


def _write(weights: Packed) -> tuple[int, list[Slot]]:
    """Puts weights into an anonymous file in memory: the engine process reads it without a copy,
    and it is gone with the last process that holds it."""
    slots = []
    descriptor = os.memfd_create("delethink-weights")
    with os.fdopen(descriptor, "wb", closefd=False) as file:
        for name, (data, dtype, shape) in weights.items():
            file.seek(-file.tell() % _ALIGNMENT, os.SEEK_CUR)
            slots.append((name, dtype, shape, file.tell(), data.nbytes))
            file.write(data.data)
    return descriptor, slots


def _read(path: str, slots: list[Slot]) -> dict[str, torch.Tensor]:
    everything = torch.from_file(path, size=os.path.getsize(path), dtype=torch.uint8)
    return {
        name: everything[first : first + size].view(getattr(torch, dtype)).reshape(shape)
        for name, dtype, shape, first, size in slots
    }


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


def _die_with_parent() -> None:
    """A killed worker leaves no engine behind: vLLM itself does not notice that it is gone."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _last_error() -> str:
    """The last error in what this process and its engine wrote, as vLLM only refers to it."""
    lines = []
    for descriptor in (1, 2):  # files, in a Ray actor
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if path.is_file():
            lines += path.read_text(errors="replace")[-65536:].splitlines()
    found = [match for line in lines if (match := re.search(r"\b\w*(Error|Exception): .+", line))]
    return found[-1].group() if found else ""
