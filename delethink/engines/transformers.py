"""Engine in this process: ``generate`` of transformers over batches of chunks.

The engine needs no further package, runs wherever torch does, and can share its weights with a
trainer. Chunks with different prompt lengths and limits share a batch: prompts are padded on the
left, and each row stops at its own limit.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from delethink.config import EngineConfig
from delethink.engines.loading import engine_window, eos_ids, load_model
from delethink.errors import WeightSyncError
from delethink.policy import Completion, Sampling, TokenListener
from delethink.types import StopReason, TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DEFAULT_BATCH_SIZE = 256
_DRAWS_AT_ONCE = 64  # a call for each token and row would cost more than the numbers


@dataclass(frozen=True)
class _Request:
    prompt_ids: TokenIds
    max_new_tokens: int
    sampling: Sampling
    answer: asyncio.Future[Completion]
    on_tokens: TokenListener | None = None


class TransformersEngine:
    """``Engine`` with a model in this process.

    Args:
        eos_ids: tokens to end an answer.
        pad_id: token for padding; any id of the vocabulary will do.
        max_batch_size: maximum number of chunks decoded at once.
        seed: seed of the stream for requests without a seed of their own.
        is_trained: a trainer updates this very model, adapters included. New weights then take
            effect at once, and ``update_weights`` only counts.
        max_model_tokens: longest sequence; ``None`` for the model's window.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos_ids: Sequence[int],
        pad_id: int,
        max_batch_size: int = _DEFAULT_BATCH_SIZE,
        seed: int = 0,
        is_trained: bool = False,
        max_model_tokens: int | None = None,
    ) -> None:
        self.model, self.shares_weights = model, is_trained
        self.max_model_tokens = engine_window(model, max_model_tokens)
        self._eos_ids, self._pad_id = tuple(eos_ids), pad_id
        self._max_batch_size = max_batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._waiting: list[_Request] = []
        self._version = 0
        self._done = (0, 0, 0, 0.0)  # chunks, batches, tokens, seconds since metrics were taken

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
        """Make an engine; see ``Engine.create``.

        Without a ``model``, the engine loads the checkpoint onto the GPU, if there is one.
        """
        if model is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            dtype = config.dtype or ("bfloat16" if device == "cuda" else "float32")
            model = load_model(model_path, dtype, trust_remote_code)
            model.to(device)
        return cls(
            model,
            eos_ids(model, tokenizer),
            int(tokenizer.pad_token_id),
            config.max_batch_size or _DEFAULT_BATCH_SIZE,
            seed,
            is_trained,
            config.max_model_tokens,
        )

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """Sample in the next batch, with all requests made before the event loop is idle."""
        return await self._submit(prompt_ids, max_new_tokens, sampling)

    async def stream(
        self,
        prompt_ids: TokenIds,
        max_new_tokens: int,
        sampling: Sampling,
        on_tokens: TokenListener,
    ) -> Completion:
        """Sample as ``generate`` does, and pass on each token when its batch has it.

        The event loop is busy meanwhile: a call is cancelled by a listener that raises.
        """
        return await self._submit(prompt_ids, max_new_tokens, sampling, on_tokens)

    async def _submit(self, *given: Any) -> Completion:
        loop = asyncio.get_running_loop()
        prompt_ids, max_new_tokens, sampling, *listener = given
        answer: asyncio.Future[Completion] = loop.create_future()
        request = _Request(prompt_ids, max_new_tokens, sampling, answer, *listener)
        self._waiting.append(request)
        if len(self._waiting) == 1:
            loop.call_soon(self._run_when_quiet, 1)
        return await request.answer

    def update_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Load weights, unless the trainer updates the model itself, and set the version."""
        if not self.shares_weights:
            try:
                self.model.load_state_dict(dict(weights))
            except RuntimeError as error:
                raise WeightSyncError(f"the engine refused the new weights: {error}") from None
        self._version = version

    def take_metrics(self) -> dict[str, float]:
        """Return chunks, tokens per second and chunks per batch since the last call."""
        (chunks, batches, tokens, seconds), self._done = self._done, (0, 0, 0, 0.0)
        metrics = {"engine/chunks": float(chunks)}
        if batches:
            metrics["engine/batch_occupancy"] = chunks / batches
            metrics["engine/tokens_per_second"] = tokens / seconds
        return metrics

    def sleep(self) -> None:
        """Do nothing: the model belongs to the caller."""

    def close(self) -> None:
        """Do nothing: the model belongs to the caller."""

    def _run_when_quiet(self, seen: int) -> None:
        """Wait until an iteration of the event loop brings no more requests, then run them all."""
        if len(self._waiting) > seen:
            asyncio.get_running_loop().call_soon(self._run_when_quiet, len(self._waiting))
            return
        waiting, self._waiting = self._waiting, []
        # Chunks of similar length share a batch, which decodes as long as its longest row.
        waiting.sort(key=lambda request: request.max_new_tokens)
        for i in range(0, len(waiting), self._max_batch_size):
            self._answer(waiting[i : i + self._max_batch_size])

    def _answer(self, batch: list[_Request]) -> None:
        batch = [request for request in batch if not request.answer.done()]
        if not batch:
            return
        started = time.perf_counter()
        try:
            answers = self._decode(batch)
        except Exception as error:  # all requests of the batch fail
            for request in batch:
                if not request.answer.done():
                    request.answer.set_exception(error)
            return
        chunks, batches, tokens, seconds = self._done
        tokens += sum(len(completion.token_ids) for completion in answers)
        seconds += time.perf_counter() - started
        self._done = (chunks + len(answers), batches + 1, tokens, seconds)
        for request, answer in zip(batch, answers, strict=True):
            if not request.answer.done():
                request.answer.set_result(answer)

    def _decode(self, batch: list[_Request]) -> list[Completion]:
        prompts, device = [request.prompt_ids for request in batch], self.model.device
        longest = max(map(len, prompts))
        rows = [(self._pad_id,) * (longest - len(p)) + p for p in prompts]
        masks = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        limits = torch.tensor([request.max_new_tokens for request in batch])
        sampler = _Sampler([request.sampling for request in batch], self._generator)
        training, settings = self.model.training, self.model.generation_config
        self.model.eval()
        # A checkpoint's own settings (a repetition penalty, say) would change the distribution to
        # another one than the trainer's.
        self.model.generation_config = GenerationConfig()
        # Greedy decoding, because _Sampler gives the token that it drew the highest score.
        config = GenerationConfig(
            max_new_tokens=int(limits.max()),
            do_sample=False,
            eos_token_id=list(self._eos_ids),
            pad_token_id=self._pad_id,
        )
        try:
            sequences = self.model.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(masks, device=device),
                generation_config=config,
                logits_processor=[sampler],
                stopping_criteria=[
                    _RowLimit(limits.to(device), longest),
                    *_Streams.of(batch, sampler, self._eos_ids),
                ],
            )
        finally:
            self.model.train(training)
            self.model.generation_config = settings
        sampled = sequences[:, longest:].cpu()
        completions = []
        for row, logprobs, request in zip(sampled, sampler.logprobs(), batch, strict=True):
            ids = row[: request.max_new_tokens].tolist()
            ends = [i for i, token in enumerate(ids) if token in self._eos_ids]
            stop = StopReason.EOS if ends else StopReason.LENGTH
            length = ends[0] + 1 if ends else len(ids)
            kept = tuple(ids[:length]), tuple(logprobs[:length].tolist())
            completions.append(Completion(*kept, stop, self._version))
        return completions


def cut(logits: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Return logits [B, V] with -inf for the tokens that each row's sampling drops.

    The order is vLLM's: ``min_p`` of the whole distribution, then ``top_k``, then ``top_p`` of what
    is left. Greedy rows stay as they are.
    """

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    min_p = column([s.min_p if s.is_cut else 0.0 for s in samplings])
    top_k = column([float(s.top_k) if s.is_cut and s.top_k else math.inf for s in samplings])
    # Rounding may take a sum of probabilities to 1 before the last token.
    top_p = column([s.top_p if s.is_cut and s.top_p < 1 else math.inf for s in samplings])
    probs = torch.softmax(logits, dim=-1)
    logits = logits.masked_fill(probs < min_p * probs.max(dim=-1, keepdim=True).values, -math.inf)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    dropped = torch.arange(logits.shape[1], device=logits.device)[None] >= top_k
    probs = torch.softmax(ordered.masked_fill(dropped, -math.inf), dim=-1)
    dropped = dropped | (probs.cumsum(dim=-1) - probs >= top_p)
    return logits.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -math.inf)


