"""Two ranks train like one: the same loss, the same gradient, no trace lost."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from train_in_ranks import LEARNING_RATE, Case, Outcome, make_model, train, train_on_ranks

pytestmark = pytest.mark.integration

TWICE = {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 4}
CASES = {
    "fewer traces than ranks": Case(
        (1, -2, -1, -1, -2, -1, -3, -2), {"mask_out_of_budget": True, "loss_type": "sapo"}
    ),
    "unequal chunks": Case((3, 1, 5, 2, 4, 1, 1, 6)),
    "one trace of twelve chunks in batches of a chunk": Case(
        (12, 1, 1, 1, 1, 1, 1, 1), {"forward_tokens": 20}, micro_batch=2
    ),
    "a rank has nothing to train on": Case(
        (3, 2, 4, 3, -2, -1, -3, -2), {"mask_out_of_budget": True}, cost_is_equal=True
    ),
    "no rank has anything to train on": Case(
        (-1,) * 8, {"mask_out_of_budget": True}, micro_batch=4
    ),
    "accumulated": Case((3, 1, 5, 2, 4, 1, 1, 6), micro_batch=4, placement="colocated"),
    "several steps on a batch": Case(
        (3, 1, 5, 2, 4, 1, 1, 6),
        {"importance_sampling_level": "sequence", "forward_tokens": 30},
        micro_batch=4,
        settings=TWICE | {"num_iterations": 2},
    ),
    "divergence from the first weights": Case(
        (3, 1, 5, 2, 4, 1, 1, 6), micro_batch=4, settings=TWICE | {"beta": 0.1}
    ),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    return {name: train(case, "", str(folder / name)) for name, case in CASES.items()}


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def together(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return request.param, train_on_ranks(CASES, request.param)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_take_the_steps_of_one(
    alone: dict[str, Outcome], together: tuple[str, dict[str, Outcome]], name: str
) -> None:
    assert_same_steps(alone[name], together[1][name], is_still=name.startswith("no rank"))


def assert_same_steps(one: Outcome, two: Outcome, is_still: bool = False) -> None:
    assert two.losses == pytest.approx(one.losses, rel=1e-6, abs=1e-6)
    first = dict(make_model().named_parameters())
    moved = {n: (p - first[n]) / LEARNING_RATE for n, p in one.parameters.items()}
    largest = max(change.abs().max().item() for change in moved.values())
    assert (largest == 0) == is_still
    for n, change in moved.items():
        actual = (two.parameters[n] - first[n]) / LEARNING_RATE
        # Norms in the model and advantages on the way are float32: the agreement ends there.
        torch.testing.assert_close(actual, change, rtol=1e-5, atol=1e-6 * largest, msg=n)


@pytest.mark.parametrize("name", CASES)
def test_every_trace_is_trained_on_by_one_rank_in_every_pass(
    alone: dict[str, Outcome], together: tuple[str, dict[str, Outcome]], name: str
) -> None:
    one, two = alone[name], together[1][name]
    times = CASES[name].settings.get("num_iterations", 1)
    batches = CASES[name].settings.get("max_steps", 1) // (2 if times == 1 else 4) or 1
    seen = sorted(chain(*chain(*two.trained)))
    assert seen == sorted(list(range(8)) * times * batches)
    assert [len(own) for own in two.trained] == [len(two.trained[0])] * 2
    assert two.work.tokens == one.work.tokens
    assert two.statistics.total == pytest.approx(one.statistics.total, rel=1e-4, abs=1e-6)
    assert two.statistics.total["trained_tokens"] == one.statistics.total["trained_tokens"]


def test_traces_are_balanced_over_ranks(together: tuple[str, dict[str, Outcome]]) -> None:
    metrics = together[1]["unequal chunks"].metrics
    assert 0.8 < metrics["balance"] <= 1
    assert metrics["traces_by_process"] == [4, 4]
    tokens = metrics["chunk_tokens_by_process"]
    assert metrics["balance"] == pytest.approx(sum(tokens) / 2 / max(tokens))
    assert together[1]["one trace of twelve chunks in batches of a chunk"].metrics["balance"] < 0.8


def test_the_main_rank_has_and_saves_full_weights(
    together: tuple[str, dict[str, Outcome]],
) -> None:
    strategy, outcomes = together
    for outcome in outcomes.values():
        assert outcome.saved is not None
        assert outcome.saved.keys() == outcome.parameters.keys()
        for name, parameter in outcome.parameters.items():
            assert torch.equal(outcome.saved[name], parameter)
        is_gathered = strategy == "fsdp2" and outcome.shared is None
        assert (outcome.gathered is not None) == is_gathered
        if outcome.gathered is not None:
            assert all(
                torch.equal(outcome.gathered[name], parameter)
                for name, parameter in outcome.parameters.items()
            )


def test_every_rank_shares_its_trained_weights_with_the_engine_beside_it(
    together: tuple[str, dict[str, Outcome]],
) -> None:
    outcome = together[1]["accumulated"]
    assert outcome.shared is not None
    assert len(outcome.shared) == 2
    first = dict(make_model().named_parameters())
    for shared in outcome.shared:
        assert shared.keys() == outcome.parameters.keys()
        for name, parameter in outcome.parameters.items():
            assert shared[name].dtype == torch.float32  # the engine's, on the CPU
            assert torch.equal(shared[name], parameter.float())
        assert any(not torch.equal(shared[name], first[name].float()) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_traces_need_not_divide_by_the_ranks(alone: dict[str, Outcome], strategy: str) -> None:
    """Eight traces on three ranks, four of a step on three ranks: some rows have no trace."""
    names = ["unequal chunks", "accumulated", "several steps on a batch", "fewer traces than ranks"]
    three = train_on_ranks({name: CASES[name] for name in names}, strategy, num_ranks=3)
    for name in names:
        assert_same_steps(alone[name], three[name])
        assert sum(three[name].metrics["traces_by_process"]) == 8
        assert sorted(set(chain(*chain(*three[name].trained))) - {-1}) == list(range(8))
        one = alone[name].statistics.total
        assert three[name].statistics.total == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_every_rank_collects_its_weights_before_each_batch_and_releases_them_after(
    together: tuple[str, dict[str, Outcome]],
) -> None:
    for name, outcome in together[1].items():
        batches = len(outcome.events[1]) // 2
        assert batches == (2 if "divergence" in name else 1)
        assert outcome.events[0] == ["collect", "sample", "release"] * batches
        assert outcome.events[1] == ["collect", "release"] * batches
