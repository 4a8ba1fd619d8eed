"""``DelethinkTrainer``: TRL's ``GRPOTrainer`` over traces of chunks.

A dataset row is a trace, so the advantages are TRL's own, over traces. TRL also keeps the data, the
training loop, logging and checkpoints. The loss is ``loss.py``: a sum over tokens, which can be
taken in parts. Each packed batch of chunks goes through the forward and backward pass alone, so
nothing is computed twice. Memory does not grow with the length of a trace.

TRL calls ``rollout_func`` experimental, so its version is pinned. Its private methods are used here
only: ``_generate_and_score_completions`` for advantages, ``_calculate_rewards``,
``_get_per_token_logps_and_entropies`` for log-probs, ``_prepare_inputs`` and ``_step``.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from trl import import_utils

from delethink.errors import ConfigError, NonFiniteError, RolloutError
from delethink.training.batching import (
    FILLER,
    ChunkRow,
    ForwardBatch,
    ForwardCounts,
    MicroBatch,
    PackedChunks,
    RolloutBatch,
    ScoredBatch,
    TokenCoverageCheck,
    TraceRow,
    TrainingTrace,
    chunk_rows,
    pack_chunks,
    trace_row,
)
from delethink.training.data_parallel import (
    RankGroup,
    Shards,
    chunk_tokens,
    enable_cpu_sharding,
    shard_traces,
)
from delethink.training.loss import (
    LOSSES,
    LossSettings,
    StepSize,
    TokenBatch,
    TraceRatio,
    engine_correction,
    token_losses,
)
from delethink.training.metrics import StepStatistics, TokenStatistics
from delethink.training.token_stats import TokenStats
from delethink.types import Trace, TraceStop

_TRL_GENERATION = "trl.generation.vllm_generation"


def _import_trl_without_vllm() -> None:
    """Import TRL's generation module without vLLM, which takes seconds to load and is not used."""
    is_available, importing = import_utils.is_vllm_available, True

    def is_vllm_available(min_version: str | None = None) -> bool:
        if not importing:  # another trainer of this process uses TRL's own vLLM support
            raise ImportError(
                "delethink.training imported TRL without vLLM; to train with use_vllm=True in the "
                f"same process, import {_TRL_GENERATION} before it"
            )
        return False

    import_utils.is_vllm_available = is_vllm_available
    try:
        importlib.import_module(_TRL_GENERATION)
    finally:
        import_utils.is_vllm_available, importing = is_available, False


if find_spec("vllm") and not {"vllm", _TRL_GENERATION} & set(sys.modules):
    _import_trl_without_vllm()

from trl import GRPOTrainer  # noqa: E402

__all__ = ["GRPOTrainer"]


class NonFinite(NamedTuple):
    """An optimizer step that is skipped because of NaN or infinity."""

    step: int  # from 1
    quantity: str  # "loss", "log-prob" or "gradient": the earliest that is not finite
    traces: list[int]  # batch indices of the traces with such a log-prob


def raise_nonfinite(found: NonFinite) -> None:
    """Raise ``NonFiniteError``."""
    raise NonFiniteError(f"step {found.step}: a {found.quantity} is not finite")


