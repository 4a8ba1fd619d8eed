"""Tests of the claims, made from the results of the cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from cells import TIERS, Cell
from families import FAMILIES
from inference import (
    MARGIN,
    ClaimTest,
    Verdict,
    claim_verdict,
    combined_bootstrap,
    correct,
)

from delethink.chunking import ChunkSpec

Results = Mapping[str, Mapping[str, Any]]
Scores = npt.NDArray[np.float64]
Term = tuple[float, Scores | None]

PAPERS_ABLATIONS = ("C54", "C144", "m24", "m54")  # the verdict of claim 6 is theirs
SLOPE_RANGES = {"seconds": (0.9, 1.1), "flops": (0.9, 1.1), "peak_bytes": (-0.1, 0.1)}
SLOPE_LEVEL = 0.99
SLOPE_RESAMPLES = 10_000
FIRST_LONG_STEPS = 4  # least steps of a problem of ``hitting`` that does not fit one context


def families_of(cells: Mapping[str, Cell]) -> list[str]:
    """Return the families of the study in their order."""
    return list(dict.fromkeys(str(cell.settings["family"]) for cell in cells.values()))


def training_budget(cell: Cell) -> int:
    """Return the training budget of a cell's family, in tokens."""
    return ChunkSpec(**cell.settings["thinking"]).budget


def names_of(cells: Mapping[str, Cell], stem: str) -> list[str]:
    """Return the cells ``stem-s*``, one for each seed."""
    return [name for name in cells if name.rpartition("-s")[0] == stem]


def scores_of(
    cells: Mapping[str, Cell], results: Results, stem: str, way: str, budget: int | None = None
) -> Scores | None:
    """Return scores [seeds, problems, samples] of the cells ``stem-s*``; ``None`` if any is absent.

    ``budget`` is in tokens; by default the largest.
    """
    names = names_of(cells, stem)
    if not names or not all(name in results for name in names):
        return None
    found = []
    for name in names:
        by_budget = results[name]["values"]["ways"][way]["scores"]
        own = by_budget[str(budget or max(map(int, by_budget)))]
        found.append(as_scores(own))
    return np.array(found)


def as_scores(lines: Sequence[str]) -> list[list[float]]:
    """Return scores [problems][samples] from a string of digits a sample."""
    return [[float(digit) for digit in problem] for problem in zip(*lines, strict=True)]


def make_tests(cells: Mapping[str, Cell], results: Results, tier: str = "A") -> list[ClaimTest]:
    """Return the tests of a tier that have all their results."""
    if tier == "B":
        return list(_tier_b_tests(cells, results))
    return [test for family in families_of(cells) for test in _tests_of(family, cells, results)]


def _tests_of(family: str, cells: Mapping[str, Cell], results: Results) -> Iterator[ClaimTest]:
    def scores(stem: str, way: str, budget: int | None = None) -> Scores | None:
        return scores_of(cells, results, f"{family}-{stem}", way, budget)

    budget = training_budget(cells[f"{family}-probe"])
    trained = scores("eval-delethink", "delethink")
    pairs = [
        (1, "Delethink matches LongCoT", scores("eval-base", "delethink"), "eval-base", -MARGIN),
        (2, "Delethink-RL matches LongCoT-RL", trained, "eval-longcot", -MARGIN),
        (2, "Delethink-RL beats LongCoT-RL of budget C", trained, "eval-longcot-short", 0.0),
    ]
    for claim, name, first, second, bound in pairs:
        terms = [(1.0, first), (-1.0, scores(second, "longcot"))]
        yield from _test(claim, f"{family}: {name}", terms, bound)
    beyond = [
        (sign * weight, scores(f"beyond-{way}", way, at))
        for sign, way in ((1.0, "delethink"), (-1.0, "longcot"))
        for weight, at in ((1.0, None), (-1.0, budget))
    ]
    yield from _test(3, f"{family}: Delethink-RL gains more beyond its budget", beyond, 0.0)
    doubt = [(1.0, scores("eval-longcot", "delethink")), (-1.0, trained)]
    yield from _test(8, f"{family}: LongCoT-RL in chunks matches Delethink-RL", doubt, -MARGIN)


def _tier_b_tests(cells: Mapping[str, Cell], results: Results) -> Iterator[ClaimTest]:
    found = next((cell for cell in cells.values() if cell.tier == "B"), None)
    if found is None:
        return
    family = str(found.settings["family"])

    def scores(stem: str) -> Scores | None:
        return scores_of(cells, results, f"{family}-{stem}", "delethink")

    default = scores("eval-delethink")
    change = [(1.0, scores("own-after")), (-1.0, scores("own-before"))]
    yield from _test(5, f"{family}: a few steps with four times the budget help", change, 0.0)
    for name in ablations_of(cells):
        terms = [(1.0, scores(f"own-{name}")), (-1.0, default)]
        if name == "m9":
            terms = [(-weight, values) for weight, values in terms]
            yield from _test(7, f"{family}: m = 36 beats m = 9 by the margin", terms, MARGIN)
        else:
            is_papers = name in PAPERS_ABLATIONS
            yield from _test(6, f"{family}: {name} matches the default", terms, -MARGIN, is_papers)


def ablations_of(cells: Mapping[str, Cell]) -> list[str]:
    """Return the names of the ablations."""
    stems = (n.rpartition("-s")[0] for n, cell in cells.items() if cell.kind == "ablate")
    return list(dict.fromkeys(stem.partition("-ablate-")[2] for stem in stems))


