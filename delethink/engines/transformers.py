"""The in-process engine: ``transformers``' own ``generate`` over batches of chunks.

It needs no other install, runs wherever torch does, and can share its weights with a trainer.
Chunks of unequal prompts and limits go into one batch: prompts are padded on the left, and each row
stops at its own limit.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from delethink.engines.loading import longest_sequence
from delethink.errors import WeightSyncError
from delethink.policy import Completion, Sampling
from delethink.types import StopReason, TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Request:
    prompt_ids: TokenIds
    max_new_tokens: int
    sampling: Sampling
    answer: asyncio.Future[Completion]


class TransformersEngine:
    """Implements ``Engine`` with a model in this process.

    Args:
        model: a causal language model.
        eos_ids: the tokens that end an answer.
        pad_id: what fills rows up; any id of the vocabulary will do.
        max_batch_size: the most chunks decoded side by side.
        seed: of the stream that requests without a seed of their own draw from.
        is_trained: a trainer updates this very model, adapters included: new weights are in force
            at once, and ``update_weights`` only counts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos_ids: Sequence[int],
        pad_id: int,
        max_batch_size: int = 256,
        seed: int = 0,
        is_trained: bool = False,
    ) -> None:
        self.model = model
        self._is_trained = is_trained
        self.max_model_tokens = longest_sequence(model)
        self._eos_ids = tuple(eos_ids)
        self._pad_id = pad_id
        self._max_batch_size = max_batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._waiting: list[_Request] = []
        self._version = 0
        self._done = (0, 0, 0, 0.0)  # chunks, batches, tokens, seconds since metrics were taken

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """Joins the next batch: all requests made before the event loop comes to rest."""
        loop = asyncio.get_running_loop()
        request = _Request(prompt_ids, max_new_tokens, sampling, loop.create_future())
        self._waiting.append(request)
        if len(self._waiting) == 1:
            loop.call_soon(self._run_when_quiet, 1)
        return await request.answer

    def update_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Loads weights, unless they are the model's own, and counts the version."""
        if not self._is_trained:
            try:
                self.model.load_state_dict(dict(weights))
            except RuntimeError as error:
                raise WeightSyncError(f"the engine refused new weights: {error}") from None
        self._version = version

    def take_metrics(self) -> dict[str, float]:
        """Chunks, tokens a second of decoding and chunks in a batch, since it was last asked."""
        (chunks, batches, tokens, seconds), self._done = self._done, (0, 0, 0, 0.0)
        metrics = {"engine/chunks": float(chunks)}
        if batches:
            metrics["engine/batch_occupancy"] = chunks / batches
            metrics["engine/tokens_per_second"] = tokens / seconds
        return metrics

    def sleep(self) -> None:
        """Nothing to free: the model is the trainer's own."""

    def close(self) -> None:
        """Nothing to release: the model belongs to the caller."""

    def _run_when_quiet(self, seen: int) -> None:
        """Waits as long as a turn of the event loop brings more requests, then runs them all."""
        if len(self._waiting) > seen:
            asyncio.get_running_loop().call_soon(self._run_when_quiet, len(self._waiting))
            return
        waiting, self._waiting = self._waiting, []
        # Chunks of like length side by side: a batch decodes as long as its longest row.
        waiting.sort(key=lambda request: request.max_new_tokens)
        for i in range(0, len(waiting), self._max_batch_size):
            self._answer(waiting[i : i + self._max_batch_size])

    def _answer(self, batch: list[_Request]) -> None:
        batch = [request for request in batch if not request.answer.done()]
        if not batch:
            return
        answers: Sequence[Completion | Exception]
        started = time.perf_counter()
        try:
            answers = decoded = self._decode(batch)
            self._count(decoded, time.perf_counter() - started)
        except Exception as error:  # the callers' affair: each request fails with it
            answers = [error] * len(batch)
        for request, answer in zip(batch, answers, strict=True):
            if request.answer.done():  # given up meanwhile
                continue
            if isinstance(answer, Exception):
                request.answer.set_exception(answer)
            else:
                request.answer.set_result(answer)

    def _count(self, decoded: list[Completion], took: float) -> None:
        chunks, batches, tokens, seconds = self._done
        tokens += sum(len(completion.token_ids) for completion in decoded)
        self._done = (chunks + len(decoded), batches + 1, tokens, seconds + took)

    def _decode(self, batch: list[_Request]) -> list[Completion]:
        input_ids, attention_mask = self._pad_left([request.prompt_ids for request in batch])
        limits = torch.tensor([request.max_new_tokens for request in batch])
        draw = _Draw([request.sampling for request in batch], self._generator)
        training, settings = self.model.training, self.model.generation_config
        self.model.eval()
        # A checkpoint's own settings (a repetition penalty, say) would be mixed into ours and make
        # another distribution than the one that is trained.
        self.model.generation_config = GenerationConfig()
        try:
            sequences = self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=self._config(int(limits.max())),
                logits_processor=[draw],
                stopping_criteria=[_OwnLimit(limits.to(input_ids.device), input_ids.shape[1])],
            )
        finally:
            self.model.train(training)
            self.model.generation_config = settings
        sampled = sequences[:, input_ids.shape[1] :].cpu()
        logprobs = draw.logprobs(sampled)
        return [
            self._completion(sampled[i], logprobs[i], limit)
            for i, limit in enumerate(limits.tolist())
        ]

    def _config(self, max_new_tokens: int) -> GenerationConfig:
        # Tokens are drawn in _Draw, which adds the noise: the highest score is then the sample.
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(self._eos_ids),
            pad_token_id=self._pad_id,
        )

    def _pad_left(self, prompts: list[TokenIds]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, prompts))
        rows = [(self._pad_id,) * (longest - len(p)) + p for p in prompts]
        masks = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        device = self.model.device
        return torch.tensor(rows, device=device), torch.tensor(masks, device=device)

    def _completion(self, sampled: torch.Tensor, logprobs: torch.Tensor, limit: int) -> Completion:
        ids = sampled[:limit].tolist()
        ends = [i for i, token in enumerate(ids) if token in self._eos_ids]
        stop = StopReason.EOS if ends else StopReason.LENGTH
        length = ends[0] + 1 if ends else len(ids)
        return Completion(
            tuple(ids[:length]), tuple(logprobs[:length].tolist()), stop, self._version
        )


