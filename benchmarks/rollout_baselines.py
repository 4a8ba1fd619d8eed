"""What the benchmark of rollouts compares a pool with: bare engines, a naive loop, and TRL."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import ray

from delethink.engines.exchange import EngineCounts
from delethink.engines.vllm import VllmWorker, _sampling_params
from delethink.policy import Completion, Sampling
from delethink.types import StopReason

MAX_MODEL_TOKENS = 1024


class Request(NamedTuple):
    """A chunk as an engine is asked for it."""

    prompt: list[int]
    new: int
    seed: int | None


class RawEngine(VllmWorker):
    """An engine with the settings of the pool's, and nothing around it."""

    async def play(self, requests: Sequence[Request]) -> float:
        """Seconds for all requests, given to the engine at once."""
        started = time.perf_counter()
        await asyncio.gather(*(self.one(request) for request in requests))
        return time.perf_counter() - started

    async def one(self, request: Request) -> Completion:
        """A single request."""
        params = _sampling_params(request.new, 1.0, request.seed, ())
        prompt = {"prompt_token_ids": request.prompt}
        name = f"{id(request)}-{time.perf_counter_ns()}"
        async for output in self._engine.generate(prompt, params, name):
            last = output.outputs[0]
        return Completion(tuple(last.token_ids), tuple(last.logprobs.logprobs), StopReason.LENGTH)

    async def counts(self) -> EngineCounts:
        """All that it has done so far."""
        counts: EngineCounts = self._counter.counts()
        return counts

    async def block_size(self) -> int:
        """Tokens of a block of the prefix cache."""
        return int(self._engine.vllm_config.cache_config.block_size)


class TrlEngine:
    """TRL's own vLLM generation, in the mode that shares the trainer's process."""

    def __init__(self, model: str, slots: int, kv_cache_gib: int, threads: int) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "TORCH_COMPILE_DISABLE": "1",
            "OMP_NUM_THREADS": str(threads),
            "TRL_EXPERIMENTAL_SILENCE": "1",
        }
        import torch

        torch.set_num_threads(threads)
        from accelerate import Accelerator
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl.generation.vllm_generation import VLLMGeneration

        self.generation = VLLMGeneration(
            AutoModelForCausalLM.from_pretrained(model),
            Accelerator(cpu=True),
            AutoTokenizer.from_pretrained(model),
            mode="colocate",
            max_model_length=MAX_MODEL_TOKENS,
            max_num_seqs=slots,
            temperature=1.0,
            generation_kwargs={"ignore_eos": True, "detokenize": False},
        )

    def play(self, prompts: list[list[int]], new: int) -> float:
        """Seconds for prompts that all get the same number of new tokens."""
        self.generation.max_completion_length = new
        started = time.perf_counter()
        _, completions, _, _ = self.generation.generate(prompts, None, 1)
        seconds = time.perf_counter() - started
        if any(len(ids) != new for ids in completions):
            raise RuntimeError("TRL sampled another number of tokens than it was asked for")
        return seconds


class Naive:
    """Implements the policy protocol over one worker: a call for each chunk."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    async def generate(self, prompt: Any, new: int, sampling: Sampling) -> Completion:
        """As the engine does."""
        request = Request(list(prompt), new, sampling.seed)
        completion: Completion = await self.actor.one.remote(request)
        return completion


@contextlib.contextmanager
def run_actor(kind: Any, *arguments: Any, start: bool = True) -> Iterator[Any]:
    """A Ray actor of a kind, which ends with this."""
    actor = ray.remote(max_concurrency=10_000 if start else 1, num_cpus=1)(kind).remote(*arguments)
    try:
        ray.get(actor.start.remote() if start else actor.__ray_ready__.remote())
        yield actor
    finally:
        if start:
            ray.get(actor.stop.remote())
        ray.kill(actor)