class _Sampler(LogitsProcessor):  # type: ignore[misc]  # untyped for mypy
    """Samples each row with its own temperature and seed, and keeps log-probs of the samples.

    One uniform number a token selects the token at that height of the cumulated probabilities. A
    row costs one random number then, not one for each token of the vocabulary, and a seeded row
    does not depend on the rest of its batch.
    """

    def __init__(self, samplings: list[Sampling], shared: torch.Generator) -> None:
        self._greedy = torch.tensor([s.temperature == 0 for s in samplings])
        self._temperatures = torch.tensor([s.temperature or 1.0 for s in samplings])
        self._samplings = samplings if any(s.is_cut for s in samplings) else []
        self._generators = [
            shared if s.seed is None else torch.Generator().manual_seed(s.seed) for s in samplings
        ]
        self._kept: list[torch.Tensor] = []  # probabilities of sampled tokens, [B] each

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return probabilities [B, V], with the one of each sampled token replaced by 2."""
        device = scores.device
        if bool((self._temperatures != 1).any()):
            scores = scores / self._temperatures.to(device)[:, None]
        if self._samplings:
            scores = cut(scores, self._samplings)
        probs = torch.softmax(scores.float(), dim=-1)
        tokens = self._draw(probs)
        if bool(self._greedy.any()):
            # Of the scores, because rounding may make two probabilities equal.
            tokens = torch.where(self._greedy.to(device), scores.argmax(dim=-1), tokens)
        self._kept.append(probs.gather(1, tokens[:, None])[:, 0])
        return probs.scatter_(1, tokens[:, None], 2.0)

    def last_logprobs(self) -> list[float]:
        """Return the log-probs [B] of the last tokens."""
        last: list[float] = self._kept[-1].log().tolist()
        return last

    def logprobs(self) -> torch.Tensor:
        """Return the log-probs [B, T] of the sampled tokens."""
        return torch.stack(self._kept, dim=1).log().cpu()

    def _draw(self, probs: torch.Tensor) -> torch.Tensor:
        if bool(self._greedy.all()):
            return torch.zeros(len(probs), dtype=torch.int64, device=probs.device)
        place = len(self._kept) % _DRAWS_AT_ONCE
        if place == 0:
            rows = [
                torch.rand(_DRAWS_AT_ONCE, generator=g, dtype=torch.float64)
                for g in self._generators
            ]
            self._draws = torch.stack(rows).to(probs.device, _exact_float(probs.device))
        return draw_tokens(probs, self._draws[:, place])


def draw_tokens(probs: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Return a token [B] of each row of ``probs`` [B, V], given ``draws`` [B] in [0, 1)."""
    # In float32 the sum near 1 would lose rare tokens of a large vocabulary.
    heights = probs.cumsum(dim=-1, dtype=_exact_float(probs.device))
    # The last height differs from 1 by rounding.
    tokens = torch.searchsorted(heights, draws[:, None] * heights[:, -1:], right=True)[:, 0]
    return tokens.clamp(max=probs.shape[1] - 1)


