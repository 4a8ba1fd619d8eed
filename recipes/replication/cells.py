"""Cells of the study: names, settings, order, and results on disk that belong to them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families

from delethink.errors import ConfigError, did_you_mean
from delethink.json_io import read_json

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
METHODS = ("delethink", "longcot", "longcot-short")
KINDS = ("base", "eval-base", "probe", "train", "eval", "beyond")  # in the order they are run


@dataclass(frozen=True)
class Cell:
    """A piece of the study of at most 15 minutes, with one file of results."""

    name: str
    kind: str  # one of KINDS
    settings: Mapping[str, Any]  # everything with an effect on the result
    needs: tuple[str, ...] = ()  # cells with the weights it starts from

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Return the settings by dotted key, with the version of the families."""
        return dict(_flatten({"families": families.VERSION, **self.settings}))


@dataclass(frozen=True)
class Place:
    """Folders of a study: results to keep, and work that can be made again."""

    results: Path
    work: Path

    @classmethod
    def of(cls, reduced: bool) -> Place:
        """Return the folders of the whole study, or of the reduced one."""
        name = "reduced" if reduced else "full"
        return cls(HERE / "results" / name, ROOT / "runs" / "replication" / name)

    def file(self, name: str) -> Path:
        """Return the file of a cell's results."""
        return self.results / f"{name}.json"

    def folder(self, name: str) -> Path:
        """Return the folder of a cell's weights and traces."""
        return self.work / name


def read_sizes(reduced: bool = False) -> dict[str, Any]:
    """Return the sizes of the study; the reduced one has fewer steps, problems and samples."""
    sizes: dict[str, Any] = read_json(HERE / "sizes.json", ConfigError)
    smaller = sizes.pop("reduced")
    if reduced:
        sizes["training"]["max_steps"] = smaller.pop("max_steps")
        sizes |= smaller
    return sizes


def make_cells(sizes: Mapping[str, Any]) -> dict[str, Cell]:
    """Return all cells by name, each after those it needs."""
    found = [cell for family in sizes["families"] for cell in _cells_of(family, sizes)]
    found.sort(key=lambda cell: KINDS.index(cell.kind))  # stable: families and seeds keep order
    return {cell.name: cell for cell in found}


def find_cell(cells: Mapping[str, Cell], name: str) -> Cell:
    """Return a cell.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in cells:
        raise ConfigError(f"the study has no cell {name!r}.{did_you_mean(name, cells)}")
    return cells[name]


def read_result(cell: Cell, place: Place) -> dict[str, Any] | None:
    """Return the result of a cell; ``None`` if it is not finished.

    Raises:
        ConfigError: the result was made with other sizes or another version.
    """
    path = place.file(cell.name)
    if not path.exists():
        return None
    result: dict[str, Any] = read_json(path, ConfigError)
    before, now = result.get("fingerprint", {}), cell.fingerprint
    changed = sorted(key for key in before | now if before.get(key) != now.get(key))
    if changed:
        listed = ", ".join(
            f"{key} ({before.get(key)} there, {now.get(key)} here)" for key in changed
        )
        raise ConfigError(
            f"the result {path} was made with other settings: {listed}; set them back, or move "
            "the results away and begin again"
        )
    return result


def check_results(cells: Mapping[str, Cell], place: Place) -> dict[str, dict[str, Any]]:
    """Return the results of all finished cells by name.

    Raises:
        ConfigError: a result was made with other sizes, or belongs to no cell.
    """
    known = {path.stem for path in place.results.glob("*.json")}
    if unknown := sorted(known - set(cells)):
        raise ConfigError(
            f"{place.file(unknown[0])} is the result of no cell of this study; move it away"
        )
    found = {name: read_result(cell, place) for name, cell in cells.items()}
    return {name: result for name, result in found.items() if result is not None}


def write_result(cell: Cell, place: Place, values: Mapping[str, Any], seconds: float) -> None:
    """Write the result of a finished cell in one step."""
    path = place.file(cell.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "cell": cell.name,
        "fingerprint": cell.fingerprint,
        "seconds": round(seconds, 1),  # of a shared machine: no result of the study
        "values": values,
    }
    partial = path.with_suffix(".new")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(result, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _cells_of(family: str, sizes: Mapping[str, Any]) -> Iterator[Cell]:
    own = sizes["families"][family]
    shared = {"protocol": sizes["protocol"], "family": family}
    base = shared | {"base": sizes["base"] | own["base"]}
    asked = {
        "thinking": own["thinking"],
        "steps": own["steps"],
        "problems": sizes["problems"],
        "samples": sizes["samples"],
    }
    beyond = {
        "thinking": own["thinking"],
        "max_chunks_beyond": own["max_chunks_beyond"],
        "steps_beyond": own["steps_beyond"],
        "problems": sizes["problems_beyond"],
        "samples": sizes["samples_beyond"],
    }
    made = f"{family}-base"
    yield Cell(made, "base", base)
    probe = {"thinking": own["thinking"], "steps": own["steps"]}
    yield Cell(
        f"{family}-probe", "probe", base | probe | {"problems": sizes["problems_probe"]}, (made,)
    )
    for seed in sizes["seeds"]:
        yield Cell(
            f"{family}-eval-base-s{seed}", "eval-base", base | asked | {"seed": seed}, (made,)
        )
        for method in METHODS:
            name = f"{family}-train-{method}-s{seed}"
            run = {"method": method, "seed": seed, "training": sizes["training"]}
            trained = base | run | {"thinking": own["thinking"], "steps": own["steps"]}
            yield Cell(name, "train", trained, (made,))
            yield Cell(f"{family}-eval-{method}-s{seed}", "eval", trained | asked, (name,))
            if method != "longcot-short":
                yield Cell(f"{family}-beyond-{method}-s{seed}", "beyond", trained | beyond, (name,))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in sorted(values.items()):
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
