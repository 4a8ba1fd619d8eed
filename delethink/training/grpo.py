"""The TRL seam: all of delethink that knows ``GRPOTrainer``, which ``trl_trainer.py`` loads.

A trace is one row (``rows.py``), so advantages are TRL's own and taken over traces. The loss is a
sum over sampled tokens of TRL's own per-token term times a weight (``objective.py``;
arXiv 2510.06557, equation 3). A sum can be taken in parts: chunks are forwarded in packed batches
(``chunk_rows.py``), each batch goes through TRL's loss and backward at once, and its activations
are gone before the next one. So nothing is computed twice, and memory does not grow with thinking.

TRL marks ``rollout_func`` as experimental, so the version is pinned and nothing else touches it.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from transformers import Trainer
from trl import import_utils

from delethink.errors import ConfigError, RolloutError
from delethink.training.batching import (
    FILLER,
    ChunkRow,
    Layout,
    Ledger,
    Packed,
    chunk_rows,
    fill_up,
    flatten,
    pack_rows,
)
from delethink.training.data_parallel import (
    Processes,
    Shares,
    chunk_tokens,
    shard_on_cpu,
    share_out,
)
from delethink.training.loss import StepSize, TokenBatch, TokenLosses, token_weight
from delethink.training.step_metrics import StepStatistics, TokenStatistics
from delethink.types import Trace, TraceStop

_GENERATION = "trl.generation.vllm_generation"


def _import_without_vllm() -> None:
    available, importing = import_utils.is_vllm_available, True

    def answer(min_version: str | None = None) -> bool:
        if not importing:  # by TRL's own generation, in a trainer of somebody else's
            raise ImportError(
                f"delethink.training has loaded TRL without vLLM: import {_GENERATION} before it "
                "in a process that also trains with use_vllm=True"
            )
        return False

    import_utils.is_vllm_available = answer
    try:
        importlib.import_module(_GENERATION)
    finally:
        import_utils.is_vllm_available, importing = available, False


if find_spec("vllm") and not {"vllm", _GENERATION} & set(sys.modules):
    _import_without_vllm()

from trl import GRPOTrainer  # noqa: E402

__all__ = ["GRPOTrainer"]


class NonFinite(NamedTuple):
    """What was not finite in an optimizer step.

    Args:
        step: of the optimizer, from 1.
        what: ``"loss"``, ``"log-prob"`` or ``"gradient"``, the first that was found.
        traces: places of the traces with such a log-prob in the batch that was sampled last; none
            where only a sum is known to be wrong.
    """

    step: int
    what: str
    traces: list[int]


class Guarded(Trainer):  # type: ignore[misc]  # transformers' trainer is untyped
    """A trainer that takes no step with what is not finite, to be mixed into one.

    Args:
        on_nonfinite: told of a step that is not taken; may raise to stop the run.
    """

    def __init__(
        self, *args: Any, on_nonfinite: Callable[[NonFinite], None], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._on_nonfinite = on_nonfinite
        self._what: str | None = None  # was not finite, since the last optimizer step
        self._guilty: set[int] = set()
        self._places: list[int] = []  # of the micro-batch's traces in the batch

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a micro-batch, looked at."""
        self._places = inputs["place"]
        loss: torch.Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        if not bool(torch.isfinite(loss)):
            self._what = self._what or "loss"
        return loss

    def _complete(self, part: Any, logprobs: torch.Tensor, entropies: Any) -> None:
        broken = ~torch.isfinite(logprobs.detach()).all(1)  # [K], chunks of a forward batch
        if bool(broken.any()):
            self._what = "log-prob"
            rows = broken.nonzero()[:, 0].tolist()
            traces = {part.rows[row].trace for row in rows} - {FILLER}
            self._guilty |= {self._places[trace] for trace in traces}
        super()._complete(part, logprobs, entropies)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A micro-batch; what it adds to the mean loss that is logged is finite."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        # The trainer zeroes its sum by taking it away from itself, which NaN would outlive.
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # The last word before the optimizer's step; the norm is that before clipping.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self._any_process_found(norm):
            what, guilty = self._what or "gradient", sorted(gather_object(sorted(self._guilty)))
            self._what, self._guilty = None, set()
            model.zero_grad(set_to_none=True)  # an optimizer leaves alone what has no gradient
            self._on_nonfinite(NonFinite(self.state.global_step + 1, what, guilty))
        return norm

    def _any_process_found(self, norm: Any) -> bool:
        value = float(norm) if norm is not None else 0.0
        found = self._what is not None or not math.isfinite(value)
        if self.accelerator.num_processes == 1:
            return found
        flag = torch.tensor(float(found), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)


