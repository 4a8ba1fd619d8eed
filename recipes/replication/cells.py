"""Cells of the study: names, settings, order, and results on disk that belong to them."""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import families

from delethink.errors import ConfigError, did_you_mean
from delethink.json_io import read_json

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
METHODS = ("delethink", "longcot", "longcot-short")
# In the order they are run. Tier B: "ablate" and "continue" train, "own" evaluates one way.
KINDS = (
    *("base", "eval-base", "probe", "grid", "cost", "train", "eval", "beyond"),
    *("ablate", "continue", "own"),
)
MAKING = ("base", "train", "ablate", "continue")  # kinds that make weights
TIERS = ("A", "B")
# Programs that decide the numbers of a cell, beside its settings and the library.
CODE = (HERE / "families.py", HERE / "make_base.py", ROOT / "scripts" / "make_toy.py")


@dataclass(frozen=True)
class Cell:
    """A piece of the study of at most 15 minutes, with one file of results."""

    name: str
    kind: str  # one of KINDS
    settings: Mapping[str, Any]  # everything with an effect on the result
    needs: tuple[str, ...] = ()  # cells with the weights it starts from
    tier: str = "A"

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
    """Return the sizes of the study; the reduced one has less of everything."""
    sizes: dict[str, Any] = read_json(HERE / "sizes.json", ConfigError)
    smaller = sizes.pop("reduced")
    if reduced:
        sizes["training"]["max_steps"] = smaller.pop("max_steps")
        kept = smaller.pop("families")
        sizes["families"] = {name: sizes["families"][name] for name in kept}
        sizes |= smaller
    return sizes


def make_cells(sizes: Mapping[str, Any]) -> dict[str, Cell]:
    """Return all cells by name, each after those it needs."""
    found = [cell for family in sizes["families"] for cell in _cells_of(family, sizes)]
    found += _tier_b(sizes)
    found.sort(key=lambda cell: KINDS.index(cell.kind))  # stable: families and seeds keep order
    return {cell.name: cell for cell in found}


def cells_of_tier(cells: Mapping[str, Cell], tier: str) -> dict[str, Cell]:
    """Return the cells of a tier with all that they need, in the order of ``cells``."""
    wanted = {name for name, cell in cells.items() if cell.tier == tier}
    for name, cell in reversed(cells.items()):  # what a cell needs comes before it
        if name in wanted:
            wanted |= set(cell.needs)
    return {name: cell for name, cell in cells.items() if name in wanted}


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
    code = result.get("code", {})  # results of the first version have none
    if other := [name for name, made in code.items() if code_digests().get(name) != made]:
        raise ConfigError(
            f"the result {path} was made with other code: {', '.join(other)} has changed since; "
            "set it back, or raise VERSION in families.py and begin again"
        )
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


@cache
def code_digests() -> dict[str, str]:
    """Return a digest of each file of ``CODE``, which comments and docstrings do not change."""
    return {path.name: _code_digest(path.read_text("utf-8")) for path in CODE}


def _code_digest(text: str) -> str:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            assert isinstance(body, list)
            body[:] = body[1:] or [ast.Pass()]
    return hashlib.blake2b(ast.dump(tree).encode(), digest_size=8).hexdigest()


def write_result(cell: Cell, place: Place, values: Mapping[str, Any], seconds: float) -> None:
    """Write the result of a finished cell in one step."""
    path = place.file(cell.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "cell": cell.name,
        "fingerprint": cell.fingerprint,
        "code": code_digests(),
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
    }
    made = f"{family}-base"
    yield Cell(made, "base", base)
    probe = {"thinking": own["thinking"], "steps": own["steps"]}
    yield Cell(
        f"{family}-probe", "probe", base | probe | {"problems": sizes["problems_probe"]}, (made,)
    )
    grid = {"thinking": own["thinking"], "steps": own["steps"], "grid": own["grid"]}
    yield Cell(f"{family}-grid", "grid", base | grid | sizes["grid"], (made,))
    cost = {"context_size": own["thinking"]["context_size"], "cost": sizes["cost"]}
    yield Cell(f"{family}-cost", "cost", base | cost, (made,))
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
                samples = {"samples": sizes["samples_beyond"][method]}
                yield Cell(
                    f"{family}-beyond-{method}-s{seed}",
                    "beyond",
                    trained | beyond | samples,
                    (name,),
                )


def _tier_b(sizes: Mapping[str, Any]) -> Iterator[Cell]:
    """Yield the cells of claims 5 to 7, which start from weights of tier A."""
    sizes_b, longer = sizes["tier_b"], sizes["tier_b"]["longer"]
    family = sizes_b["family"]
    own, made = sizes["families"][family], f"{family}-base"
    shared = {
        "protocol": sizes["protocol"],
        "family": family,
        "base": sizes["base"] | own["base"],
        "method": "delethink",
        "thinking": own["thinking"],
        "steps": own["steps"],
        "training": sizes["training"],
    }
    asked = {"problems": sizes["problems"], "samples": sizes["samples"]}
    for seed in sizes["seeds"]:
        for name, changes in sizes_b["ablations"].items():
            trained = shared | {"seed": seed}
            trained |= {part: shared[part] | changes[part] for part in changes}
            cell, end = f"{family}-ablate-{name}-s{seed}", f"{name}-s{seed}"
            yield Cell(cell, "ablate", trained, (made,), "B")
            yield Cell(f"{family}-own-{end}", "own", trained | asked, (cell,), "B")
        # The weakest carryover without RL, to see what RL makes of it.
        limit = shared | {"seed": seed, "method": "none", "training": {}}
        limit |= {"thinking": own["thinking"] | sizes_b["ablations"]["m9"]["thinking"]}
        yield Cell(f"{family}-own-m9-base-s{seed}", "own", limit | asked, (made,), "B")
        first = shared | {"seed": seed}
        thinking = own["thinking"] | {"max_chunks": longer["max_chunks"]}
        after = first | {
            "first_training": sizes["training"],
            "first_thinking": own["thinking"],
            "first_steps": own["steps"],
            "training": sizes["training"] | {"max_steps": longer["max_steps"]},
            "thinking": thinking,
            "steps": longer["steps"],
        }
        long = {"thinking": thinking, "steps": longer["steps"]}
        long |= {"problems": longer["problems"], "samples": sizes["samples"]}
        start, cell = f"{family}-train-delethink-s{seed}", f"{family}-continue-s{seed}"
        yield Cell(cell, "continue", after, (start,), "B")
        yield Cell(f"{family}-own-before-s{seed}", "own", first | long, (start,), "B")
        yield Cell(f"{family}-own-after-s{seed}", "own", after | long, (cell,), "B")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in sorted(values.items()):
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
