"""Tables, figures and the page of the replication, from made-up results."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "recipes" / "replication"))

import cells as cells_module
import claims
import drawing
import learning
import make_base
import page

from delethink.chunking import ChunkSpec
from delethink.cost.models import shape_of_config
from delethink.errors import ConfigError

pytest.importorskip("reasoning_gym")

MULTIPLES = (1, 2, 4, 8, 16)


def all_cells() -> dict:
    return cells_module.make_cells(cells_module.read_sizes())


def estimate(value: float) -> dict:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def row(budget: int, accuracy: float) -> dict:
    at = {str(k): estimate(accuracy) for k in (1, 2, 4)}
    return {"budget": budget, "thinking_tokens": estimate(200.0), "pass_at": at, "maj_at": at}


def cost_rows(chunked_memory: float) -> list[dict]:
    """Return rows of a cost cell in which Delethink is linear, and LongCoT grows as n squared."""
    rows = []
    for method, power in (("delethink", 1.0), ("longcot", 2.0)):
        for phase in ("sampling", "training"):
            for n in MULTIPLES:
                key = {"method": method, "phase": phase, "multiple": n}
                flops = {"flops": 1e9 * n**power, "predicted_flops": 1e9 * n**power}
                rows.append(key | {"round": -1, "cache_bytes": 1e5 * n ** (power - 1)} | flops)
                peak = 2e7 * n ** (chunked_memory if method == "delethink" else 1)
                for number in range(4):
                    noise = 1 + 0.01 * (number - 1.5)
                    seconds = {"seconds": 0.1 * n**power * noise, "wall_seconds": 1.0}
                    rows.append(key | seconds | {"round": number, "peak_bytes": peak * noise})
    return rows


def made_up_results(cells: dict, accuracy: dict[str, float], chunked_memory: float = 0.0) -> dict:
    """Return results of all cells but bases, with scores drawn at an accuracy.

    The key is ``method/way/multiple of the training budget``, or an ablation, or the method.
    """
    rng, found = np.random.default_rng(0), {}

    def drawn(p: float) -> list[str]:
        return ["".join(map(str, scores)) for scores in rng.binomial(1, p, (1, 300))]

    for name, cell in cells.items():
        if cell.kind in ("eval", "eval-base", "beyond", "own", "grid"):
            method = cell.settings.get("method", "base")
            thinking = cell.settings["thinking"]
            sizes = {k: v for k, v in thinking.items() if k != "carryover"}
            short = ChunkSpec(**sizes).budget
            budgets = (short, 10 * short) if cell.kind == "beyond" else (short,)
            ways = [method] if cell.kind == "beyond" else ["delethink", "longcot"]
            if cell.kind == "grid":
                ways = ["delethink C=72 m=36 head=0", "longcot"]
            if cell.kind == "own":
                method, ways = name.rpartition("-s")[0].partition("-own-")[2], ["delethink"]
            values = {}
            for way in ways:
                ps = {
                    b: accuracy.get(f"{method}/{way}/{b // short}", accuracy.get(method, 0.9))
                    for b in budgets
                }
                values[way] = {
                    "scores": {str(b): drawn(p) for b, p in ps.items()},
                    "rows": [row(b, p) for b, p in ps.items()],
                }
            found[name] = {"values": {"ways": values}}
        elif cell.kind == "train":
            columns = ["step", "reward", "thinking_tokens", "sampled_tokens"]
            curve = [[i, 0.5 + 0.01 * i, 200.0, 12_800] for i in range(1, 41)]
            found[name] = {"values": {"columns": columns, "curve": curve}}
        elif cell.kind == "cost":
            found[name] = {"values": {"rows": cost_rows(chunked_memory)}}
        elif cell.kind == "probe":
            gap = {"mean": 0.1, "low": 0.05, "high": 0.15, "traces": 128}
            found[name] = {"values": {"nats": [{"condition": "carried", "gap": gap}]}}
    return found


ACCURACY = {
    "base": 0.5,
    "delethink": 0.95,
    "longcot": 0.85,
    "longcot-short": 0.6,
    "longcot/delethink/1": 0.5,
    "delethink/delethink/10": 0.98,
    "longcot/longcot/10": 0.7,
    "before": 0.5,
    "after": 0.9,
    "C54": 0.6,
    "m9": 0.4,
    "m9-base": 0.3,
}
TEMPLATE = "# Page\n\n" + "\n\n".join(
    f"<!-- {name} -->\n<!-- end -->"
    for name in ("summary", "tests A", "figure beyond", "ablations")
)


def test_the_page_is_filled_from_the_results_alone(tmp_path: Path) -> None:
    cells, docs = all_cells(), tmp_path / "page.md"
    docs.write_text(TEMPLATE, "utf-8")
    results = made_up_results(cells, ACCURACY)
    page.draw(cells, results, tmp_path / "results", docs)
    text = docs.read_text("utf-8")
    assert "](page/beyond.svg)" in text
    found = claims.Analysis(cells, results).verdicts
    expected = {2: "holds", 3: "holds", 4: "holds", 5: "holds", 7: "holds"}
    expected |= {6: "does not hold", 8: "does not hold"}
    assert {claim: found[claim] for claim in expected} == expected
    assert all(f"| {verdict} |" in text for verdict in ("holds", "does not hold"))
    figures = {name: (tmp_path / "page" / f"{name}.svg").read_bytes() for name in page.FIGURES}
    assert all(0 < len(image) < 300_000 for image in figures.values())
    page.save(page.FIGURES["beyond"][0](cells, results), tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == figures["beyond"]


def test_without_results_every_block_says_so(tmp_path: Path) -> None:
    text = page.PAGE.read_text("utf-8")
    cells, docs = all_cells(), tmp_path / "page.md"
    docs.write_text(text, "utf-8")
    page.draw(cells, {}, tmp_path / "results", docs)
    blocks = {m["name"]: m[0] for m in page.BLOCK.finditer(docs.read_text("utf-8"))}
    assert set(blocks) == set(dict(drawing.make_tables(cells, {}))) | {
        f"figure {name}" for name in page.FIGURES
    }
    del blocks["finished"]
    assert all("not run yet" in block.lower() for block in blocks.values())
    assert not list((tmp_path / "page").iterdir())


def test_an_unknown_block_of_the_page_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'summary'"):
        page.filled("<!-- sumary -->\n<!-- end -->", {"summary": []})


def test_memory_that_grows_refutes_claim_4() -> None:
    cells = all_cells()
    results = made_up_results(cells, ACCURACY, chunked_memory=0.5)
    assert claims.Analysis(cells, results).verdicts[4] == "does not hold"
    slopes = {(s.method, s.figure): s for s in claims.slopes(cells, results)}
    assert slopes["longcot", "flops"].value == pytest.approx(2.0)
    assert slopes["delethink", "peak_bytes"].value == pytest.approx(0.5, abs=0.01)


def test_a_test_without_all_its_cells_is_left_out() -> None:
    cells = all_cells()
    results = made_up_results(cells, ACCURACY)
    del results["life-eval-longcot-s1"]
    names = [test.name for test in claims.make_tests(cells, results)]
    assert "life: Delethink-RL matches LongCoT-RL" not in names
    assert "hitting: Delethink-RL matches LongCoT-RL" in names
    assert claims.make_tests(cells, {}) == claims.make_tests(cells, {}, "B") == []
    assert claims.Analysis(cells, results).verdicts[2] is None


def test_learning_has_the_cost_models_flops_and_the_measured_seconds() -> None:
    cells = all_cells()
    results = made_up_results(cells, ACCURACY)
    chunked, longcot = (
        learning.learning_curves(cells, results, f"hitting-train-{method}-s0")
        for method in ("delethink", "longcot")
    )
    assert chunked["tokens"][-1] == 40 * 12_800
    # 200 tokens lie between 2 C and 4 C, where the made-up seconds a token rise for LongCoT alone.
    each = 0.1 / 72 * 200 * (1 / 8 + 1 / 4)
    assert chunked["seconds"][0] == pytest.approx(64 * each, rel=1e-6)
    assert longcot["seconds"][0] == pytest.approx(64 * each * 200 / 72, rel=1e-6)
    assert 1 < chunked["flops"][-1] / longcot["flops"][-1] < 2  # the carryover is encoded again
    del results["hitting-cost"]
    assert np.isnan(
        learning.learning_curves(cells, results, "hitting-train-longcot-s0")["seconds"]
    ).all()


def test_the_shape_for_flops_is_that_of_the_base() -> None:
    base = make_base.base_settings("hitting", make_base.read_sizes())
    size = len(make_base.make_tokenizer())
    model = make_base.make_model(0, base["layers"], base["width"], size, base["positions"])
    assert shape_of_config(model.config.to_dict(), "the base") == learning.base_shape(base)