def _test(
    claim: int, name: str, terms: Sequence[Term], bound: float, counts: bool = True
) -> Iterator[ClaimTest]:
    given = [(weight, values) for weight, values in terms if values is not None]
    if len(given) == len(terms):
        yield ClaimTest(claim, name, combined_bootstrap(given), bound, counts)


def compression(cells: Mapping[str, Cell], results: Results) -> ClaimTest | None:
    """Return the gain of RL with m = 9 on problems beyond one context; it has no verdict."""
    family = next((str(c.settings["family"]) for c in cells.values() if c.tier == "B"), "")
    after, before = (
        scores_of(cells, results, f"{family}-own-{stem}", "delethink") for stem in ("m9", "m9-base")
    )
    if after is None or before is None:
        return None
    low, high = cells[names_of(cells, f"{family}-own-m9")[0]].settings["steps"]
    steps = np.array([_steps(family, low, high, i) for i in range(after.shape[1])])
    is_long = steps >= FIRST_LONG_STEPS
    result = combined_bootstrap([(1.0, after[:, is_long]), (-1.0, before[:, is_long])])
    return ClaimTest(7, f"{family}: RL learns to compress", result, 0.0, False)


@cache
def _steps(family: str, low: int, high: int, index: int) -> int:
    steps: int = FAMILIES[family](low, high).problem("heldout", index).metadata["steps"]
    return steps


@dataclass(frozen=True)
class Slope:
    """A slope of claim 4 in logarithms, with its interval."""

    family: str
    method: str
    phase: str
    figure: str  # key of SLOPE_RANGES
    value: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """Return whether the interval lies within the range, or outside."""
        least, most = SLOPE_RANGES[self.figure]
        if least <= self.low and self.high <= most:
            return "holds"
        return "does not hold" if self.high < least or self.low > most else "not decided"


def cost_values(results: Results, family: str, method: str, phase: str, figure: str) -> Scores:
    """Return a figure of a cost cell [lengths, rounds]; FLOPs and caches have one round."""
    rows = [
        row
        for row in results[f"{family}-cost"]["values"]["rows"]
        if (row["method"], row["phase"]) == (method, phase) and figure in row
    ]
    multiples = sorted({row["multiple"] for row in rows})
    return np.array(
        [[float(row[figure]) for row in rows if row["multiple"] == n] for n in multiples]
    )


def slopes(cells: Mapping[str, Cell], results: Results) -> list[Slope]:
    """Return the slopes of claim 4 of all finished cost cells."""
    found = []
    for name in (n for n, cell in cells.items() if cell.kind == "cost" and n in results):
        cost, family = cells[name].settings["cost"], str(cells[name].settings["family"])
        is_fitted = np.array([n >= cost["fitted_from"] for n in cost["multiples"]])
        lengths = np.log(np.array(cost["multiples"])[is_fitted])
        for method in ("delethink", "longcot"):
            for phase in ("sampling", "training"):
                for figure in SLOPE_RANGES:
                    values = cost_values(results, family, method, phase, figure)[is_fitted]
                    found.append(Slope(family, method, phase, figure, *_fit(lengths, values)))
    return found


def _fit(lengths: Scores, values: Scores) -> tuple[float, float, float]:
    """Return the slope of log mean values on ``lengths`` and the ends of its interval."""
    # A peak of nothing has no logarithm: one page is the least that a process can take.
    values = np.maximum(values, 4096.0) if values.max() > 4096 else values
    rng = np.random.default_rng(0)
    drawn = rng.integers(values.shape[1], size=(SLOPE_RESAMPLES, *values.shape))
    means = np.take_along_axis(values[np.newaxis], drawn, axis=2).mean(2)  # [resamples, lengths]
    centred = (lengths - lengths.mean()) / ((lengths - lengths.mean()) ** 2).sum()
    draws = np.log(means) @ centred
    tail = (1 - SLOPE_LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(np.log(values.mean(1)) @ centred), float(low), float(high)


@dataclass(frozen=True)
class Analysis:
    """Tests, slopes and verdicts of the results; each is computed once."""

    cells: Mapping[str, Cell]
    results: Results

    @cached_property
    def tests(self) -> dict[str, list[ClaimTest]]:
        """Return the tests by tier."""
        return {tier: make_tests(self.cells, self.results, tier) for tier in TIERS}

    @cached_property
    def slopes(self) -> list[Slope]:
        """Return the slopes of claim 4."""
        return slopes(self.cells, self.results)

    @cached_property
    def verdicts(self) -> dict[int, Verdict | None]:
        """Return the verdict of each claim; ``None`` where results of its tests are missing."""
        found: dict[int, Verdict | None] = dict.fromkeys(range(1, 9))
        families = families_of(self.cells)
        expected = {1: 1, 2: 2, 3: 1, 8: 1}
        expected = {claim: number * len(families) for claim, number in expected.items()}
        expected |= {5: 1, 6: len(PAPERS_ABLATIONS), 7: 1}
        for tests in self.tests.values():
            corrected = correct(tests)
            for claim in {test.claim for test in tests}:
                counted = [test for test in tests if test.claim == claim and test.counts]
                if len(counted) == expected[claim]:
                    found[claim] = claim_verdict([test.verdict(corrected) for test in counted])
        own = [slope for slope in self.slopes if slope.method == "delethink"]
        if {slope.family for slope in own} == set(families):
            found[4] = claim_verdict([slope.verdict for slope in own])
        return found
