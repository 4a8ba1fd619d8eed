"""Cells of the replication with tiny sizes, from the base model to an evaluation."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "recipes" / "replication"))

import cells as cells_module
import study

from delethink.errors import ConfigError

pytest.importorskip("reasoning_gym")

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def sizes() -> dict:
    sizes = cells_module.read_sizes()
    sizes |= {"seeds": [0], "problems": 4, "problems_beyond": 3, "problems_probe": 12}
    sizes["base"] |= {"layers": 1, "width": 32, "tokens": 128, "positions": 512}
    sizes["training"] |= {
        "max_steps": 1,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
    }
    for own in sizes["families"].values():
        own["base"] = {"updates": 8, "max_lines": 2}
        own["thinking"] |= {"context_size": 12, "carryover_size": 6, "max_chunks": 3}
        own |= {"max_chunks_beyond": [3, 6], "steps": [1, 2], "steps_beyond": [2, 4]}
        own["grid"] = [[12, 0], [12, 9]]
    sizes["grid"] |= {"problems": 3}
    traces = {"sampling": 2, "training": 2}
    sizes["cost"] = {"multiples": [1, 2], "fitted_from": 1, "repetitions": 1, "traces": traces}
    tier_b = sizes["tier_b"]
    ablations = {name: tier_b["ablations"][name] for name in ("state-block", "summary", "by-chunk")}
    ablations["summary"]["thinking"]["carryover"]["args"]["max_tokens"] = 4
    tier_b["ablations"] = ablations | {"m9": {"thinking": {"carryover_size": 3}}}
    tier_b["longer"] = {"max_chunks": 6, "steps": [2, 4], "max_steps": 1, "problems": 4}
    return sizes


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> cells_module.Place:
    folder = tmp_path_factory.mktemp("study")
    return cells_module.Place(folder / "results", folder / "work")


@pytest.fixture(scope="module")
def cells(sizes, place) -> dict:
    cells = cells_module.make_cells(sizes)
    assert study.run_cell(cells["life-base"], place) == 0
    return cells


def values_of(place: cells_module.Place, name: str) -> dict:
    return json.loads(place.file(name).read_text("utf-8"))["values"]


def test_an_evaluation_rerun_has_the_same_digits(cells, place, capsys) -> None:
    cell = cells["life-eval-base-s0"]
    assert study.run_cell(cell, place) == 0
    ways = values_of(place, cell.name)["ways"]
    assert set(ways) == {"delethink", "longcot"}
    for way in ways.values():
        assert list(way["scores"])[-1] == "24"  # 12 + 2 x 6 tokens
        assert [len(sample) for sample in way["scores"]["24"]] == [4]
    assert study.run_cell(cell, place, again=True) == 0
    assert "the same values" in capsys.readouterr().out
    assert study.run_cell(cell, place, again=True, seed=7) == 0
    assert "longcot, budget 24, seed 7: 0.000, inside" in capsys.readouterr().out
    assert study.run_cell(cell, place) == 0
    assert "is finished" in capsys.readouterr().out


def test_the_grid_has_budgets_of_at_least_that_of_training(cells, place) -> None:
    assert study.run_cell(cells["life-grid"], place) == 0
    ways = values_of(place, "life-grid")["ways"]
    budgets = {way: list(found["scores"]) for way, found in ways.items()}
    expected = {"delethink C=12 m=0 head=0": ["24"], "delethink C=12 m=9 head=0": ["24"]}
    assert budgets == expected | {"longcot": ["24"]}
    assert [len(line) for line in ways["longcot"]["scores"]["24"]] == [3, 3]


def test_the_probe_has_both_controls(cells, place) -> None:
    assert study.run_cell(cells["life-probe"], place) == 0
    conditions = {line["condition"] for line in values_of(place, "life-probe")["nats"]}
    assert conditions == {"carried", "none", "other"}


@pytest.mark.slow
@pytest.mark.parametrize("method", cells_module.METHODS)
def test_a_method_trains_and_is_evaluated(cells, place, method: str) -> None:
    assert study.run_cell(cells[f"life-train-{method}-s0"], place) == 0
    values = values_of(place, f"life-train-{method}-s0")
    assert len(values["curve"]) == 1
    assert study.run_cell(cells[f"life-eval-{method}-s0"], place) == 0
    if method != "longcot-short":
        name = f"life-beyond-{method}-s0"
        assert study.run_cell(cells[name], place) == 0
        (way,) = values_of(place, name)["ways"].values()
        assert list(way["scores"]) == ["24", "42"]
        assert [len(sample) for sample in way["scores"]["42"]] == [3] * 4


@pytest.mark.slow
def test_cost_is_measured_in_pieces_and_counts_as_the_cost_model(cells, place, monkeypatch) -> None:
    cell = cells["life-cost"]
    with monkeypatch.context() as patch:
        patch.setattr("work.PIECE_S", -1)
        assert study.run_cell(cell, place) == study.NOT_FINISHED
    assert study.run_cell(cell, place) == 0
    rows = values_of(place, cell.name)["rows"]
    assert len(rows) == 2 * 2 * 2 * 2  # methods, works, lengths; FLOPs and one round
    for row in rows:
        if "flops" in row:
            assert row["flops"] == pytest.approx(row["predicted_flops"], rel=0.1)
        else:
            assert row["peak_bytes"] >= 0
            assert row["seconds"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state-block", "summary", "by-chunk"])
def test_an_ablation_trains_and_is_evaluated_in_its_own_way(cells, place, name: str) -> None:
    assert study.run_cell(cells["hitting-base"], place) == 0
    assert study.run_cell(cells[f"hitting-ablate-{name}-s0"], place) == 0
    assert study.run_cell(cells[f"hitting-own-{name}-s0"], place) == 0
    (scores,) = values_of(place, f"hitting-own-{name}-s0")["ways"]["delethink"]["scores"].values()
    assert [len(sample) for sample in scores] == [4]


@pytest.mark.slow
def test_a_trained_model_goes_on_to_a_larger_budget(cells, place) -> None:
    for name in ("hitting-base", "hitting-train-delethink-s0", "hitting-continue-s0"):
        assert study.run_cell(cells[name], place) == 0
    first, second = (
        values_of(place, f"hitting-{name}-s0")["weights"]
        for name in ("train-delethink", "continue")
    )
    assert first != second
    for when in ("before", "after"):
        assert study.run_cell(cells[f"hitting-own-{when}-s0"], place) == 0
        values = values_of(place, f"hitting-own-{when}-s0")
        assert values["weights"] == (first if when == "before" else second)
        assert list(values["ways"]["delethink"]["scores"]) == ["42"]  # 12 + 5 x 6 tokens


def test_other_sizes_than_those_of_a_result_are_refused_by_name(cells, sizes, place) -> None:
    other = copy.deepcopy(sizes)
    other["base"]["slip"] = 0.5
    cell = cells_module.make_cells(other)["life-base"]
    with pytest.raises(ConfigError, match=r"base.slip \(0.03 there, 0.5 here\)"):
        study.run_cell(cell, place)


def test_a_cell_without_its_weights_names_the_cell_to_run(cells, tmp_path: Path) -> None:
    nowhere = cells_module.Place(tmp_path / "results", tmp_path / "work")
    with pytest.raises(ConfigError, match="needs the weights of hitting-base"):
        study.run_cell(cells["hitting-probe"], nowhere)