def remove_dropout(model: torch.nn.Module) -> None:
    """Sets every dropout of a model to 0, those that are plain numbers on a module included."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def check_repeatable(model: Any, vocabulary: int) -> None:
    """Refuses a model that says different things of the same tokens while it trains.

    Raises:
        ConfigError: two forward passes in training mode, or one of them and one in evaluation mode,
            differ. The loss would compare probabilities of different models.
    """
    ids = torch.arange(32, device=model.device)[None] % vocabulary
    was_training = model.training
    with torch.no_grad():
        model.train()
        first, second = model(ids).logits, model(ids).logits
        model.eval()
        sampled = model(ids).logits
    model.train(was_training)
    for other, where in ((second, "twice in training mode"), (sampled, "in training and sampling")):
        difference = (first - other).abs().max().item()
        if difference > 1e-3:
            raise ConfigError(
                f"the model is random while it trains: its logits for the same tokens differ by "
                f"{difference:.3g} {where}. Its dropouts are set to 0 already; switch off what "
                "else is random in its configuration"
            )


_SET_FOR_THE_SUM = (
    "loss_type",
    "importance_sampling_level",
    "use_vllm",
    "vllm_importance_sampling_correction",
)


class Filled(NamedTuple):
    """The places of a batch, filled: group after group, a trace for each example."""

    examples: list[dict[str, Any]]
    traces: list[Trace]


class Sampled(NamedTuple):
    """What was sampled for a batch and what the trainer made of it, row by row."""

    examples: list[dict[str, Any]]  # rows of the dataset
    traces: list[Trace]
    rewards: list[dict[str, float | None]]  # by name; None where a reward does not apply
    advantages: list[float]
    in_loss: list[bool]  # whether it has a place in the loss


@dataclass(frozen=True)
class Objective:
    """What the trainer does beyond the settings of ``GRPOConfig``.

    Args:
        loss_type: under TRL's names; see ``token_weight``.
        importance_sampling_level: ``"sequence"`` takes the ratio over the whole trace.
        correction: of the engine's probabilities, token by token: ``"truncate"`` bounds the weight,
            ``"mask"`` drops tokens beyond the bound, ``None`` does nothing.
        correction_cap: that bound.
        mask_budget: traces out of budget have no place in the loss, and do not count in its mean.
        forward_tokens: tokens in one forward pass, padding included.
        max_failed_share: a larger share of failed traces in a batch is an error.
    """

    loss_type: str = "grpo"
    importance_sampling_level: str = "token"
    correction: str | None = "truncate"
    correction_cap: float = 2.0
    mask_budget: bool = False
    forward_tokens: int = 16_384
    max_failed_share: float = 0.1


class Work(NamedTuple):
    """What was forwarded to train, since it was last asked for."""

    tokens: int = 0  # without padding
    padded: float = 0.0  # with it
    batches: int = 0


@dataclass
class _Part:
    """A forward batch on its way through TRL's loss."""

    layout: Layout
    rows: Sequence[ChunkRow]
    inputs: dict[str, Any]
    engine_logprobs: torch.Tensor  # [K, T]
    means: tuple[torch.Tensor, torch.Tensor] | None  # [K] each, where ratios are over the trace


