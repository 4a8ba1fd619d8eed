"""The table of metrics, and their values in an optimizer step.

``METRICS`` lists every key of ``metrics.jsonl``. The line on the terminal, the loggers and the
reference documentation read it. One row adds a metric of output tokens (``of_tokens``) or of
sampled traces (``of_batch``): it holds the formula. Other metrics are measured by the engine, in
``run_state.py`` or in ``trainer.py``.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from delethink.types import Score, Trace, TraceStop

if TYPE_CHECKING:
    import torch

    from delethink.training.loss import TokenBatch, TokenLosses

EVERY_STEP = "every step"
EVERY_BATCH = "first step on a batch"
Source = Literal["batch", "tokens", "forward", "optimizer", "clock", "ranks", "engine", "held-out"]


@dataclass(frozen=True)
class TraceBatch:
    """The N traces of a batch, group after group, with their scores."""

    traces: Sequence[Trace]
    scores: Sequence[Score]
    in_loss: Sequence[bool]
    group_size: int  # traces per problem, G
    policy_version: int  # weights in the first optimizer step on the batch
    reward_names: Sequence[str]

    @cached_property
    def rewards(self) -> list[float]:
        """Total rewards of the scored traces."""
        return [score.total for score in self.scores if score.total is not None]

    @cached_property
    def num_tokens(self) -> int:
        """Sampled tokens of all traces."""
        return sum(trace.length for trace in self.traces)

    @cached_property
    def ages(self) -> list[tuple[int, int]]:
        """Age of each chunk in weight updates, and its number of tokens."""
        return [
            (self.policy_version - chunk.policy_version, len(chunk.output_ids))
            for trace in self.traces
            for chunk in trace.chunks
            if chunk.policy_version is not None
        ]


# None is an error when the metric is computed.
TokenFormula = Callable[["TokenBatch", "TokenLosses"], "torch.Tensor | None"]


@dataclass(frozen=True)
class Metric:
    """A row of the table of metrics."""

    key: str  # in ``metrics.jsonl``; ``<name>`` stands for several names
    unit: str
    source: Source  # part of the program to measure it
    meaning: str
    when: str = EVERY_STEP  # lines of ``metrics.jsonl`` with the key
    of_tokens: TokenFormula | None = None  # for the output tokens of K chunks in the loss: [K, T]
    of_batch: Callable[[TraceBatch], Any] | None = None  # for <name>, a value for each name
    reduce: Literal["mean", "max"] = "mean"  # of ``of_tokens``, over tokens
    step_line: str = ""  # format of the value in the line on the terminal


def has_signal(rewards: Sequence[float | None]) -> bool:
    """Return whether the rewards of a group differ: some advantage is not 0."""
    return len({reward for reward in rewards if reward is not None}) > 1


def _share_without_signal(batch: TraceBatch) -> float:
    totals = [score.total for score in batch.scores]
    starts = range(0, len(totals), batch.group_size)
    return fmean(not has_signal(totals[i : i + batch.group_size]) for i in starts)


def _reward_by_chunks(batch: TraceBatch) -> dict[str, float]:
    rewards: dict[int, list[float]] = defaultdict(list)
    for trace, score in zip(batch.traces, batch.scores, strict=True):
        if score.total is not None:
            rewards[len(trace.thinking)].append(score.total)
    return {str(chunks): fmean(rewards[chunks]) for chunks in sorted(rewards)}


def _staleness(batch: TraceBatch) -> float:
    total = sum(age * tokens for age, tokens in batch.ages)
    return total / max(1, sum(tokens for _, tokens in batch.ages))


def _values_by_reward(batch: TraceBatch) -> dict[str, list[float]]:
    return {
        name: [v for score in batch.scores if (v := score.parts.get(name)) is not None]
        for name in batch.reward_names
    }


def _share_by_reward(batch: TraceBatch, causes: Sequence[Mapping[str, str]]) -> dict[str, float]:
    return {name: fmean(name in cause for cause in causes) for name in batch.reward_names}


def _verifier_errors(batch: TraceBatch) -> dict[str, int]:
    """Count traces by the kind of their first error, the text before the colon."""
    first = [next(iter(score.errors.values())) for score in batch.scores if score.errors]
    kinds = [text.partition(":")[0] for text in first]
    return {kind: kinds.count(kind) for kind in ("timeout", "memory", "error")}


def _batch(
    key: str, unit: str, meaning: str, formula: Callable[[TraceBatch], Any], step_line: str = ""
) -> Metric:
    return Metric(key, unit, "batch", meaning, EVERY_BATCH, of_batch=formula, step_line=step_line)


def _tokens(key: str, unit: str, meaning: str, formula: TokenFormula, **options: Any) -> Metric:
    return Metric(key, unit, "tokens", meaning, of_tokens=formula, **options)


def _engine(key: str, unit: str, meaning: str, when: str = "engines in Ray workers") -> Metric:
    return Metric(f"engine/{key}", unit, "engine", meaning, when)


_SAMPLED = "the engine sampled"

# The step line shows its metrics in the order of this table.
# fmt: off
METRICS: tuple[Metric, ...] = (
    Metric("step", "steps", "optimizer", "Optimizer steps so far, this one included."),

    # Sampled traces and their scores
    _batch("reward", "reward", "Mean total reward, over the scored traces.",
           lambda b: fmean(b.rewards) if b.rewards else None, "reward {:.2f}"),
    _batch("reward_std", "reward", "Standard deviation of the total rewards.",
           lambda b: stdev(b.rewards) if len(b.rewards) > 1 else None),
    _batch("thinking_tokens", "tokens per trace", "Mean number of sampled tokens of a trace.",
           lambda b: b.num_tokens / len(b.traces), "tokens {:.0f}"),
    _batch("chunks", "chunks per trace", "Mean number of thinking chunks of a trace.",
           lambda b: fmean(len(trace.thinking) for trace in b.traces), "chunks {:.1f}"),
    _batch("traces", "traces", "Traces of the batch.", lambda b: len(b.traces)),
    _batch("sampled_tokens", "tokens", "Sampled tokens of the batch.", lambda b: b.num_tokens),
    _batch("groups_without_signal", "share of groups",
           "Groups whose traces all have the same reward, and therefore advantages of 0.",
           _share_without_signal),
    _batch("traces_left_out", "traces", "Traces left out of the loss.",
           lambda b: len(b.traces) - sum(b.in_loss)),
    _batch("tokens_left_out", "tokens", "Sampled tokens of the traces left out of the loss.",
           lambda b: sum(t.length for t, ok in zip(b.traces, b.in_loss, strict=True) if not ok)),
    _batch("budget_share", "share of traces", "Traces out of budget.",
           lambda b: fmean(t.stop is TraceStop.BUDGET for t in b.traces)),
    _batch("failed_share", "share of traces", "Traces ended by an error or an abort.",
           lambda b: fmean(t.stop.is_failure for t in b.traces)),
    _batch("reward_by_chunks", "reward", "Mean total reward by number of chunks of the trace.",
           _reward_by_chunks),
    _batch("rewards/<name>/mean", "reward", "Mean of one reward, over the traces it applies to.",
           lambda b: {n: fmean(v) if v else None for n, v in _values_by_reward(b).items()}),
    _batch("rewards/<name>/applied_share", "share of traces", "Traces to which the reward applies.",
           lambda b: {n: len(v) / len(b.scores) for n, v in _values_by_reward(b).items()}),
    _batch("rewards/<name>/unscored_share", "share of traces",
           "Traces whose reward failed: the grader is broken, or a limit too tight.",
           lambda b: _share_by_reward(b, [score.errors for score in b.scores])),
    _batch("rewards/<name>/zeroed_share", "share of traces",
           "Traces scored 0 because the grader failed on their output, and on no harmless one.",
           lambda b: _share_by_reward(b, [score.zeroed for score in b.scores])),
    _batch("verifier/<name>", "traces",
           "Traces whose reward failed with a `timeout`, for lack of `memory`, or with an `error`.",
           _verifier_errors),
    _batch("staleness", "weight updates", "Mean age of the weights, over sampled tokens.",
           _staleness),
    _batch("staleness_max", "weight updates", "Largest age of the weights of a sampled token.",
           lambda b: max((age for age, _ in b.ages), default=0)),
    _batch("mixed_version_share", "share of traces", "Traces sampled by several weight versions.",
           lambda b: fmean(
               len({c.policy_version for c in t.chunks if c.output_ids}) > 1 for t in b.traces)),
    Metric("sampling_rounds", "rounds", "batch",
           "Sampling rounds; each after the first replaces groups without signal.", EVERY_BATCH),
    Metric("groups_replaced", "groups", "batch", "Groups replaced by others.", EVERY_BATCH),
    Metric("tokens_replaced", "tokens", "batch", "Sampled tokens of replaced groups.", EVERY_BATCH),

    # Time
    Metric("seconds_sampling", "s", "clock", "Time from the first chunk to the last.", EVERY_BATCH),
    Metric("seconds_scoring", "s", "clock", "Time from the last chunk to the last score.",
           EVERY_BATCH),
    Metric("seconds_waiting", "s", "clock",
           "Time of the trainer waiting for the batch; less than the two above if prefetched.",
           EVERY_BATCH),
    Metric("overlap", "share of time", "clock",
           "Sampling and scoring of the batch during which the trainer did not wait.",
           EVERY_BATCH),
    Metric("seconds_training", "s", "clock",
           "Time of the step without waiting for the batch and for weight updates."),
    Metric("seconds_weight_update", "s", "clock",
           "Time of the trainer for weight updates, since the previous step."),
    Metric("tokens_per_second", "tokens/s", "clock", "Sampled tokens / seconds_sampling.",
           EVERY_BATCH, step_line="{:.0f} tokens/s"),

    # Forward passes of the trainer
    Metric("trained_tokens", "tokens", "tokens", "Output tokens in the loss."),
    _tokens("entropy", "nats per token", "Mean entropy of the next-token distributions.",
            lambda tokens, loss: tokens.entropies),
    _tokens("logprob_difference", "nats per token",
            "Mean absolute difference between the log-probs of trainer and engine.",
            lambda tokens, loss: (tokens.logprobs - tokens.engine_logprobs).abs()),
    _tokens("logprob_difference_max", "nats",
            "Largest absolute difference between the log-probs of trainer and engine.",
            lambda tokens, loss: (tokens.logprobs - tokens.engine_logprobs).abs(), reduce="max"),
    _tokens("logprob_outside_share", "share of tokens",
            "Tokens whose probabilities in trainer and engine differ by more than a tenth.",
            lambda tokens, loss:
                ((tokens.logprobs - tokens.engine_logprobs).exp() - 1).abs() > 0.1),
    _tokens("importance_ratio", "ratio",
            "Mean ratio of probabilities, now / before the first step on the batch.",
            lambda tokens, loss: loss.ratio),
    _tokens("clip_fraction", "share of tokens", "Tokens whose ratio is clipped.",
            lambda tokens, loss: loss.clipped),
    _tokens("importance_correction", "ratio",
            "Mean importance-sampling weight for the engine's probabilities.",
            lambda tokens, loss: loss.correction),
    _tokens("kl", "nats per token", "Mean KL divergence from the reference weights.",
            lambda tokens, loss: loss.kl, when="training.beta > 0"),
    Metric("by_chunk", "as above", "tokens",
           "The metrics of output tokens, each as a list over the chunk index."),
    Metric("forward_tokens", "tokens", "forward",
           "Tokens forwarded for the loss, prompts included and padding not."),
    Metric("forward_batches", "batches", "forward", "Forward passes for the loss."),
    Metric("padding", "share of tokens", "forward", "Padding among the forwarded tokens.",
           step_line="padding {:.1%}"),

    # The optimizer
    Metric("loss", "loss", "optimizer", "Loss of the step; null if the step was skipped."),
    Metric("gradient_norm", "norm", "optimizer", "Global gradient norm before clipping."),
    Metric("learning_rate", "rate", "optimizer", "Learning rate after the step."),
    Metric("policy_version", "weight updates", "optimizer",
           "Weight version in the first step on the batch."),
    Metric("step_skipped", "0 or 1", "optimizer",
           "1 if the step was skipped because of NaN or infinity."),

    # Several ranks
    Metric("balance", "ratio", "ranks",
           "Mean training cost of a rank / the highest one; 1 is even.", "several ranks"),
    Metric("traces_by_process", "traces", "ranks", "Traces of each rank.", "several ranks"),
    Metric("chunk_tokens_by_process", "tokens", "ranks", "Forwarded tokens of each rank.",
           "several ranks"),

    # Held-out problems
    Metric("heldout_accuracy", "share of problems", "held-out",
           "Accuracy on held-out problems; null between evaluations."),

    # The engine, since the previous batch
    _engine("chunks", "chunks", "Sampled chunks.", EVERY_BATCH),
    _engine("batch_occupancy", "chunks", "Mean number of chunks in a forward pass.", _SAMPLED),
    _engine("tokens_per_second", "tokens/s", "Sampled tokens per second of sampling.", _SAMPLED),
    _engine("prefix_cache_hit_rate", "share of prompt tokens", "Prompt tokens found in the cache."),
    _engine("queue", "chunks", "Chunks without a worker, now; of a worker: its chunks."),
    _engine("workers", "workers", "Workers in service, now."),
    _engine("restarts", "restarts", "Attempts to restart a worker."),
    _engine("chunks_rescheduled", "chunks", "Failed attempts at a chunk that were repeated."),
    _engine("chunks_handed_back", "chunks",
            "Chunks that waited at a worker and went back to the queue before an update."),
    _engine("tokens_lost", "tokens", "Sampled tokens of lost chunks, estimated from below."),
    _engine("chunk_timeouts", "chunks", "Chunks beyond engine.chunk_timeout."),
    _engine("chunks_failed", "chunks", "Chunks with engine.max_attempts failures."),
    _engine("worker <i>/<name>", "as above",
            "Queue, chunks, restarts (of the whole run) and rates of one worker."),
)
# fmt: on
TOKEN_METRICS = tuple(metric for metric in METRICS if metric.of_tokens)


def find_metric(key: str) -> Metric | None:
    """Return the row of a key of ``metrics.jsonl``; ``None`` for an unknown key."""
    for metric in METRICS:
        pattern = re.escape(metric.key).replace("<name>", ".+").replace("<i>", r"\d+")
        if re.fullmatch(pattern, key):
            return metric
    return None


def overlap(waited: float, lasted: float) -> float:
    """Return the share of a batch's time during which the trainer did not wait for it."""
    return max(0.0, 1.0 - waited / lasted) if lasted else 0.0


