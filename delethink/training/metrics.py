"""The table of metrics.

``METRICS`` lists every key of ``metrics.jsonl``. The line on the terminal, the loggers and the
reference documentation read it. One row adds a metric of output tokens (``of_tokens``) or of
sampled traces (``of_batch``): it holds the formula. Other metrics are measured by the engine, in
``run_state.py`` or in ``trainer.py``. ``step_metrics.py`` collects the values.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from delethink.types import Score, Trace, TraceStop

if TYPE_CHECKING:
    import torch

    from delethink.training.loss import TokenBatch, TokenLosses

LOGGER_PREFIX = "delethink/"  # names in Weights & Biases, TensorBoard and Trackio
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

    def share(self, condition: Callable[[Trace], bool]) -> float:
        """Return the share of traces for which a condition holds."""
        return fmean(condition(trace) for trace in self.traces)


# None is an error when the metric is computed.
TokenFormula = Callable[["TokenBatch", "TokenLosses"], "torch.Tensor | None"]


@dataclass(frozen=True)
class Metric:
    """A row of the table of metrics.

    Args:
        key: key in ``metrics.jsonl``; ``<name>`` stands for several names.
        unit: unit of the value.
        source: part of the program to measure it.
        meaning: description of the value.
        when: lines of ``metrics.jsonl`` with the key.
        of_tokens: formula for the output tokens of K chunks in the loss; its value is [K, T].
        of_batch: formula for a sampled batch; with ``<name>`` in the key, a value for each name.
        reduce: reduction of ``of_tokens`` over tokens.
        step_line: format of the value in the line on the terminal.
    """

    key: str
    unit: str
    source: Source
    meaning: str
    when: str = EVERY_STEP
    of_tokens: TokenFormula | None = None
    of_batch: Callable[[TraceBatch], Any] | None = None
    reduce: Literal["mean", "max"] = "mean"
    step_line: str = ""


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


def _has_mixed_versions(trace: Trace) -> bool:
    return len({chunk.policy_version for chunk in trace.chunks if chunk.output_ids}) > 1


def _values_by_reward(batch: TraceBatch) -> dict[str, list[float]]:
    return {
        name: [v for score in batch.scores if (v := score.parts.get(name)) is not None]
        for name in batch.reward_names
    }


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


def _engine(key: str, unit: str, meaning: str, when: str = "engine=vllm") -> Metric:
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
           lambda b: b.share(lambda trace: trace.stop is TraceStop.BUDGET)),
    _batch("failed_share", "share of traces", "Traces ended by an error or an abort.",
           lambda b: b.share(lambda trace: trace.stop.is_failure)),
    _batch("reward_by_chunks", "reward", "Mean total reward by number of chunks of the trace.",
           _reward_by_chunks),
    _batch("rewards/<name>/mean", "reward", "Mean of one reward, over the traces it applies to.",
           lambda b: {n: fmean(v) if v else None for n, v in _values_by_reward(b).items()}),
    _batch("rewards/<name>/applied_share", "share of traces", "Traces to which the reward applies.",
           lambda b: {n: len(v) / len(b.scores) for n, v in _values_by_reward(b).items()}),
    _batch("verifier/<name>", "traces",
           "Traces whose reward failed with a `timeout`, for lack of `memory`, or with an `error`.",
           _verifier_errors),
    _batch("staleness", "weight updates", "Mean age of the weights, over sampled tokens.",
           _staleness),
    _batch("staleness_max", "weight updates", "Largest age of the weights of a sampled token.",
           lambda b: max((age for age, _ in b.ages), default=0)),
    _batch("mixed_version_share", "share of traces", "Traces sampled by several weight versions.",
           lambda b: b.share(_has_mixed_versions)),
    Metric("sampling_rounds", "rounds", "batch",
           "Sampling rounds; each after the first replaces groups without signal.", EVERY_BATCH),
    Metric("groups_replaced", "groups", "batch", "Groups replaced by others.", EVERY_BATCH),
    Metric("tokens_replaced", "tokens", "batch", "Sampled tokens of replaced groups.", EVERY_BATCH),

    # Time
    Metric("seconds_sampling", "s", "clock", "Time waiting for the engine.", EVERY_BATCH),
    Metric("seconds_scoring", "s", "clock", "Time waiting for scores only.", EVERY_BATCH),
    Metric("seconds_training", "s", "clock",
           "Time of the step without sampling, scoring and weight updates."),
    Metric("seconds_weight_update", "s", "clock",
           "Time of loading weights into the engine, since the previous step."),
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
    _engine("restarts", "restarts", "Restarts of workers."),
    _engine("chunks_rescheduled", "chunks", "Chunks of lost workers, sent to other workers."),
    _engine("tokens_lost", "tokens", "Sampled tokens of lost chunks."),
    _engine("chunk_timeouts", "chunks", "Chunks beyond engine.chunk_timeout."),
    _engine("chunks_failed", "chunks", "Chunks with engine.max_attempts failures."),
    _engine("worker <i>/<name>", "as above",
            "The same of one worker; its restarts are those of the whole run."),
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
