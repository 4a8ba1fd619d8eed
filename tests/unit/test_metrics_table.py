"""The table of metrics: keys, formulas, and their values on small batches."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from delethink.training.loss import TokenBatch, TokenLosses
from delethink.training.metrics import (
    EVERY_BATCH,
    METRICS,
    TOKEN_METRICS,
    Metric,
    TokenStatistics,
    TraceBatch,
    batch_metrics,
    find_metric,
    forward_metrics,
    logger_values,
)
from delethink.training.progress import step_line
from delethink.types import Chunk, Score, StopReason, Trace, TraceStop


class OneRank:
    """An accelerator of a single rank."""

    device = torch.device("cpu")

    def pad_across_processes(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def forward(*logprobs: list[float], kl: bool = False) -> tuple[TokenBatch, TokenLosses]:
    """Return tokens whose engine log-probs are 0, with gradients, and their losses."""
    own = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    ones = torch.ones_like(own)
    tokens = TokenBatch(own, 2 * ones, ones[:, :1], torch.zeros_like(own))
    return tokens, TokenLosses(ones, ones, ones, ones > 2, 3 * ones if kl else None)


def test_keys_are_unique_and_rows_are_complete() -> None:
    keys = [metric.key for metric in METRICS]
    assert len(set(keys)) == len(keys)
    for metric in METRICS:
        assert metric.unit
        assert metric.meaning.endswith(".")


def test_a_key_finds_its_row() -> None:
    for key, row in (
        ("entropy", "entropy"),
        ("rewards/exact/mean", "rewards/<name>/mean"),
        ("engine/queue", "engine/queue"),
        ("engine/worker 0/queue", "engine/worker <i>/<name>"),
        ("verifier/timeout", "verifier/<name>"),
    ):
        found = find_metric(key)
        assert found is not None
        assert found.key == row
    for key in ("entropi", "rewards//mean", "rewards/exact", "engine/worker"):
        assert find_metric(key) is None


def test_means_and_maxima_are_taken_by_chunk_and_over_all_tokens() -> None:
    statistics = TokenStatistics()
    mask = torch.tensor([[True, True], [True, False]])
    statistics.add([0, 1], mask, *forward([0.5, -0.01], [1.0, float("nan")]))
    statistics.add([0], mask[:1], *forward([0.0, 0.0]))
    total, by_chunk = statistics.take(OneRank())
    assert [row["trained_tokens"] for row in by_chunk] == [4, 1]
    assert total["trained_tokens"] == 5
    assert by_chunk[0]["logprob_difference"] == pytest.approx(0.51 / 4)
    assert total["logprob_difference"] == pytest.approx(1.51 / 5)
    assert [row["logprob_difference_max"] for row in by_chunk] == [0.5, 1.0]
    assert total["logprob_difference_max"] == 1.0
    assert total["logprob_outside_share"] == pytest.approx(2 / 5)
    assert total["entropy"] == 2.0
    assert "kl" not in total
    line = forward_metrics(statistics.take(OneRank()), 0, 0.0, 0)
    assert line["trained_tokens"] == 0, "take resets the statistics"
    assert line["by_chunk"]["entropy"] == []


def test_one_row_adds_a_metric_of_tokens() -> None:
    row = Metric(
        "surprise",
        "nats",
        "tokens",
        "Mean negative log-prob.",
        of_tokens=lambda tokens, loss: -tokens.logprobs,
    )
    statistics = TokenStatistics(metrics=[*TOKEN_METRICS, row])
    statistics.add([0], torch.ones(1, 2, dtype=torch.bool), *forward([-1.0, -2.0]))
    line = forward_metrics(statistics.take(OneRank()), 2, 2.0, 1)
    assert line["surprise"] == pytest.approx(1.5)
    assert line["by_chunk"]["surprise"] == [pytest.approx(1.5)]
    assert logger_values(line)["delethink/by_chunk/surprise/1"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("formula", "shape"),
    [(lambda tokens, loss: loss.kl, "None"), (lambda tokens, loss: tokens.logprobs[0], r"\(2,\)")],
)
def test_a_metric_without_a_value_for_each_token_is_an_error(formula: Any, shape: str) -> None:
    row = Metric("odd", "nats", "tokens", "Missing.", of_tokens=formula)
    statistics = TokenStatistics(metrics=[row])
    with pytest.raises(ValueError, match=rf"'odd' must have one value per token.*got {shape}"):
        statistics.add([0], torch.ones(1, 2, dtype=torch.bool), *forward([-1.0, -2.0]))


def test_a_missing_kl_term_is_an_error_and_not_zero() -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    statistics = TokenStatistics(has_kl=True)
    with pytest.raises(ValueError, match="'kl' must have one value per token"):
        statistics.add([0], mask, *forward([-1.0]))
    statistics.add([0], mask, *forward([-1.0], kl=True))
    assert statistics.take(OneRank()).total["kl"] == 3.0


def trace(length: int, stop: TraceStop, version: int = 4) -> Trace:
    chunk = Chunk((1, 2), (3,) * length, (-1.0,) * length, StopReason.EOS, policy_version=version)
    return Trace((1, 2), (chunk,), stop)


def scored_batch() -> TraceBatch:
    traces = [
        trace(2, TraceStop.COMPLETED),
        trace(4, TraceStop.BUDGET, version=3),
        trace(6, TraceStop.COMPLETED),
        trace(8, TraceStop.COMPLETED),
    ]
    scores = [
        Score(1.0, {"exact": 1.0, "format": None}),
        Score(0.0, {"exact": 0.0, "format": None}),
        Score(1.0, {"exact": 1.0, "format": 1.0}),
        Score(None, {"exact": None, "format": 1.0}, {"exact": "timeout: 3 s"}),
    ]
    return TraceBatch(traces, scores, [True, True, True, False], 2, 4, ["exact", "format"])


def test_metrics_of_a_batch() -> None:
    metrics = batch_metrics(scored_batch())
    expected = {
        "reward": 2 / 3,
        "groups_without_signal": 0.5,
        "traces": 4,
        "traces_left_out": 1,
        "sampled_tokens": 20,
        "tokens_left_out": 8,
        "thinking_tokens": 5.0,
        "chunks": 1.0,
        "budget_share": 0.25,
        "failed_share": 0.0,
        "rewards/exact/mean": 2 / 3,
        "rewards/exact/applied_share": 0.75,
        "rewards/format/mean": 1.0,
        "rewards/format/applied_share": 0.5,
        "verifier/timeout": 1,
        "verifier/memory": 0,
        "verifier/error": 0,
        "staleness": 4 / 20,
        "staleness_max": 1,
        "mixed_version_share": 0.0,
    }
    assert {key: metrics[key] for key in expected} == pytest.approx(expected)
    assert metrics["reward_by_chunks"] == {"1": pytest.approx(2 / 3)}
    assert all(find_metric(key) for key in metrics)


def test_a_batch_without_rewards_has_none() -> None:
    batch = TraceBatch([trace(1, TraceStop.ERROR)], [Score(None, {})], [False], 1, 4, ["exact"])
    metrics = batch_metrics(batch)
    assert metrics["reward"] is metrics["reward_std"] is metrics["rewards/exact/mean"] is None


def test_the_step_line_has_the_marked_metrics_in_order() -> None:
    values = {"reward": 0.5, "thinking_tokens": 210.4, "chunks": 3.25, "padding": 0.011}
    values |= {"tokens_per_second": 8000.6, "entropy": 1.0}
    expected = "reward 0.50  tokens 210  chunks 3.2  8001 tokens/s  padding 1.1%"
    assert step_line(values) == expected
    assert step_line(values | {"reward": None}).startswith("reward none  ")


def test_the_table_loads_without_torch() -> None:
    code = "import sys, delethink.training.metrics; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_rows_with_a_formula_say_when_they_are_there() -> None:
    for metric in METRICS:
        if metric.of_batch is not None:
            assert metric.when == EVERY_BATCH
