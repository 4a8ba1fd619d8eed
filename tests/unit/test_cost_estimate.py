"""The estimate as a whole: invariants, the paper's figures, fitting."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delethink.cost import paper
from delethink.cost.calibrate import Measurement, fit
from delethink.cost.estimate import (
    Lengths,
    Workload,
    crossings,
    estimate,
    interval,
    longest_that_fits,
)
from delethink.cost.flops import LONGCOT, Cut, cut_traces
from delethink.cost.hardware import Efficiency, accelerator
from delethink.cost.memory import cache_bytes, weight_bytes
from delethink.cost.models import model_shape
from delethink.cost.timing import decode_steps, moved_weight_bytes
from delethink.errors import ConfigError, ModelError, UserError

H100 = accelerator("h100")
DENSE = model_shape("Qwen/Qwen2.5-1.5B")
EXPERTS = model_shape("Qwen/Qwen3-30B-A3B")
CUT = Cut(8192, 4096, 0, 100)


# -- invariants -----------------------------------------------------------------------------


def test_up_to_the_first_boundary_both_are_the_same() -> None:
    one, other = (
        estimate(DENSE, Lengths.constant(8192), cut, H100).as_dict() for cut in (LONGCOT, CUT)
    )
    assert one == other


def test_delethink_is_linear_and_flat_and_longcot_is_neither() -> None:
    lengths = Lengths.constant(8192 * 8 * np.array([1, 16]))
    longcot, delethink = (estimate(DENSE, lengths, cut, H100) for cut in (LONGCOT, CUT))

    def growth(costs: np.ndarray) -> float:
        return float(costs[1] / costs[0])

    assert growth(delethink.flops) == pytest.approx(16, rel=0.1)
    assert growth(delethink.sampling_seconds) == pytest.approx(16, rel=0.1)
    assert growth(delethink.cache_bytes) == 1
    assert growth(longcot.flops) > 150
    assert growth(longcot.sampling_seconds) > 200
    assert growth(longcot.cache_bytes) == pytest.approx(16, rel=0.01)


def test_where_every_layer_is_bounded_longcot_is_linear_too() -> None:
    windows = model_shape("mistralai/Mistral-7B-v0.1")
    cost = estimate(windows, Lengths.constant(2**17 * np.array([1, 8])), LONGCOT, H100)
    assert cost.flops[1] / cost.flops[0] == pytest.approx(8, rel=0.01)
    assert cost.cache_bytes[1] == cost.cache_bytes[0]
    assert crossings(windows, CUT, H100, Efficiency(), Workload()).training_flops is None


@settings(max_examples=25)
@given(st.lists(st.integers(1, 200_000), min_size=2, max_size=40), st.integers(1, 500))
def test_the_longest_of_a_batch_lies_between_the_mean_and_the_longest(
    seen: list[int], batch: int
) -> None:
    lengths = Lengths.empirical(seen, batch)
    assert lengths.mean == pytest.approx(np.mean(seen))
    assert np.mean(seen) * (1 - 1e-9) <= lengths.longest <= max(seen) * (1 + 1e-9)


def test_the_longest_of_a_batch_is_its_expectation() -> None:
    seen = [10, 20, 30, 50]
    rng = np.random.default_rng(0)
    drawn = rng.choice(seen, (200_000, 3)).max(1).mean()
    assert Lengths.empirical(seen, 3).longest == pytest.approx(drawn, rel=5e-3)


def test_many_lengths_are_thinned_without_moving_the_mean() -> None:
    seen = np.random.default_rng(0).exponential(9000, 10_001) + 1
    lengths = Lengths.empirical(seen, 128)
    assert lengths.values.size == 256
    assert lengths.mean == pytest.approx(seen.mean(), rel=2e-3)
    exact, thinned = (
        estimate(DENSE, Lengths(values, lengths.longest), CUT, H100).training_flops
        for values in (seen, lengths.values)
    )
    assert thinned == pytest.approx(float(exact), rel=0.01)


def test_a_long_tail_makes_a_step_longer() -> None:
    mean = Lengths.constant(16_384)
    tail = Lengths.empirical([8192] * 7 + [73_728], 128)
    assert tail.mean == mean.mean
    for cut in (LONGCOT, CUT):
        pair = [estimate(DENSE, n, cut, H100).sampling_seconds for n in (mean, tail)]
        assert pair[1] > pair[0]


def test_steps_of_decoding() -> None:
    assert decode_steps(100, 100, traces=8, concurrent=8) == 100
    assert decode_steps(100, 300, traces=8, concurrent=8) == 300
    assert decode_steps(100, 100, traces=8, concurrent=4) == 200
    assert decode_steps(100, 150, traces=8, concurrent=4) == 200 + 50 * 0.75


@given(st.integers(1, 4096))
def test_a_step_reads_the_chosen_experts(batch: int) -> None:
    moved = float(moved_weight_bytes(EXPERTS, batch, 2))
    dense = EXPERTS.parameters - EXPERTS.expert_weights - EXPERTS.head_weights
    chosen = EXPERTS.expert_weights * (1 - (1 - 8 / 128) ** batch)
    assert moved == pytest.approx(2 * (dense + chosen))


def test_more_devices_take_fewer_seconds_and_no_fewer_hours() -> None:
    eight, sixteen = (
        estimate(DENSE, Lengths.constant(98_304), CUT, H100, workload=Workload(gpus=n))
        for n in (8, 16)
    )
    assert sixteen.step_seconds < eight.step_seconds
    assert sixteen.gpu_hours > eight.gpu_hours * 0.999


def test_a_trace_that_does_not_fit_has_no_time() -> None:
    small = accelerator("rtx4090")
    longest = longest_that_fits(DENSE, small, Efficiency(), Workload())
    fits, does_not = (
        estimate(DENSE, Lengths.constant(longest + more), LONGCOT, small) for more in (0, 1)
    )
    assert np.isfinite(fits.gpu_hours)
    assert fits.concurrent >= 1
    assert np.isnan(does_not.gpu_hours)
    assert does_not.concurrent == 0
    assert np.isfinite(estimate(DENSE, Lengths.constant(longest + 1), CUT, small).gpu_hours)


def test_a_model_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"DeepSeek-V3 does not fit: .* 1342 GB.* 8 x H100"):
        estimate(model_shape("deepseek-ai/DeepSeek-V3"), Lengths.constant(9000), CUT, H100)


def test_a_large_model_is_spread_over_devices() -> None:
    cost = estimate(model_shape("Qwen/Qwen2.5-72B"), Lengths.constant(9000), CUT, H100)
    assert cost.concurrent >= 1
    with pytest.raises(ConfigError, match="1 to 8 GPUs, got 9"):
        Workload(parallel=9)


@pytest.mark.parametrize("name", ["query", "group", "prompts", "steps", "gpus"])
def test_a_workload_has_at_least_one_of_each(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        Workload(**{name: 0})


def test_arrays_equal_single_numbers() -> None:
    lengths = np.array([9000.0, 50_000, 300_000])
    contexts, carries = np.array([4096.0, 8192, 6000]), np.array([1024.0, 4096, 5000])
    many = estimate(DENSE, Lengths.constant(lengths), Cut(contexts, carries), H100)
    for i in range(3):
        one = estimate(
            DENSE, Lengths.constant(lengths[i]), Cut(contexts[i], carries[i]), H100
        ).as_dict()
        for key, value in many.as_dict().items():
            assert np.broadcast_to(value, 3)[i] == pytest.approx(one[key], rel=1e-12), key


def test_uncertainty_surrounds_the_estimate_and_is_seeded() -> None:
    lengths = Lengths.constant(98_304)
    hours = float(estimate(DENSE, lengths, CUT, H100).gpu_hours)
    low, high = interval(DENSE, lengths, CUT, H100, seed=3)
    assert low < hours < high
    assert (low, high) == interval(DENSE, lengths, CUT, H100, seed=3)
    sure = dataclasses.replace(Efficiency(), spread=0.0)
    assert interval(DENSE, lengths, CUT, H100, sure) == pytest.approx((hours, hours))


# -- the paper --------------------------------------------------------------------------------


def test_flops_as_the_paper_counts_them() -> None:
    rows = paper.flops_rows()
    assert rows[0].crossing == 28_850
    assert rows[0].ratios[2] == pytest.approx(17.8, abs=0.05)
    assert [row.crossing for row in rows[1:4]] == [26_137, 49_508, 44_082]
    assert [round(row.ratios[2], 1) for row in rows[1:4]] == [19.6, 10.6, 11.8]


def test_every_bar_of_figure_2c_within_a_tenth() -> None:
    bars = paper.figure_2c()
    assert len(bars) == 20
    for bar in bars:
        assert abs(bar.error) < 0.1, bar


def test_the_measured_throughputs() -> None:
    longcot, delethink = paper.throughput_24k()
    assert delethink.ours == pytest.approx(8500, rel=0.1)
    assert longcot.ours == pytest.approx(6000, rel=0.15)
    assert longcot.mean == pytest.approx(7969, abs=1)


def test_the_default_efficiencies_are_the_fit_to_the_paper() -> None:
    """Figures that the times do not determine keep their start value."""
    pytest.importorskip("scipy")
    start = Efficiency(
        bandwidth=0.5, decode=0.5, prefill=0.5, training=0.5, step_seconds=0, token_seconds=0
    )
    found = fit(paper.measurements(), paper.shape(), H100, start, "")
    assert set(found.fitted) == {"bandwidth", "token_seconds", "training"}
    default = Efficiency()
    for name in ("bandwidth", "token_seconds", "training", "prefill", "decode", "step_seconds"):
        assert getattr(found.efficiency, name) == pytest.approx(getattr(default, name), rel=2e-3)


def test_gpu_months_do_not_reproduce() -> None:
    rows = {(row.method, row.tokens): row for row in paper.gpu_months()}
    assert rows["LongCoT", 98_304].bars == pytest.approx(30.3, abs=0.05)
    assert rows["LongCoT", 94_000].ours == pytest.approx(27, abs=0.5)
    assert rows["Delethink", 94_000].ours > 8


def test_the_papers_accounting_covers_plain_attention_only() -> None:
    with pytest.raises(UserError, match="plain softmax attention only"):
        paper.paper_training_flops(model_shape("google/gemma-3-1b-pt"), 9000, LONGCOT)
    with pytest.raises(UserError, match="at least C"):
        paper.paper_training_flops(DENSE, 8000, CUT)


def test_the_papers_model_caches_28672_bytes_per_token() -> None:
    assert cache_bytes(paper.shape(), 1) == 28_672
    assert weight_bytes(paper.shape()) == pytest.approx(3.55e9, rel=2e-3)


# -- fitting ----------------------------------------------------------------------------------


def test_fitting_finds_the_efficiencies_behind_the_times() -> None:
    pytest.importorskip("scipy")
    truth = Efficiency(bandwidth=0.6, training=0.25, token_seconds=2e-5, pass_seconds=0.01)
    measured = []
    for length in (10_000, 30_000, 90_000):
        for cut in (LONGCOT, CUT):
            lengths, workload = Lengths.constant(length), Workload(gpus=2, prompts=8)
            cost = estimate(DENSE, lengths, cut, H100, truth, workload)
            times = float(cost.sampling_seconds), float(cost.training_seconds)
            measured.append(Measurement(lengths, cut, workload, *times))
    found = fit(measured, DENSE, H100, Efficiency(), "made up")
    assert found.sampling_errors == pytest.approx(np.zeros(6), abs=1e-3)
    assert found.training_errors == pytest.approx(np.zeros(6), abs=1e-3)
    assert found.efficiency.spread < 1e-3
    for name in ("bandwidth", "training", "token_seconds", "pass_seconds"):
        assert getattr(found.efficiency, name) == pytest.approx(getattr(truth, name), rel=0.02)


def test_a_fit_needs_times() -> None:
    with pytest.raises(ConfigError, match="no measurement has a time"):
        fit(
            [Measurement(Lengths.constant(9000), CUT, Workload(), None, None)],
            DENSE,
            H100,
            Efficiency(),
            "",
        )


def test_number_of_chunks() -> None:
    assert cut_traces(98_304, 150, CUT).per_trace == 23