class StepStatistics(NamedTuple):
    """Metrics of output tokens by key, over all tokens and by the index of the chunk."""

    total: dict[str, float]
    by_chunk: list[dict[str, float]]


class TokenStatistics:
    """Accumulate the metrics of output tokens over the forward passes of an optimizer step.

    ``kl`` is left out of them if the loss has no KL term (``training.beta`` is 0).
    """

    def __init__(self, has_kl: bool = False, metrics: Sequence[Metric] = TOKEN_METRICS) -> None:
        self._metrics = [metric for metric in metrics if has_kl or metric.key != "kl"]
        self._is_max = np.array([False] + [m.reduce == "max" for m in self._metrics])
        # A row for each chunk index; the columns are the number of tokens and the metrics.
        self._table = np.zeros((0, len(self._is_max)))

    def add(
        self,
        indices: Sequence[int],
        is_output: torch.Tensor,
        tokens: TokenBatch,
        losses: TokenLosses,
    ) -> None:
        """Add a forward pass over K chunks, the tokens ``is_output`` [K, T] of them.

        Chunk k is the one at ``indices[k]`` of its trace, from 0.

        Raises:
            ValueError: a metric does not have one value per token.
        """
        import torch

        columns = [is_output.double().sum(-1)]
        for metric in self._metrics:
            assert metric.of_tokens is not None
            with torch.no_grad():
                value = metric.of_tokens(tokens, losses)
            if value is None or value.shape != is_output.shape:
                shape = None if value is None else tuple(value.shape)
                raise ValueError(
                    f"the metric {metric.key!r} must have one value per token, shape "
                    f"{tuple(is_output.shape)}, got {shape}"
                )
            counted = value.double().where(is_output, torch.zeros_like(value, dtype=torch.float64))
            columns.append(counted.amax(-1) if metric.reduce == "max" else counted.sum(-1))
        missing = max(0, max(indices) + 1 - len(self._table))
        self._table = np.pad(self._table, ((0, missing), (0, 0)))
        for index, row in zip(indices, torch.stack(columns, -1).cpu().numpy(), strict=True):
            self._table[index] = self._reduce(np.stack([self._table[index], row]))

    def take(self, accelerator: Any) -> StepStatistics:
        """Return the metrics over all ranks and reset. Every rank must call this."""
        import torch

        own = torch.tensor(self._table, device=accelerator.device)
        self._table = self._table[:0]
        padded = accelerator.pad_across_processes(own, dim=0)
        table = self._reduce(accelerator.gather(padded[None]).cpu().numpy())
        total = self._reduce(table) if len(table) else np.zeros(len(self._is_max))
        return StepStatistics(self._means(total), [self._means(row) for row in table])

    def _reduce(self, stacked: Any) -> Any:
        return np.where(self._is_max, stacked.max(0), stacked.sum(0))

    def _means(self, row: Any) -> dict[str, float]:
        tokens = float(row[0])
        means = np.where(self._is_max, row, row / max(1.0, tokens)).tolist()
        keys = [metric.key for metric in self._metrics]
        return {"trained_tokens": round(tokens), **dict(zip(keys, means[1:], strict=True))}


