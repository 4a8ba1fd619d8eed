"""The TRL seam: all of delethink that knows ``GRPOTrainer``.

A trace is one row (``rows.py``), so that TRL's own objective is the method's without a change
(arXiv 2510.06557, equation 3): with ``loss_type="grpo"`` there is one advantage for each trace, its
baseline is taken over the traces of a problem, a trace's loss is divided by its own number of
sampled tokens, and the result is the mean over the traces of the optimizer step. What differs from
a chat is where log-probs come from: each chunk is forwarded as a sequence of its own, under exactly
the prompt that the sampler saw.

TRL marks ``rollout_func`` as experimental, so the version is pinned and nothing else touches it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from trl import GRPOTrainer

from delethink.errors import RolloutError
from delethink.training.rows import flatten, spans
from delethink.types import Trace


class Sampled(NamedTuple):
    """What was sampled for an optimizer step and what the trainer made of it, row by row."""

    examples: list[dict[str, Any]]  # rows of the dataset
    traces: list[Trace]
    rewards: list[dict[str, float | None]]  # by name; None where a reward does not apply
    advantages: list[float]


class Statistics(NamedTuple):
    """Sums over trained tokens, on this process."""

    tokens: int = 0
    difference: float = 0.0  # of |log-prob of the engine - log-prob of the trainer|
    largest_difference: float = 0.0
    entropy: float = 0.0  # nats


class _Sequence(NamedTuple):
    """A chunk as the model sees it, and the cells of the [B, T] result that it fills."""

    ids: torch.Tensor  # x_l y_l
    prompt_length: int
    row: int
    columns: tuple[int, int]


class DelethinkTrainer(GRPOTrainer):  # type: ignore[misc]  # TRL is untyped
    """``GRPOTrainer`` over traces of chunks.

    Args:
        play: plays a trace for each example (rows of the dataset, repeated once for each trace of a
            group) with the current weights, in that order.
        on_sampled: told what was sampled and how it was scored, once for each batch.
        draw: the examples that a batch of rows of the dataset stands for; by default themselves.
        forward_tokens: tokens in one forward pass, padding included; more are forwarded in parts
            that are recomputed in the backward pass, so that memory does not grow with thinking.
        max_failed_share: a larger share of failed traces in a batch is an error.

    The other arguments are those of ``GRPOTrainer``.
    """

    def __init__(
        self,
        *args: Any,
        play: Callable[[list[dict[str, Any]]], list[Trace]],
        on_sampled: Callable[[Sampled], None],
        forward_tokens: int,
        max_failed_share: float,
        draw: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = list,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, rollout_func=self._roll_out, **kwargs)
        self._play, self._on_sampled, self._draw = play, on_sampled, draw
        self._forward_tokens, self._max_failed_share = forward_tokens, max_failed_share
        self._examples: list[dict[str, Any]] = []
        self._traces: list[Trace] = []
        self._rewards: list[dict[str, float | None]] = []
        self._statistics = Statistics()
        self._mask: torch.Tensor | None = None  # [B, T] of the rows being forwarded
        self._logprobs: torch.Tensor | None = None  # [B, T] of the last forward pass
        self._entropies: torch.Tensor | None = None

    # -- sampling ------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = self._draw(inputs)
        # The examples are kept as they came: TRL adds what the rollout returned to `inputs`.
        self._examples = [dict(example) for example in inputs]
        with self._masked(None):
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        self._on_sampled(
            Sampled(self._examples, self._traces, self._rewards, output["advantages"].tolist())
        )
        return output

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        gathered: torch.Tensor = super()._calculate_rewards(*args)
        local = gathered[self.accelerator.process_index * len(self._traces) :]
        self._rewards = [
            {
                name: None if math.isnan(value) else value
                for name, value in zip(self.reward_func_names, row, strict=True)
            }
            for row in local[: len(self._traces)].tolist()
        ]
        return gathered

    def _roll_out(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        self._traces = self._play(self._examples)
        self._check_failures()
        rows = [flatten(trace, self._tokenizer.pad_token_id) for trace in self._traces]
        masks = [torch.tensor(row.mask) for row in rows]
        self._mask = pad_sequence(masks, batch_first=True)
        return {
            "prompt_ids": [row.prompt_ids for row in rows],
            "completion_ids": [row.completion_ids for row in rows],
            "logprobs": [row.logprobs for row in rows],
            "env_mask": [row.mask for row in rows],
            "trace": self._traces,
        }

    def _check_failures(self) -> None:
        failed = [trace for trace in self._traces if trace.stop.is_failure]
        if len(failed) > self._max_failed_share * len(self._traces):
            raise RolloutError(
                f"{len(failed)} of {len(self._traces)} traces failed, more than max_failed_share="
                f"{self._max_failed_share}; the first one: {failed[0].error}"
            )

    # -- log-probs -----------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        mask = inputs["tool_mask"] * inputs["completion_mask"]
        with self._masked(mask):
            loss: torch.Tensor = super()._compute_loss(model, inputs)
        self._measure(inputs["sampling_per_token_logps"], mask.bool())
        return loss

    def _measure(self, engine_logprobs: torch.Tensor, mask: torch.Tensor) -> None:
        assert self._logprobs is not None
        assert self._entropies is not None
        difference = (self._logprobs - engine_logprobs)[mask].abs()
        seen = self._statistics
        self._statistics = Statistics(
            tokens=seen.tokens + int(mask.sum()),
            difference=seen.difference + difference.sum().item(),
            largest_difference=max([seen.largest_difference, *difference.tolist()]),
            entropy=seen.entropy + self._entropies[mask].sum().item(),
        )

    def take_statistics(self) -> Statistics:
        """Sums over the tokens that had a place in the loss since this was last asked.

        TRL's own averages weight micro-batches, not tokens, and count empty ones as zero.
        """
        taken, self._statistics = self._statistics, Statistics()
        return taken

    @contextmanager
    def _masked(self, mask: torch.Tensor | None) -> Any:
        """Which tokens of the rows at hand were sampled: TRL does not hand it on to the forward."""
        self._mask = mask
        try:
            yield
        finally:
            self._mask = None

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Log-probs and entropies [B, T] of the sampled tokens, zero elsewhere.

        TRL's own method does the work, on the chunks instead of the rows.
        """
        assert self._mask is not None
        sequences = _cut(input_ids, attention_mask, self._mask, logits_to_keep)
        batches = _pack(sequences, self._forward_tokens)
        shape = (input_ids.size(0), logits_to_keep)
        if not batches:
            logprobs = _connected_zeros(model, shape)
            return self._keep(logprobs, logprobs.detach() if compute_entropy else None)
        recompute = len(batches) > 1 and torch.is_grad_enabled()
        parts = []
        for batch in batches:
            forward = self._forward_chunks
            args = (model, *_pad(batch, self._tokenizer.pad_token_id), compute_entropy)
            parts.append(
                checkpoint(forward, *args, use_reentrant=False) if recompute else forward(*args)
            )
        order = [sequence for batch in batches for sequence in batch]
        logprobs = _scatter([part[0] for part in parts], batches, order, shape)
        entropies = None
        if compute_entropy:
            entropies = _scatter([p for _, p in parts if p is not None], batches, order, shape)
        return self._keep(logprobs, entropies)

    def _keep(
        self, logprobs: torch.Tensor, entropies: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        self._logprobs = logprobs.detach()
        self._entropies = None if entropies is None else entropies.detach()
        return logprobs, entropies, None

    def _forward_chunks(
        self,
        model: Any,
        ids: torch.Tensor,
        attention_mask: torch.Tensor,
        keep: int,
        compute_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        logprobs, entropies, _ = super()._get_per_token_logps_and_entropies(
            model, ids, attention_mask, keep, compute_entropy=compute_entropy
        )
        return logprobs, entropies


def _cut(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor, logits_to_keep: int
) -> list[_Sequence]:
    """The chunks of all rows, each with its own prompt in front."""
    first = input_ids.size(1) - logits_to_keep
    sequences = []
    for row, row_mask in enumerate(mask.tolist()):
        query = input_ids[row, :first][attention_mask[row, :first].bool()]
        for span in spans(row_mask):
            own = input_ids[row, first + span.start : first + span.end]
            ids = own if span.start else torch.cat([query, own])
            length = len(ids) - (span.end - span.output)
            sequences.append(_Sequence(ids, length, row, (span.output, span.end)))
    return sequences


def _pack(sequences: list[_Sequence], forward_tokens: int) -> list[list[_Sequence]]:
    """Batches of like length, each of at most ``forward_tokens`` tokens with its padding."""
    batches: list[list[_Sequence]] = []
    for sequence in sorted(sequences, key=lambda s: (len(s.ids), s.prompt_length)):
        # Sorted by length, so a sequence is the longest of its batch so far.
        if batches and (len(batches[-1]) + 1) * len(sequence.ids) <= forward_tokens:
            batches[-1].append(sequence)
        else:
            batches.append([sequence])
    return batches


def _pad(batch: list[_Sequence], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ids and mask [N, S], padded on the right so that positions start at 0, and what to keep."""
    ids = pad_sequence([s.ids for s in batch], batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(s.ids) for s in batch], device=ids.device)
    attention_mask = (torch.arange(ids.size(1), device=ids.device) < lengths[:, None]).long()
    return ids, attention_mask, ids.size(1) - min(s.prompt_length for s in batch)


def _scatter(
    values: Sequence[torch.Tensor],
    batches: list[list[_Sequence]],
    order: list[_Sequence],
    shape: tuple[int, int],
) -> torch.Tensor:
    """Values of the output tokens, put where the tokens lie in the rows: [B, T]."""
    flat = []
    for kept, batch in zip(values, batches, strict=True):
        offset = max(len(s.ids) for s in batch) - kept.size(1)
        flat += [
            kept[i, s.prompt_length - offset : len(s.ids) - offset] for i, s in enumerate(batch)
        ]
    device = flat[0].device
    columns = torch.cat([torch.arange(*s.columns, device=device) for s in order])
    rows = torch.cat([torch.full((s.columns[1] - s.columns[0],), s.row) for s in order]).to(device)
    joined = torch.cat(flat)
    return joined.new_zeros(shape).index_put((rows, columns), joined)


def _connected_zeros(model: Any, shape: tuple[int, int]) -> torch.Tensor:
    """Zeros that a backward pass can go through, for rows of which every token is masked."""
    parameter = next(p for p in model.parameters() if p.requires_grad)
    zeros: torch.Tensor = parameter.new_zeros(shape) + 0.0 * parameter.sum()
    return zeros