class DelethinkTrainer(GRPOTrainer):  # type: ignore[misc]  # TRL is untyped
    """``GRPOTrainer`` over traces of chunks.

    Args:
        args: ``DelethinkConfig``.
        run_rollouts: Returns traces for the examples of a batch, one for each generation, and their
            examples: the same ones, or replacements. Called on the main rank.
        on_sampled: Called with each scored batch, on the main rank.
        on_nonfinite: Called on every rank with a step that is skipped; may raise to stop the run.
            By default ``NonFiniteError`` is raised.
        before_rollouts: Called on every rank before each batch is sampled.
        after_rollouts: Called on every rank once it has its traces.
        ranks: All ranks that train together.
        cost: Training cost of a trace, by which traces are sharded over ranks.

    The other arguments are those of ``GRPOTrainer``.

    Raises:
        ConfigError: The model is random in training mode, although its dropouts are set to 0.
    """

    def __init__(
        self,
        *args: Any,
        run_rollouts: Callable[[list[dict[str, Any]]], RolloutBatch],
        on_sampled: Callable[[ScoredBatch], None],
        on_nonfinite: Callable[[NonFinite], None] = raise_nonfinite,
        before_rollouts: Callable[[], None] = lambda: None,
        after_rollouts: Callable[[], None] = lambda: None,
        ranks: RankGroup | None = None,
        cost: Callable[[Trace], float] = chunk_tokens,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, rollout_func=self._sample_rows, **kwargs)
        remove_dropout(self.model)
        check_deterministic(self.model, self.model.config.get_text_config().vocab_size)
        self.loss_settings = LossSettings.from_config(self.args)
        self._run_rollouts, self._on_sampled = run_rollouts, on_sampled
        self._on_nonfinite, self._cost = on_nonfinite, cost
        self._before_rollouts, self._after_rollouts = before_rollouts, after_rollouts
        self._ranks = ranks or RankGroup()
        # The current batch. The main rank has the examples of all ranks, and all ranks all rewards.
        self._examples: list[dict[str, Any]] = []
        self._rewards: list[dict[str, float | None]] = []
        self._shards: Shards | None = None
        self._micro_batches: list[MicroBatch] = []
        # Since the last optimizer step, or since they were last read.
        self._nonfinite: str | None = None
        self._nonfinite_traces: set[int] = set()
        self._statistics = TokenStatistics(has_kl=self.beta != 0.0)
        self._token_stats = TokenStats(self.args.trace_token_stats)
        self._forward_counts = ForwardCounts()
        self._coverage = TokenCoverageCheck()

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, with FSDP also on the CPU."""
        super().create_accelerator_and_postprocess()
        enable_cpu_sharding(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and check that the last batch was trained on whole."""
        output = super().train(*args, **kwargs)
        if self.is_between_batches:
            self._coverage.finish()
        return output

    @property
    def shards(self) -> Shards:
        """The current batch, sharded over ranks."""
        assert self._shards is not None, "no batch was sampled yet"
        return self._shards

    @property
    def is_between_batches(self) -> bool:
        """True if the next optimizer step samples a new batch."""
        return bool(self._step % (self.args.steps_per_generation * self.num_iterations) == 0)

    @property
    def _loss_dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype if dtype is torch.float64 else torch.float32

    # -- sampling ------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> MicroBatch:
        """Return the next micro-batch; sample a batch if the last one is used up."""
        if self.is_between_batches:
            self._micro_batches = self._sample_micro_batches(generation_batch)
        index: int = self._step % self.args.steps_per_generation
        return self._micro_batches[index]

    def _sample_micro_batches(self, examples: list[dict[str, Any]]) -> list[MicroBatch]:
        self._coverage.finish()
        self._examples = [dict(example) for example in examples]  # TRL adds columns to `examples`
        # Calls _sample_rows, _get_per_token_logps_and_entropies and _calculate_rewards.
        output: dict[str, Any] = super()._generate_and_score_completions(examples)
        all_advantages = self.accelerator.gather(output["advantages"]).to(self._loss_dtype)
        shards = self.shards
        advantages = shards.padding.unpad(all_advantages.tolist())
        if self._ranks.is_main:
            pairs = zip(shards.all_traces, self._rewards, strict=True)
            in_loss = [self._is_in_loss(trace, rewards) for trace, rewards in pairs]
            self._on_sampled(
                ScoredBatch(self._examples, shards.all_traces, self._rewards, advantages, in_loss)
            )
        own = []
        for row, row_of_all in enumerate(shards.assignment[self._ranks.rank]):
            trace, index = shards.traces[row], shards.padding.trace(row_of_all)
            if index is None:
                own.append(TrainingTrace(FILLER, trace, 0.0, in_loss=False))
                continue
            logprobs = [
                output[name][row][: trace.length].clone() if name in output else None
                for name in ("old_per_token_logps", "ref_per_token_logps")
            ]
            in_loss_ = self._is_in_loss(trace, self._rewards[index])
            own.append(TrainingTrace(index, trace, advantages[index], in_loss_, *logprobs))
        lengths = {t.index: t.trace.length for t in own if t.in_loss}
        self._coverage.start(lengths, self.num_iterations)
        return self._split_micro_batches(own)

    def _sample_rows(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """Sample a batch and return the rows of this rank: TRL's ``rollout_func``."""
        examples = [example for own in self._ranks.gather(self._examples) for example in own]
        self._before_rollouts()
        self._shards = shard_traces(
            self._ranks,
            len(examples),
            lambda: self._run_checked_rollouts(examples),
            lambda trace: self._cost(trace) if self._is_trainable(trace) else 0.0,
            self.args.steps_per_generation // self.args.gradient_accumulation_steps,
            self.args.filler_rows,
        )
        self._after_rollouts()
        pad = self._tokenizer.pad_token_id
        rows = [trace_row(trace, pad, self._is_trainable(trace)) for trace in self._shards.traces]
        return {name: [getattr(row, name) for row in rows] for name in TraceRow._fields}

    def _run_checked_rollouts(self, examples: list[dict[str, Any]]) -> list[Trace]:
        self._examples, traces = self._run_rollouts(examples)
        failed = [trace for trace in traces if trace.stop.is_failure]
        if len(failed) > self.args.max_failed_share * len(traces):
            raise RolloutError(
                f"{len(failed)} of {len(traces)} traces failed, more than max_failed_share="
                f"{self.args.max_failed_share}; the first error: {failed[0].error}"
            )
        return traces

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        """Return the rewards of all traces: [traces, reward functions], NaN where none applies."""
        values = self._ranks.broadcast(self._compute_rewards)
        known = [[None if math.isnan(value) else value for value in row] for row in values]
        self._rewards = [dict(zip(self.reward_func_names, row, strict=True)) for row in known]
        rows = self.shards.padding.pad(values, [math.nan] * len(self.reward_funcs))
        # In float64, so that advantages are computed without rounding.
        return torch.tensor(rows, dtype=torch.float64, device=self.accelerator.device)

    def _compute_rewards(self) -> list[list[float]]:
        traces, examples = self.shards.all_traces, self._examples
        columns = {key: [example[key] for example in examples] for key in examples[0]}
        columns |= {"prompts": columns.pop("prompt"), "trace": traces}
        by_function = [function(**columns) for function in self.reward_funcs]
        return [
            [math.nan if value is None else value for value in row]
            for row in zip(*by_function, strict=True)
        ]

    def _is_trainable(self, trace: Trace) -> bool:
        """Return whether a trace can enter the loss, regardless of its rewards."""
        masked = self.args.mask_out_of_budget and trace.stop is TraceStop.BUDGET
        return trace.length > 0 and not masked

    def _is_in_loss(self, trace: Trace, rewards: Mapping[str, float | None]) -> bool:
        return self._is_trainable(trace) and any(value is not None for value in rewards.values())

    def _split_micro_batches(self, traces: list[TrainingTrace]) -> list[MicroBatch]:
        """Split the traces of this rank, and count each optimizer step over all ranks."""
        size = self.args.per_device_train_batch_size
        step_size, micro_batches = size * self.args.gradient_accumulation_steps, []
        for first in range(0, len(traces), step_size):
            window = traces[first : first + step_size]
            counted = [t.trace for t in window if t.in_loss]
            lengths = [trace.length for trace in counted]
            sizes = [len(counted), sum(lengths), len(chunk_rows(counted))]
            own = torch.tensor(sizes, device=self.accelerator.device)
            sums = self.accelerator.reduce(own, reduction="sum").tolist()
            number, tokens, chunks = (max(1, total) for total in sums)
            step = StepSize(number, tokens, self.max_completion_length, chunks)
            micro_batches += [
                MicroBatch(window[i : i + size], step) for i in range(0, step_size, size)
            ]
        return micro_batches

    # -- loss ----------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """Return the loss of a micro-batch.

        All forward batches but the last have gone through the backward pass already.
        """
        chunks = chunk_rows([t.trace for t in inputs.traces])
        rows = [row for row in chunks if inputs.traces[row.trace].in_loss]
        packed = pack_chunks(rows, self.args.forward_tokens)
        self._count(inputs, packed)
        if self.is_fsdp_enabled:  # otherwise every rank would keep full gradients
            model.set_requires_gradient_sync(True)
        batches = [self._forward_batch(rows) for rows in self._equalize(packed.batches)]
        if not batches:
            parameter = next(p for p in model.parameters() if p.requires_grad)
            zero: torch.Tensor = 0.0 * parameter.sum()  # for the backward pass
            return zero
        ratio = self._trace_ratio(model, inputs, batches)
        total = torch.zeros((), device=self.accelerator.device)
        for batch in batches[:-1]:
            # DDP reduces gradients once, in the last backward pass. Sharded gradients cannot wait.
            with nullcontext() if self.is_fsdp_enabled else self.accelerator.no_sync(model):
                loss = self._batch_loss(model, inputs, batch, ratio)
                with torch.autocast(loss.device.type, enabled=False):
                    self.accelerator.backward(loss)
            total = total + loss.detach()
        loss = self._batch_loss(model, inputs, batches[-1], ratio) + total
        if not bool(torch.isfinite(loss)):
            self._nonfinite = self._nonfinite or "loss"
        return loss

    def _batch_loss(
        self, model: Any, inputs: MicroBatch, batch: ForwardBatch, ratio: TraceRatio | None
    ) -> torch.Tensor:
        """Return the part of some chunks in the loss of the optimizer step."""
        logprobs, entropies = self._chunk_logprobs(model, batch, compute_entropy=True)
        dtype, device = self._loss_dtype, self.accelerator.device
        traces = [inputs.traces[row.trace] for row in batch.rows]
        nonfinite = ~torch.isfinite(logprobs.detach()).all(1)  # [K]
        if bool(nonfinite.any()):
            self._nonfinite = "log-prob"
            self._nonfinite_traces |= {
                traces[k].index
                for k in nonfinite.nonzero()[:, 0].tolist()
                if batch.rows[k].trace != FILLER
            }
        indices = [row.trace for row in batch.rows]
        tokens = TokenBatch(
            logprobs,
            entropies,
            torch.tensor([t.advantage for t in traces], dtype=dtype, device=device)[:, None],
            batch.pad([row.engine_logprobs_on(device) for row in batch.rows]).to(logprobs.dtype),
            self._pad_slices(batch, [t.old_logprobs for t in traces]),
            self._pad_slices(batch, [t.ref_logprobs for t in traces]),
            ratio and TraceRatio(*(mean[indices, None] for mean in ratio)),
        )
        losses = token_losses(tokens, self.loss_settings)
        if batch.rows[0].trace != FILLER:
            chunks = [row.chunk for row in batch.rows]
            tokens = tokens._replace(logprobs=logprobs.detach(), entropies=entropies.detach())
            self._statistics.add(chunks, batch.is_output, tokens, losses)
            self._token_stats.add(inputs, batch, tokens)
        weights = [
            # Gradients are averaged over ranks, so weights are multiplied by their number.
            self.accelerator.num_processes
            * LOSSES[self.loss_settings.loss_type].weight(
                t.trace.length, len(row.output_ids), inputs.step
            )
            if row.trace != FILLER
            else 0.0
            for row, t in zip(batch.rows, traces, strict=True)
        ]
        weight = torch.tensor(weights, dtype=dtype, device=device)[:, None] * batch.is_output
        return (losses.loss * weight).sum()

    def _pad_slices(
        self, batch: ForwardBatch, values: Sequence[torch.Tensor | None]
    ) -> torch.Tensor | None:
        """Return values of whole traces for the output tokens of a batch: [K, T]."""
        slices = []
        for row, value in zip(batch.rows, values, strict=True):
            if value is None:
                return None
            slices.append(value.new_zeros(1) if row.trace == FILLER else value[row.start : row.end])
        return batch.pad(slices)

    def _trace_ratio(
        self, model: Any, inputs: MicroBatch, batches: list[ForwardBatch]
    ) -> TraceRatio | None:
        """Return the mean log-ratio and correction of each trace, in passes without gradients."""
        # A ratio over a trace would keep the graphs of all its chunks. Given these means, each
        # chunk can go through the backward pass alone; see ``token_losses``.
        if self.loss_settings.importance_sampling_level == "token":
            return None
        size, device = len(inputs.traces), self.accelerator.device
        means = torch.zeros(2, size, dtype=self._loss_dtype, device=device)
        with torch.no_grad():
            for batch in batches:
                current = batch.unpad(self._chunk_logprobs(model, batch)[0])
                for row, logprobs in zip(batch.rows, current, strict=True):
                    if row.trace == FILLER:
                        continue
                    own = inputs.traces[row.trace]
                    old = own.old_logprobs
                    old = logprobs if old is None else old[row.start : row.end]
                    engine = row.engine_logprobs_on(device).to(old.dtype)
                    correction = engine_correction(old - engine, self.loss_settings)
                    sums = torch.stack([logprobs - old, correction]).sum(-1)
                    means[:, row.trace] += sums / own.trace.length
        return TraceRatio(*means)

    def _equalize(self, batches: list[list[ChunkRow]]) -> list[list[ChunkRow]]:
        """Add filler batches, so that no rank misses a collective."""
        number = len(batches)
        if self._ranks.size > 1:
            # With sharded weights every forward pass is one; with DDP only the last backward pass.
            most = max(self._ranks.gather(number)) if self.is_fsdp_enabled else number
            number = max(1, most)
        pad = self._tokenizer.pad_token_id
        filler = ChunkRow((pad,), (pad,), (0.0,), FILLER, 0, 0)
        return batches + [[filler]] * (number - len(batches))

    # -- log-probs -----------------------------------------------------------------------------

    def _chunk_logprobs(
        self, model: Any, batch: ForwardBatch, compute_entropy: bool = False
    ) -> tuple[torch.Tensor, Any]:
        """Return log-probs, 0 where there is no output token, and entropies: [K, T] each."""
        logprobs, entropies, _ = super()._get_per_token_logps_and_entropies(
            model,
            batch.ids,
            torch.ones_like(batch.ids),
            batch.is_output.size(1),
            compute_entropy=compute_entropy,
        )
        return logprobs.where(batch.is_output, torch.zeros_like(logprobs)), entropies

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Any,
        attention_mask: Any,
        logits_to_keep: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, None, None]:
        """Return log-probs of whole rows, chunk by chunk: [B, logits_to_keep].

        TRL calls this for the log-probs before the first step on a batch and for the reference.
        """
        traces, device = self.shards.traces, self.accelerator.device
        rows = torch.zeros(len(traces), logits_to_keep, dtype=self._loss_dtype, device=device)
        packed = pack_chunks(chunk_rows(traces), self.args.forward_tokens)
        batches = self._equalize(packed.batches)
        with torch.no_grad():
            for batch in map(self._forward_batch, batches):
                logprobs = batch.unpad(self._chunk_logprobs(model, batch)[0])
                for row, values in zip(batch.rows, logprobs, strict=True):
                    if row.trace != FILLER:
                        rows[row.trace, row.start : row.end] = values.to(rows.dtype)
        return rows, None, None

    def _forward_batch(self, rows: Sequence[ChunkRow]) -> ForwardBatch:
        return ForwardBatch(rows, self._tokenizer.pad_token_id, self.accelerator.device)

    # -- NaN and infinity ----------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train on a micro-batch and return its loss, 0 if not finite."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        # The returned loss is only logged, as a running sum which a NaN would never leave.
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the gradient norm; drop the gradients if anything in the step is not finite."""
        # This is the last call before the optimizer step, with the norm before clipping.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        found = self._nonfinite is not None or not math.isfinite(float(norm or 0.0))
        flag = torch.tensor(float(found), device=self.accelerator.device)
        if bool(self.accelerator.reduce(flag, reduction="sum") > 0):
            quantity = self._nonfinite or "gradient"
            traces = sorted(gather_object(sorted(self._nonfinite_traces)))
            self._nonfinite, self._nonfinite_traces = None, set()
            model.zero_grad(set_to_none=True)  # optimizers skip parameters without a gradient
            self._on_nonfinite(NonFinite(self.state.global_step + 1, quantity, traces))
        return norm

    # -- metrics -------------------------------------------------------------------------------

    def _count(self, inputs: MicroBatch, packed: PackedChunks) -> None:
        tokens: Counter[int] = Counter()
        for batch in packed.batches:
            for row in batch:
                tokens[inputs.traces[row.trace].index] += len(row.output_ids)
        self._coverage.add(tokens)
        before = self._forward_counts
        self._forward_counts = ForwardCounts(
            before.tokens + packed.tokens,
            before.padded_tokens + packed.tokens / (1 - packed.padding),
            before.batches + len(packed.batches),
        )

    def pop_statistics(self) -> StepStatistics:
        """Return means over the tokens in the loss of all ranks, and reset them. A collective."""
        return self._statistics.take(self.accelerator)

    def pop_token_stats(self) -> list[dict[str, Any]]:
        """Return values of single tokens for ``token_stats``, and reset them. A collective."""
        return self._token_stats.take(self._ranks)

    def pop_forward_counts(self) -> ForwardCounts:
        """Return the forwarded tokens of all ranks, and reset them. A collective."""
        own = torch.tensor(self._forward_counts, device=self.accelerator.device)
        self._forward_counts = ForwardCounts()
        tokens, padded, batches = self.accelerator.reduce(own, reduction="sum").tolist()
        return ForwardCounts(round(tokens), padded, round(batches))


def remove_dropout(model: torch.nn.Module) -> None:
    """Set every dropout of a model to 0, those in plain attributes of modules included."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def check_deterministic(model: Any, vocab_size: int) -> None:
    """Check that training mode and evaluation mode give the same logits, every time.

    Otherwise the loss would compare probabilities of different models.

    Raises:
        ConfigError: The logits of the same tokens differ.
    """
    ids = torch.arange(32, device=model.device)[None] % vocab_size
    was_training = model.training
    with torch.no_grad():
        model.train()
        first, second = model(ids).logits, model(ids).logits
        model.eval()
        sampled = model(ids).logits
    model.train(was_training)
    modes = {"two passes in training mode": second, "training and evaluation mode": sampled}
    for name, other in modes.items():
        if (difference := (first - other).abs().max().item()) > 1e-3:
            raise ConfigError(
                f"the model is random in training mode: its logits of the same tokens differ by "
                f"{difference:.3g} between {name}. All dropouts are already 0; turn off any other "
                "randomness in the model's configuration"
            )