def forward_metrics(
    statistics: StepStatistics, tokens: int, padded_tokens: float, batches: int
) -> dict[str, Any]:
    """Return the metrics of the forward passes in the loss; ``tokens`` is without padding."""
    return {
        **statistics.total,
        "by_chunk": {key: [row[key] for row in statistics.by_chunk] for key in statistics.total},
        "forward_tokens": tokens,
        "forward_batches": batches,
        "padding": 1 - tokens / padded_tokens if padded_tokens else 0.0,
    }


def batch_metrics(batch: TraceBatch) -> dict[str, Any]:
    """Return the metrics of a sampled batch: every row of the table with ``of_batch``."""
    values: dict[str, Any] = {}
    for metric in METRICS:
        if metric.of_batch is None:
            continue
        value = metric.of_batch(batch)
        if "<name>" in metric.key:
            values |= {metric.key.replace("<name>", name): v for name, v in value.items()}
        else:
            values[metric.key] = value
    return values


class StepMetrics:
    """Collect the metrics of the current optimizer step and measure its time."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._started = 0.0
        self._seconds_before_step = 0.0
        self._seconds_weight_update = 0.0  # since the previous step ended

    def start_step(self) -> None:
        """Start the clock of a step."""
        self.values.clear()
        self._started = time.perf_counter()
        self._seconds_before_step = self._seconds_weight_update

    def add_weight_update(self, seconds: float) -> None:
        """Add the time of a weight update, also of one between two steps."""
        self._seconds_weight_update += seconds

    def stop_step(self) -> None:
        """Stop the clock and add the metrics of time."""
        seconds = time.perf_counter() - self._started
        sampling = self.values.get("seconds_sampling", 0.0)
        waiting = self.values.get("seconds_waiting", 0.0)
        updating = self._seconds_weight_update - self._seconds_before_step
        self.values["seconds_training"] = seconds - waiting - updating
        self.values["seconds_weight_update"] = self._seconds_weight_update
        self._seconds_weight_update = 0.0
        if sampling:
            self.values["tokens_per_second"] = self.values["sampled_tokens"] / sampling


def logger_values(metrics: Mapping[str, Any], prefix: str = "delethink/") -> dict[str, float]:
    """Return the numbers of a line of metrics under their names in experiment trackers.

    Names of inner values are ``key/inner key`` or ``key/index``; indices count from 1.
    """
    numbers: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, list | tuple):
            value = {str(index): inner for index, inner in enumerate(value, 1)}
        if isinstance(value, Mapping):
            numbers |= logger_values(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            numbers[prefix + key] = value
    return numbers