class _Draw(LogitsProcessor):  # type: ignore[misc]  # seen as untyped
    """Draws each row with its own temperature and seed, and keeps the log-probs of what was drawn.

    The highest of (log-probs + Gumbel noise) is a sample from the distribution (the Gumbel-max
    trick), so a seeded row does not depend on what it is batched with.
    """

    def __init__(self, samplings: list[Sampling], shared: torch.Generator) -> None:
        self._greedy = torch.tensor([s.temperature == 0 for s in samplings])
        self._temperatures = torch.tensor([s.temperature or 1.0 for s in samplings])
        self._generators = [
            shared if s.seed is None else torch.Generator().manual_seed(s.seed) for s in samplings
        ]
        self._unseeded = shared if all(s.seed is None for s in samplings) else None
        self._kept: list[torch.Tensor] = []  # of tokens already drawn, [B] each
        self._last: torch.Tensor | None = None  # log-probs of the token to come, [B, V]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self._last is not None:
            self._keep(input_ids[:, -1].cpu())
        temperatures = self._temperatures.to(scores.device)
        self._last = torch.log_softmax(scores.float() / temperatures[:, None], dim=-1)
        return self._last + self._noise(self._last).to(scores.device)

    def logprobs(self, sampled: torch.Tensor) -> torch.Tensor:
        """Log-probs [B, T] of the drawn tokens ``sampled`` [B, T]."""
        self._keep(sampled[:, -1])
        return torch.stack(self._kept, dim=1)

    def _keep(self, tokens: torch.Tensor) -> None:
        assert self._last is not None
        index = tokens.to(self._last.device)[:, None]
        self._kept.append(self._last.gather(1, index)[:, 0].cpu())

    def _noise(self, like: torch.Tensor) -> torch.Tensor:
        shape = like.shape
        if self._unseeded is not None:
            waits = torch.empty(shape).exponential_(generator=self._unseeded)
        else:
            rows = [torch.empty(shape[1]).exponential_(generator=g) for g in self._generators]
            waits = torch.stack(rows)
        return (-waits.log()).masked_fill(self._greedy[:, None], 0.0)


class _OwnLimit(StoppingCriteria):  # type: ignore[misc]  # seen as untyped
    """Ends each row at its own number of new tokens."""

    def __init__(self, limits: torch.Tensor, prompt_length: int) -> None:
        self._limits = limits
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return self._limits <= input_ids.shape[1] - self._prompt_length
