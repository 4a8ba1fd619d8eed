"""The values of the metrics of an optimizer step, computed by the rows of ``metrics.METRICS``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from delethink.training.metrics import (
    LOGGER_PREFIX,
    METRICS,
    TOKEN_METRICS,
    Metric,
    TraceBatch,
)

if TYPE_CHECKING:
    import torch

    from delethink.training.loss import TokenBatch, TokenLosses


class StepStatistics(NamedTuple):
    """Metrics of output tokens by key, over all tokens and by the index of the chunk."""

    total: dict[str, float]
    by_chunk: list[dict[str, float]]


class TokenStatistics:
    """Accumulate the metrics of output tokens over the forward passes of an optimizer step.

    Args:
        has_kl: whether the loss has a KL term (``training.beta`` > 0); otherwise no ``kl``.
        metrics: rows to compute.
    """

    def __init__(self, has_kl: bool = False, metrics: Sequence[Metric] = TOKEN_METRICS) -> None:
        self._metrics = [metric for metric in metrics if has_kl or metric.key != "kl"]
        self._is_max = np.array([False] + [m.reduce == "max" for m in self._metrics])
        self._reset()

    def _reset(self) -> None:
        # A row for each chunk index; the columns are the number of tokens and the metrics.
        self._table = np.zeros((0, len(self._is_max)))

    def add(
        self,
        indices: Sequence[int],
        is_output: torch.Tensor,
        tokens: TokenBatch,
        losses: TokenLosses,
    ) -> None:
        """Add a forward pass over K chunks.

        Args:
            indices: index of each chunk in its trace, from 0.
            is_output: the tokens to count, [K, T].
            tokens: inputs of the loss.
            losses: outputs of the loss.

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
        self._reset()
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
    """Return the metrics of the forward passes in the loss.

    Args:
        statistics: metrics of the output tokens.
        tokens: forwarded tokens without padding.
        padded_tokens: forwarded tokens with padding.
        batches: forward passes.
    """
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

    def add(self, values: Mapping[str, Any]) -> None:
        """Add metrics by key."""
        self.values.update(values)

    def add_weight_update(self, seconds: float) -> None:
        """Add the time of a weight update, also of one between two steps."""
        self._seconds_weight_update += seconds

    def stop_step(self) -> None:
        """Stop the clock and add the metrics of time."""
        seconds = time.perf_counter() - self._started
        sampling = self.values.get("seconds_sampling", 0.0)
        scoring = self.values.get("seconds_scoring", 0.0)
        updating = self._seconds_weight_update - self._seconds_before_step
        self.values["seconds_training"] = seconds - (sampling + scoring) - updating
        self.values["seconds_weight_update"] = self._seconds_weight_update
        self._seconds_weight_update = 0.0
        if sampling:
            self.values["tokens_per_second"] = self.values["sampled_tokens"] / sampling


def logger_values(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of metrics under their names in experiment trackers."""
    return {LOGGER_PREFIX + name: value for name, value in _flat_numbers(metrics)}


def _flat_numbers(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield numbers as ``key``, ``key/inner key`` or ``key/index``; indices count from 1."""
    for key, value in metrics.items():
        inner = value
        if isinstance(value, Sequence) and not isinstance(value, str):
            inner = {str(index): one for index, one in enumerate(value, 1)}
        if isinstance(inner, Mapping):
            yield from ((f"{key}/{name}", number) for name, number in _flat_numbers(inner))
        elif isinstance(value, int | float):
            yield key, value