class DelethinkTrainer(GRPOTrainer):  # type: ignore[misc]  # TRL is untyped
    """``GRPOTrainer`` over traces of chunks.

    Args:
        play: fills the places of a batch (rows of the dataset, once for each trace of a group) with
            traces, and says of which examples they are: of these, or of others in their place.
        on_sampled: told what was sampled and how it was scored, once for each batch.
        objective: what ``GRPOConfig`` does not say.
        processes: that train together; the first one alone plays, pays and is told.
        cost: of training on a trace, by which traces are dealt out to processes.

    The other arguments are those of ``GRPOTrainer``; ``loss_type`` and
    ``importance_sampling_level`` of its configuration are not looked at.

    Raises:
        ConfigError: the model is random while it trains, beyond its dropouts, which are set to 0.
    """

    def __init__(
        self,
        *args: Any,
        play: Callable[[list[dict[str, Any]]], Filled],
        on_sampled: Callable[[Sampled], None],
        objective: Objective,
        processes: Processes | None = None,
        cost: Callable[[Trace], float] = chunk_tokens,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, rollout_func=self._roll_out, **kwargs)
        remove_dropout(self.model)
        check_repeatable(self.model, self.model.config.get_text_config().vocab_size)
        self.objective = objective
        self._play, self._on_sampled = play, on_sampled
        self._processes, self._cost = processes or Processes(), cost
        self._examples: list[dict[str, Any]] = []  # of the batch; of all of it in the first process
        self._rewards: list[dict[str, float | None]] = []  # of the whole batch
        self._buffered_inputs: Any  # TRL's: micro-batches of the batch at hand
        self.shares: Shares | None = None  # of that batch
        self._statistics = TokenStatistics(has_kl=self.beta != 0.0)
        self._ledger = Ledger()
        self._work = Work()
        self._is_fresh = False  # a batch was sampled and not yet cut into micro-batches
        self._part: _Part | None = None  # what TRL's loss is being computed of

    def create_accelerator_and_postprocess(self) -> None:
        """Accelerate's, which shards on the CPU too."""
        super().create_accelerator_and_postprocess()
        shard_on_cpu(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains, and makes sure that the last batch was trained on whole if it was to be."""
        done = super().train(*args, **kwargs)
        if self.is_between_batches:
            self._ledger.close()
        return done

    # -- sampling ------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # Examples are kept as they came: TRL adds what the rollout returned to `inputs`.
        self._examples = [dict(example) for example in inputs]
        rank = self._processes.rank
        self._ledger.close()
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        shares = self._shares
        advantages = self.accelerator.gather(output["advantages"]).to(self._loss_dtype)
        if self._processes.is_first:
            self._on_sampled(
                Sampled(
                    self._examples,
                    shares.all_traces,
                    self._rewards,
                    advantages.tolist(),
                    self._in_loss(shares.all_traces, self._rewards),
                )
            )
        in_loss = self._in_loss(shares.traces, shares.own(rank, self._rewards))
        places = shares.order[rank]
        lengths = {p: t.length for p, t, i in zip(places, shares.traces, in_loss, strict=True) if i}
        self._ledger.open(lengths, self.num_iterations)
        self._is_fresh = True
        kept: dict[str, Any] = {"advantages": advantages[places], "trace": list(shares.traces)}
        kept |= {"place": list(places), "row": list(range(len(places))), "in_loss": in_loss}
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            if name in output:  # by trace, without the padding
                kept[name] = [
                    row[: trace.length].clone()
                    for row, trace in zip(output[name], shares.traces, strict=True)
                ]
        return kept

    @property
    def _shares(self) -> Shares:
        assert self.shares is not None, "nothing was sampled yet"
        return self.shares

    def _in_loss(self, traces: list[Trace], rewards: list[dict[str, float | None]]) -> list[bool]:
        return [
            self._has_place(trace) and any(value is not None for value in own.values())
            for trace, own in zip(traces, rewards, strict=True)
        ]

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        paid = self._processes.lead(self._pay)
        # In double precision, so that advantages are not rounded on the way.
        rewards = torch.tensor(paid, dtype=torch.float64, device=self.accelerator.device)
        self._rewards = [
            {
                name: None if math.isnan(value) else value
                for name, value in zip(self.reward_func_names, row, strict=True)
            }
            for row in rewards.tolist()
        ]
        return rewards

    def _pay(self) -> list[list[float]]:
        """What each reward function gives for each trace of the batch, in the first process."""
        traces, examples = self._shares.all_traces, self._examples
        columns = {key: [example[key] for example in examples] for key in examples[0]}
        columns |= {"prompts": columns.pop("prompt"), "trace": traces}
        paid = [function(**columns) for function in self.reward_funcs]
        return [
            [math.nan if value is None else value for value in row]
            for row in zip(*paid, strict=True)
        ]

    def _roll_out(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        everybodys = [row for own in self._processes.gather(self._examples) for row in own]
        self.shares = share_out(
            self._processes,
            len(everybodys),
            lambda: self._play_checked(everybodys),
            lambda trace: self._cost(trace) if self._has_place(trace) else 0.0,
            self.args.steps_per_generation // self.args.gradient_accumulation_steps,
        )
        pad, traces = self._tokenizer.pad_token_id, self.shares.traces
        rows = [flatten(trace, pad, self._has_place(trace)) for trace in traces]
        return {
            "prompt_ids": [row.prompt_ids for row in rows],
            "completion_ids": [row.completion_ids for row in rows],
            "logprobs": [row.logprobs for row in rows],
            "env_mask": [row.mask for row in rows],
        }

    def _has_place(self, trace: Trace) -> bool:
        """Whether a trace has a place in the loss; rewards aside."""
        masked = self.objective.mask_budget and trace.stop is TraceStop.BUDGET
        return trace.length > 0 and not masked

    def _play_checked(self, examples: list[dict[str, Any]]) -> list[Trace]:
        self._examples, traces = self._play(examples)
        failed = [trace for trace in traces if trace.stop.is_failure]
        most = self.objective.max_failed_share
        if len(failed) > most * len(traces):
            raise RolloutError(
                f"{len(failed)} of {len(traces)} traces failed, more than max_failed_share="
                f"{most}; the first one: {failed[0].error}"
            )
        return traces

    # -- micro-batches -------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if self._is_fresh:
            self._is_fresh = False
            self._buffered_inputs = _as_dealt(self._buffered_inputs)
            self._weigh(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _weigh(self, micro_batches: list[dict[str, Any]]) -> None:
        """Writes to each micro-batch what its optimizer step holds, on all processes together."""
        step = self.args.gradient_accumulation_steps
        counts_of_all = torch.zeros(2, dtype=torch.long, device=self.accelerator.device)
        for first in range(0, len(micro_batches), step):
            window = micro_batches[first : first + step]
            counted = [
                trace.length
                for inputs in window
                for trace, counts in zip(inputs["trace"], inputs["in_loss"], strict=True)
                if counts
            ]
            local = torch.tensor([len(counted), sum(counted)], device=self.accelerator.device)
            together = self.accelerator.reduce(local, reduction="sum")
            traces, tokens = together.tolist()
            for inputs in window:
                inputs |= {"traces": max(1, traces), "tokens": max(1, tokens)}
            counts_of_all += together
        self._check_sums(*counts_of_all.tolist())

    def _check_sums(self, traces: int, tokens: int) -> None:
        """The first of several processes knows all traces: it checks that together all have them.

        The ledger is each process's own.
        """
        if self._processes.size == 1 or not self._processes.is_first:
            return
        lengths = [
            trace.length
            for trace, counts in zip(
                self._shares.all_traces,
                self._in_loss(self._shares.all_traces, self._rewards),
                strict=True,
            )
            if counts
        ]
        if (traces, tokens) != (len(lengths), sum(lengths)):
            raise RuntimeError(
                f"{traces} traces of {tokens} tokens are in the loss of all processes, but "
                f"{len(lengths)} of {sum(lengths)} tokens were sampled for it"
            )

    @property
    def is_between_batches(self) -> bool:
        """Whether the next optimizer step samples anew."""
        micro_batches: int = self.args.steps_per_generation * self.num_iterations
        done: int = self._step
        return done % micro_batches == 0

    @property
    def _loss_dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype if dtype is torch.float64 else torch.float32

    # -- loss ----------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """The loss of a micro-batch; all its parts but the last have gone backward already."""
        rows = [row for row in chunk_rows(inputs["trace"]) if inputs["in_loss"][row.trace]]
        packed = pack_rows(rows, self.objective.forward_tokens)
        self._enter(inputs, rows, packed)
        packed = self._in_step(packed)
        if self.is_fsdp_enabled:  # else every process would hold all gradients
            model.set_requires_gradient_sync(True)
        if not packed.batches:
            return _connected_zero(model)
        means = self._trace_means(model, inputs, packed)
        done = torch.zeros((), device=self.accelerator.device)
        for batch in packed.batches[:-1]:
            with self._without_exchange(model):
                loss = self._part_loss(model, inputs, batch, means)
                with torch.autocast(loss.device.type, enabled=False):
                    self.accelerator.backward(loss)
            done = done + loss.detach()
        return self._part_loss(model, inputs, packed.batches[-1], means) + done

    def _in_step(self, packed: Packed) -> Packed:
        """With as many batches as gradients, or sharded weights, take of every process."""
        number = len(packed.batches)
        if self.is_fsdp_enabled:
            number = self._processes.agree_on_batches(number)
        elif self._processes.size > 1:
            number = max(1, number)
        return fill_up(packed, number, self._tokenizer.pad_token_id)

    def _without_exchange(self, model: Any) -> Any:
        """Whole gradients stay in their process until the last part; sharded ones cannot."""
        return nullcontext() if self.is_fsdp_enabled else self.accelerator.no_sync(model)

    def _enter(self, inputs: dict[str, Any], rows: list[ChunkRow], packed: Packed) -> None:
        tokens: Counter[int] = Counter()
        for row in rows:
            tokens[inputs["place"][row.trace]] += len(row.output_ids)
        self._ledger.count(tokens)
        padded = packed.tokens / (1 - packed.padding)
        done = self._work
        self._work = Work(
            done.tokens + packed.tokens, done.padded + padded, done.batches + len(packed.batches)
        )

    def _part_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        batch: Sequence[ChunkRow],
        means: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """The share of some chunks in the loss of the optimizer step."""
        layout = self._lay_out(batch)
        places = torch.tensor([row.trace for row in batch], device=self.accelerator.device)
        part = {
            "prompt_ids": layout.ids[:, : layout.prompt_size],
            "completion_ids": layout.ids[:, layout.prompt_size :],
            "advantages": inputs["advantages"][places],
            "tool_mask": layout.place(self._weights(inputs, batch)),
            # What makes TRL's own divisor of these losses 1.
            "num_items_in_batch": torch.tensor(
                self.accelerator.num_processes
                * self.args.steps_per_generation
                / self.current_gradient_accumulation_steps
            ),
        }
        part["prompt_mask"] = torch.ones_like(part["prompt_ids"])
        part["completion_mask"] = torch.ones_like(part["completion_ids"])
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            if name in inputs:
                part[name] = layout.place([_of(inputs[name], row) for row in batch])
        engine = layout.place([row.sampled_at(self.accelerator.device) for row in batch])
        own = None if means is None else (means[0][places], means[1][places])
        self._part = _Part(layout, batch, part, engine, own)
        try:
            with self._as_a_plain_sum(len(batch)) as undo:
                loss: torch.Tensor = super()._compute_loss(model, part) * undo
        finally:
            self._part = None
        return loss

    def _lay_out(self, batch: Sequence[ChunkRow]) -> Layout:
        return Layout(batch, self._tokenizer.pad_token_id, self.accelerator.device)

    def _weights(self, inputs: dict[str, Any], batch: Sequence[ChunkRow]) -> list[torch.Tensor]:
        """Of each output token of each chunk; processes are averaged over, so theirs are more."""
        weights = []
        for row in batch:
            if row.trace == FILLER:
                weights.append(torch.zeros(len(row.output_ids), dtype=self._loss_dtype))
                continue
            weight = self.accelerator.num_processes * token_weight(
                self.objective.loss_type,
                inputs["trace"][row.trace].length,
                StepSize(inputs["traces"], inputs["tokens"], self.max_completion_length),
            )
            weights.append(torch.full((len(row.output_ids),), weight, dtype=self._loss_dtype))
        return weights

    @contextmanager
    def _as_a_plain_sum(self, num_rows: int) -> Any:
        """TRL's loss as a sum of terms times mask; gives what undoes TRL's own divisor.

        The mask holds the weights. TRL divides by the mask of a row where that is above 1, which
        weights never are, or by constants, which are undone. It multiplies a term with
        ``importance_sampling_ratio`` only where it believes that it ran vLLM itself.
        """
        before = {name: getattr(self, name) for name in _SET_FOR_THE_SUM}
        kind = self.objective.loss_type
        plain = kind if kind in ("cispo", "sapo") else "dr_grpo"  # the same terms, one divisor
        steps = self.current_gradient_accumulation_steps
        undo = {"cispo": 1, "sapo": num_rows * steps}.get(
            plain, num_rows * self.max_completion_length * steps
        )
        self.loss_type, self.importance_sampling_level = plain, "token"
        self.use_vllm = self.vllm_importance_sampling_correction = (
            self.objective.correction is not None
        )
        logged = {name: list(values) for name, values in self._metrics["train"].items()}
        # Nor do processes wait for each other to measure what is thrown away: their parts differ.
        self.accelerator.gather = self.accelerator.reduce = lambda tensor, *_, **__: tensor
        try:
            yield undo
        finally:
            del self.accelerator.gather, self.accelerator.reduce
            for name, value in before.items():
                setattr(self, name, value)
            self._metrics["train"].clear()  # of weighted masks; ours are exact
            self._metrics["train"].update(logged)

    # -- log-probs -----------------------------------------------------------------------------

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
        """Log-probs and entropies of the sampled tokens, zero elsewhere.

        In the loss, of the chunks of a part: [K, T], by TRL's own method. Before it, where TRL
        wants log-probs of whole rows (of the weights before the first step on a batch, or of the
        reference): [B, T], chunk by chunk.
        """
        if self._part is None:
            logprobs = self._rows_logprobs(model, self._shares.traces, logits_to_keep)
            return logprobs, None, None
        logprobs, entropies, _ = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, compute_entropy=compute_entropy
        )
        zeros = torch.zeros_like(logprobs)
        logprobs = logprobs.where(self._part.layout.is_output, zeros)
        self._complete(self._part, logprobs, entropies)
        return logprobs, entropies, None

    def _rows_logprobs(self, model: Any, traces: list[Trace], width: int) -> torch.Tensor:
        """Log-probs [B, width] of all that was sampled in these traces, without a gradient."""
        rows = torch.zeros(
            len(traces), width, dtype=self._loss_dtype, device=self.accelerator.device
        )
        packed = self._in_step(pack_rows(chunk_rows(traces), self.objective.forward_tokens))
        with torch.no_grad():
            for batch in packed.batches:
                for row, values in self._chunk_logprobs(model, batch):
                    rows[row.trace, row.start : row.end] = values.to(rows.dtype)
        return rows

    def _chunk_logprobs(
        self, model: Any, batch: Sequence[ChunkRow]
    ) -> list[tuple[ChunkRow, torch.Tensor]]:
        layout = self._lay_out(batch)
        keep = layout.ids.size(1) - layout.prompt_size
        logprobs, _, _ = super()._get_per_token_logps_and_entropies(
            model, layout.ids, torch.ones_like(layout.ids), keep
        )
        taken = zip(batch, layout.take(logprobs), strict=True)
        return [(row, values) for row, values in taken if row.trace != FILLER]

    def _trace_means(
        self, model: Any, inputs: dict[str, Any], packed: Packed
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Log of the ratio of each trace, the mean over all its tokens, and its mean correction.

        A ratio over a trace would tie all its chunks into one graph. What every token adds to its
        gradient is the same for all tokens of the trace; with these means, taken in a pass of its
        own, each part can go backward alone.
        """
        if self.objective.importance_sampling_level == "token":
            return None
        means = torch.zeros(
            2, len(inputs["trace"]), dtype=self._loss_dtype, device=self.accelerator.device
        )
        with torch.no_grad():
            for batch in packed.batches:
                for row, now in self._chunk_logprobs(model, batch):
                    old = now
                    if "old_per_token_logps" in inputs:
                        old = inputs["old_per_token_logps"][row.trace][row.start : row.end]
                    engine = row.sampled_at(now.device)
                    both = torch.stack([now - old, self._correct(old - engine.to(old.dtype))])
                    means[:, row.trace] += both.sum(-1) / inputs["trace"][row.trace].length
        return means[0], means[1]

    def _complete(
        self, part: _Part, logprobs: torch.Tensor, entropies: torch.Tensor | None
    ) -> None:
        """Writes to the part what depends on its log-probs, and measures them."""
        now = logprobs.detach()
        old = part.inputs.get("old_per_token_logps", now)
        log_ratio = now - old
        correction = self._correct(old - part.engine_logprobs.to(now.dtype))
        if part.means is not None:
            log_ratio, correction = (mean[:, None].expand_as(now) for mean in part.means)
            part.inputs["old_per_token_logps"] = now - log_ratio
        part.inputs["importance_sampling_ratio"] = correction
        ratio = log_ratio.exp()
        advantages = part.inputs["advantages"][:, None]
        clipped = (ratio < 1 - self.epsilon_low) & (advantages < 0)
        clipped |= (ratio > 1 + self.epsilon_high) & (advantages > 0)
        kl = None
        if (reference := part.inputs.get("ref_per_token_logps")) is not None:
            kl = (reference - now).exp() - (reference - now) - 1
        if part.rows[0].trace != FILLER:
            tokens = TokenBatch(now, entropies, advantages, part.engine_logprobs)
            losses = TokenLosses(torch.zeros_like(now), ratio, correction, clipped, kl)
            indices = [row.place for row in part.rows]
            self._statistics.add(indices, part.layout.is_output, tokens, losses)

    def _correct(self, log_ratio: torch.Tensor) -> torch.Tensor:
        """The weight of each token for its probability in the trainer over that in the engine."""
        ratio, cap = log_ratio.exp(), self.objective.correction_cap
        if self.objective.correction is None:
            return torch.ones_like(ratio)
        if self.objective.correction == "mask":
            return ratio.where(ratio <= cap, torch.zeros_like(ratio))
        return ratio.clamp(max=cap)

    # -- what was measured ---------------------------------------------------------------------

    def take_statistics(self) -> StepStatistics:
        """Means over the tokens that had a place in the loss since this was last asked."""
        return self._statistics.take(self.accelerator)

    def take_work(self) -> Work:
        """What was forwarded in the loss since this was last asked, by all processes together."""
        own, self._work = torch.tensor(self._work, device=self.accelerator.device), Work()
        tokens, padded, batches = self.accelerator.reduce(own, reduction="sum").tolist()
        return Work(round(tokens), padded, round(batches))


def _connected_zero(model: Any) -> torch.Tensor:
    """A zero that a backward pass can go through, where no trace has a place in the loss."""
    parameter = next(p for p in model.parameters() if p.requires_grad)
    zero: torch.Tensor = 0.0 * parameter.sum()
    return zero


def _of(values: Sequence[torch.Tensor], row: ChunkRow) -> torch.Tensor:
    """The values of a chunk's output tokens, out of those of whole traces."""
    return torch.zeros(1) if row.trace == FILLER else values[row.trace][row.start : row.end]


def _as_dealt(micro_batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Micro-batches in the order in which traces were dealt out, which TRL has shuffled."""
    size = len(micro_batches[0]["row"])
    rows = {row: (part, i) for part in micro_batches for i, row in enumerate(part["row"])}
    ordered = [rows[row] for row in sorted(rows)]

    def column(key: str, first: int) -> Any:
        values = [part[key][i] for part, i in ordered[first : first + size]]
        return torch.stack(values) if isinstance(micro_batches[0][key], torch.Tensor) else values

    return [
        {key: column(key, first) for key in micro_batches[0]}
        for first in range(0, len(ordered), size)
    ]
