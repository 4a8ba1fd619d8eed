"""Cells of the replication: names, fingerprints, mistakes of a user, and drawing from results."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "recipes" / "replication"))

import cells as cells_module
import locking
import study

from delethink.chunking import ChunkSpec
from delethink.errors import ConfigError

pytest.importorskip("reasoning_gym")

FOLDER = Path(__file__).parents[2] / "recipes" / "replication"


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> cells_module.Place:
    place = cells_module.Place(tmp_path / "results", tmp_path / "work")
    monkeypatch.setattr(study.Place, "of", lambda reduced: place)
    return place


def all_cells(reduced: bool = False) -> dict:
    return cells_module.make_cells(cells_module.read_sizes(reduced))


def test_every_cell_comes_after_those_it_needs() -> None:
    seen: set[str] = set()
    for name, cell in all_cells().items():
        assert set(cell.needs) <= seen
        seen.add(name)
    trainings = [name for name in seen if "-train-" in name]
    assert len(trainings) == 2 * 3 * 3  # families, methods, seeds


def test_the_protocol_names_the_sizes_that_are_run() -> None:
    text, sizes = (FOLDER / "PROTOCOL.md").read_text("utf-8"), cells_module.read_sizes()
    assert f"Version {sizes['protocol']}." in text
    budgets = {cells_module.families.FAMILIES[name]: 0 for name in sizes["families"]}
    for name, own in sizes["families"].items():
        spec = ChunkSpec(**own["thinking"])
        budgets[cells_module.families.FAMILIES[name]] = spec.budget
        for numbers in (
            f"{spec.context_size}, {spec.carryover_size}, {spec.head_size}",
            f"{spec.max_chunks}, {spec.budget}",
            "{}\u2013{}".format(*own["steps"]),
            "{}\u2013{}".format(*own["steps_beyond"]),
            f"{own['max_chunks_beyond'][-1]}, {10 * spec.budget:,}",
        ):
            assert numbers in text
        beyond = ChunkSpec(**own["thinking"] | {"max_chunks": own["max_chunks_beyond"][-1]})
        assert beyond.budget == 10 * spec.budget
        assert own["max_chunks_beyond"][0] == spec.max_chunks
    assert set(budgets.values()) == {216, 252}
    assert f"{sizes['problems']:,} held-out" in re.sub(r"\s+", " ", text)


def test_the_reduced_study_is_smaller_and_kept_apart() -> None:
    whole, reduced = cells_module.read_sizes(), cells_module.read_sizes(reduced=True)
    assert reduced["training"]["max_steps"] < whole["training"]["max_steps"]
    assert reduced["problems"] < whole["problems"]
    assert set(whole) == set(reduced)
    assert cells_module.Place.of(True).results != cells_module.Place.of(False).results


def test_the_protocol_names_the_sizes_of_tier_b() -> None:
    text, sizes = (FOLDER / "PROTOCOL.md").read_text("utf-8"), cells_module.read_sizes()
    default = sizes["families"]["hitting"]["thinking"]
    for name, changes in sizes["tier_b"]["ablations"].items():
        assert f"`{name}`" in text
        thinking = {k: v for k, v in changes.get("thinking", {}).items() if k != "carryover"}
        budget = ChunkSpec(**default | thinking).budget
        assert budget == (261 if name == "m9" else 216)
    longer = sizes["tier_b"]["longer"]
    assert ChunkSpec(**default | {"max_chunks": longer["max_chunks"]}).budget == 4 * 216
    assert "{}\u2013{} steps".format(*longer["steps"]) in re.sub(r"\s+", " ", text)


def test_a_tier_has_the_cells_it_needs_and_no_others() -> None:
    cells = all_cells()
    tiers = {tier: cells_module.cells_of_tier(cells, tier) for tier in cells_module.TIERS}
    assert {cell.tier for cell in tiers["A"].values()} == {"A"}
    borrowed = [name for name, cell in tiers["B"].items() if cell.tier == "A"]
    assert borrowed == ["hitting-base", *(f"hitting-train-delethink-s{seed}" for seed in range(3))]
    for cells_of_tier in tiers.values():
        assert all(set(cell.needs) <= set(cells_of_tier) for cell in cells_of_tier.values())


def test_an_unknown_cell_is_one_sentence(place, capsys) -> None:
    assert study.main(["run", "hitting-evl-base-s0"]) == 2
    assert "Did you mean 'hitting-eval-base-s0'?" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["run"], ["run", "a", "--tier", "A"], ["run", "--tier", "C"]])
def test_run_needs_one_cell_or_one_tier(argv, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        study.main(argv)
    assert caught.value.code == 2


def test_a_result_of_an_older_version_is_refused_by_every_command(place, capsys) -> None:
    cell = all_cells()["hitting-base"]
    cells_module.write_result(cell, place, {"weights": "x"}, 1.0)
    path = place.file(cell.name)
    result = json.loads(path.read_text("utf-8"))
    result["fingerprint"]["families"] = 0
    path.write_text(json.dumps(result), "utf-8")
    for command in (["list"], ["draw"], ["run", "--tier", "A"]):
        assert study.main(command) == 2
        assert "families (0 there, 1 here)" in capsys.readouterr().err


def test_code_changed_under_a_result_is_refused_unless_only_words_changed(place, monkeypatch):
    cell = all_cells()["hitting-base"]
    cells_module.write_result(cell, place, {"weights": "x"}, 1.0)
    source = (FOLDER / "families.py").read_text("utf-8")
    digest = cells_module._code_digest
    assert digest(source.replace("Return the cells of a ring", "Give")) == digest(source)
    changed = {"families.py": digest(source.replace("RULE, RING_CELLS, STOP = 45", "R, C, S = 4"))}
    monkeypatch.setattr(cells_module, "code_digests", lambda: changed)
    with pytest.raises(ConfigError, match=r"other code: families.py, make_base.py, make_toy.py"):
        cells_module.read_result(cell, place)


def test_a_second_driver_and_a_second_run_of_a_cell_are_refused(place, capsys) -> None:
    words = f"is running already, as process {os.getpid()}"
    with locking.locked(place.work / "driver.lock", "the study"):
        assert study.main(["run", "--tier", "A"]) == 2
        assert words in capsys.readouterr().err
    with locking.locked(place.work / "life-base.lock", "the cell"):
        assert study.main(["run", "life-base"]) == 2
        assert words in capsys.readouterr().err
    with locking.locked(place.work / "driver.lock", "the study"):
        pass  # it is free again


def test_a_full_disk_is_one_sentence_and_loses_no_result(place, capsys, monkeypatch) -> None:
    cell = all_cells()["hitting-base"]
    cells_module.write_result(cell, place, {"weights": "first"}, 1.0)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cells_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        cells_module.write_result(cell, place, {"weights": "second"}, 1.0)
    assert cells_module.read_result(cell, place)["values"] == {"weights": "first"}
    assert [path.name for path in place.results.iterdir()] == ["hitting-base.json"]
    monkeypatch.setattr(study, "show", full)
    assert study.main(["list"]) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_a_file_of_no_cell_is_refused(place) -> None:
    place.results.mkdir()
    place.file("other").write_text("{}", "utf-8")
    with pytest.raises(ConfigError, match="the result of no cell"):
        cells_module.check_results(all_cells(), place)


class FakeDriver(study.Driver):
    """Runs a small program in place of each cell, as a cell takes minutes."""

    program = ""

    def command(self, cell: cells_module.Cell) -> list[str]:
        path = self.place.file(cell.name)
        result = json.dumps({"fingerprint": cell.fingerprint})
        return [sys.executable, "-c", self.program, cell.name, str(path), result]


WRITES = "import sys, pathlib; pathlib.Path(sys.argv[2]).write_text(sys.argv[3])"


def test_the_driver_runs_what_is_missing_and_names_what_failed(place, capsys) -> None:
    cells, driver = all_cells(), FakeDriver(place)
    place.results.mkdir()
    # The base of one family fails, so no cell of that family can run.
    driver.program = f"import sys\nif sys.argv[1] == 'life-base': sys.exit(2)\n{WRITES}"
    few = {name: cells[name] for name in ("hitting-base", "life-base", "life-probe")}
    assert driver.run(few, jobs=2) == 1
    out = capsys.readouterr().out
    assert "2 of 3 cells are not finished: life-base, life-probe" in out
    again = FakeDriver(place)
    again.program = WRITES
    assert again.run(few, jobs=1) == 0
    assert " hitting-base" not in capsys.readouterr().out  # finished before


def test_a_cell_that_is_not_finished_is_run_again(place) -> None:
    cells, driver = all_cells(), FakeDriver(place)
    place.results.mkdir()
    driver.program = f"""
import pathlib, sys
mark = pathlib.Path(sys.argv[2]).with_suffix(".pieces")
pieces = len(mark.read_text()) if mark.exists() else 0
mark.write_text("x" * (pieces + 1))
if pieces < 2: sys.exit({study.NOT_FINISHED})
{WRITES}"""
    assert driver.run({"life-base": cells["life-base"]}, jobs=1) == 0
    assert (place.results / "life-base.pieces").read_text("utf-8") == "xxx"


def test_no_cell_outlives_an_interrupted_driver(place, monkeypatch) -> None:
    cells, driver = all_cells(), FakeDriver(place)
    driver.program = "import time; time.sleep(600)"
    processes = []
    whole = study.subprocess.Popen.wait

    def interrupted(process, timeout=None):
        processes.append(process)
        monkeypatch.setattr(study.subprocess.Popen, "wait", whole)
        raise KeyboardInterrupt

    monkeypatch.setattr(study.subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        driver.run({"life-base": cells["life-base"]}, jobs=1)
    assert processes[0].poll() is not None