def _exact_float(device: torch.device) -> torch.dtype:
    """Return the widest float of a device; Apple's has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class _RowLimit(StoppingCriteria):  # type: ignore[misc]  # untyped for mypy
    """Stops each row at its own number of new tokens."""

    def __init__(self, limits: torch.Tensor, prompt_length: int) -> None:
        self._limits, self._prompt_length = limits, prompt_length

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return self._limits <= input_ids.shape[1] - self._prompt_length


class _Streams(StoppingCriteria):  # type: ignore[misc]  # untyped for mypy
    """Passes on the tokens of rows as they are sampled, and stops rows that nobody waits for."""

    @classmethod
    def of(cls, batch: Sequence[_Request], sampler: _Sampler, eos_ids: TokenIds) -> list[_Streams]:
        """Return a criterion, if a row of the batch has a listener."""
        has_listener = any(request.on_tokens is not None for request in batch)
        return [cls(batch, sampler, eos_ids)] if has_listener else []

    def __init__(self, batch: Sequence[_Request], sampler: _Sampler, eos_ids: TokenIds) -> None:
        self._sampler, self._eos_ids = sampler, eos_ids
        self._open = {
            row: request for row, request in enumerate(batch) if request.on_tokens is not None
        }
        self._left = torch.zeros(len(batch), dtype=torch.bool)
        self._count = 0  # tokens of each row so far

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return the rows [B] to stop."""
        self._count += 1
        tokens, logprobs = input_ids[:, -1].tolist(), self._sampler.last_logprobs()
        for row, request in list(self._open.items()):
            assert request.on_tokens is not None
            try:
                request.on_tokens((tokens[row],), (logprobs[row],))
            except asyncio.CancelledError:
                request.answer.cancel()
                self._left[row] = True
            is_last = self._count == request.max_new_tokens or tokens[row] in self._eos_ids
            if is_last or self._left[row]:
                del self._open[row]
        return self._left.to(input_ids.device)
