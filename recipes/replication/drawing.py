"""Tables of the study, from its results alone, as lines of Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from cells import METHODS, Cell
from claims import (
    Analysis,
    Results,
    Scores,
    ablations_of,
    as_scores,
    compression,
    cost_values,
    families_of,
    names_of,
    scores_of,
    training_budget,
)
from inference import ClaimTest, combined_bootstrap, correct
from learning import learning_curves

NOT_RUN = "Not run yet."
Lines = list[str]

PAPER = {
    1: "R1-Distill 1.5B, AIME'25: LongCoT 23.6 %, Delethink 29.5 % (its budget is not stated)",
    2: "AIME'25 at about 24K tokens: Delethink-24K 31 %, LongCoT-24K 30.4 %, LongCoT-8K 28.0 %",
    3: "AIME'25 from 24K to 128K tokens: Delethink-24K 31 → 34.7 %, LongCoT-24K 30.4 → 30.4 %",
    4: "17 times fewer FLOPs at 1M tokens; at 24K 8,500 against 6,000 tokens/s per GPU",
    5: "24K → 96K in 150 steps, AIME'24 at 96K: 44.5 → 49.3 %; mean length 21.8K → 37.2K",
    6: "C = 8K and 4K alike, 2K lower; m from 1K to 7K alike without RL; the rest is not there",
    7: "crosswords of 14 x 14, GPT-OSS-120B: LongCoT 61.7, Delethink 31.3; of 7 x 7: no loss",
    8: "LongCoT-24K with Delethink gains about 4 points on AIME'25; the authors agree",
}
CLAIMS = {
    1: "The base already thinks in chunks",
    2: "Delethink-RL matches LongCoT-RL, and beats that of budget C",
    3: "Delethink-RL goes on improving beyond its budget",
    4: "Compute is linear, memory constant",
    5: "A few steps reach a budget four times larger",
    6: "C and m matter little",
    7: "A state larger than m breaks the method",
    8: "LongCoT-RL gains as much from thinking in chunks",
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Lines:
    """Return the lines of a table; a sentence if it has no rows."""
    if not rows:
        return [NOT_RUN]
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def finished_line(cells: Mapping[str, Cell], results: Results) -> Lines:
    """Return how many cells of each tier are finished."""
    parts = []
    for tier in ("A", "B"):
        own = [name for name, cell in cells.items() if cell.tier == tier]
        parts.append(f"{sum(n in results for n in own)} of {len(own)} cells of tier {tier}")
    return [f"Finished: {', '.join(parts)}."]


def summary_table(analysis: Analysis) -> Lines:
    """Return the table of all claims: the paper's number, ours and the verdict."""
    rows = [
        [
            str(claim),
            CLAIMS[claim],
            PAPER[claim],
            _ours(claim, analysis) or "not run yet",
            analysis.verdicts[claim] or "not run yet",
        ]
        for claim in CLAIMS
    ]
    return table(["claim", "", "the paper", "here", "verdict"], rows)


def _ours(claim: int, analysis: Analysis) -> str:
    """Return the numbers of a claim in a few words; empty if there is none."""
    if claim == 4:
        found = [s for s in analysis.slopes if s.method == "delethink"]
        return "; ".join(
            f"{family}: slopes "
            + ", ".join(
                f"{figure.partition('_')[0]} {min(v):.2f} to {max(v):.2f}"
                for figure in ("seconds", "flops", "peak_bytes")
                for v in [[s.value for s in found if (s.family, s.figure) == (family, figure)]]
            )
            for family in dict.fromkeys(s.family for s in found)
        )
    tests = [test for tests in analysis.tests.values() for test in tests]
    own = [t for t in tests if t.claim == claim and t.counts]
    return "; ".join(
        f"{t.name} by {t.result.value:+.3f}" if claim in (3, 5) else f"{t.name}: {_interval(t)}"
        for t in own
    )


def _interval(test: ClaimTest) -> str:
    low, high = test.result.interval()
    return f"{test.result.value:+.3f} ({low:+.3f} to {high:+.3f})"


def claims_table(tests: Sequence[ClaimTest]) -> Lines:
    """Return the lines of the table of all tests of a tier."""
    corrected = correct(tests)
    rows = []
    for test in tests:
        verdict = test.verdict(corrected)
        needed = test.deciding_problems(2 * len(tests)) if verdict == "not decided" else None
        p = corrected[f"{test.name}, above"]
        rows.append(
            [
                str(test.claim),
                test.name,
                _interval(test),
                f"{test.bound:+.2f}",
                f"{p:.4f}",
                verdict,
                f"{needed:,} problems" if needed else "",
            ]
        )
    head = ["claim", "test", "difference (95 % interval)", "above", "p, corrected", "verdict"]
    return table([*head, "would decide"], rows)


def accuracy_table(cells: Mapping[str, Cell], results: Results) -> Lines:
    """Return the lines of the table of accuracies at the training budget, by seed."""
    rows = []
    stems = dict.fromkeys(n.rpartition("-s")[0] for n in cells if "-eval-" in n)
    for stem in stems:
        for way in ("delethink", "longcot"):
            scores = scores_of(cells, results, stem, way)
            if scores is not None:
                seeds = ", ".join(f"{value:.3f}" for value in scores.mean((1, 2)))
                length = _mean_length(cells, results, stem, way)
                rows.append([stem, way, seeds, f"{scores.mean():.3f}", f"{length:.0f}"])
    return table(["cells", "way", "accuracy by seed", "mean", "thinking tokens"], rows)


def _mean_length(cells: Mapping[str, Cell], results: Results, stem: str, way: str) -> float:
    """Return the mean thinking length of the cells of all seeds, at the largest budget."""
    rows = [results[n]["values"]["ways"][way]["rows"] for n in names_of(cells, stem)]
    largest = [max(own, key=lambda row: row["budget"]) for own in rows]
    return float(np.mean([row["thinking_tokens"]["value"] for row in largest]))


def probe_table(cells: Mapping[str, Cell], results: Results) -> Lines:
    """Return the lines of the table of the loss after a reset, in nats per token."""
    contexts = {"carried": "own carryover", "none": "no carryover", "other": "another trace's"}
    rows = []
    for name in (n for n, cell in cells.items() if cell.kind == "probe" and n in results):
        for line in results[name]["values"]["nats"]:
            gap = line["gap"]
            context = contexts.get(line["condition"], line["condition"])
            loss = f"{gap['mean']:.4f} ({gap['low']:.4f} to {gap['high']:.4f})"
            rows.append([str(cells[name].settings["family"]), context, loss, str(gap["traces"])])
    return table(["family", "context", "loss, nats (95 % interval)", "traces"], rows)


def grid_table(cells: Mapping[str, Cell], results: Results) -> Lines:
    """Return the lines of the table of the base over C and m, against LongCoT."""
    rows = []
    for name in (n for n, cell in cells.items() if cell.kind == "grid" and n in results):
        ways = results[name]["values"]["ways"]
        longcot = _grid_scores(ways["longcot"])
        family = str(cells[name].settings["family"])
        rows.append([family, "LongCoT", *_grid_budget(ways["longcot"]), f"{longcot.mean():.3f}"])
        rows[-1].append("")
        for way, found in ways.items():
            if way != "longcot":
                scores = _grid_scores(found)
                result = combined_bootstrap([(1.0, scores), (-1.0, longcot)], 2000)
                low, high = result.interval()
                sizes = way.removeprefix("delethink ").removesuffix(" head=0")
                gain = f"{result.value:+.3f} ({low:+.3f} to {high:+.3f})"
                rows.append([family, sizes, *_grid_budget(found), f"{scores.mean():.3f}", gain])
    return table(
        ["family", "way", "budget", "accuracy", "against LongCoT (95 % interval)"],
        rows,
    )


def _grid_scores(found: Mapping[str, Any]) -> Scores:
    (lines,) = found["scores"].values()
    return np.array([as_scores(lines)])


def _grid_budget(found: Mapping[str, Any]) -> Lines:
    return [f"{int(budget):,}" for budget in found["scores"]]


def beyond_table(cells: Mapping[str, Cell], results: Results) -> Lines:
    """Return the lines of the table of accuracy against budget: sequential and parallel."""
    rows = []
    for family in families_of(cells):
        unit = training_budget(cells[f"{family}-probe"])
        for method in ("delethink", "longcot"):
            names = names_of(cells, f"{family}-beyond-{method}")
            if not names or not all(name in results for name in names):
                continue
            by_seed = [results[name]["values"]["ways"][method]["rows"] for name in names]
            for same in zip(*by_seed, strict=True):
                budget = f"{same[0]['budget'] / unit:.1f} x {unit}"
                figures = [f"{_mean(same, 'pass_at', '1'):.3f}"]
                k = max(map(int, same[0]["pass_at"]))
                figures += [f"{_mean(same, key, str(k)):.3f}" for key in ("pass_at", "maj_at")]
                rows.append([family, f"{method}-RL", budget, *figures, str(k)])
    head = ["family", "model", "budget, tokens", "accuracy", "pass@k", "maj@k", "k"]
    return table(head, rows)


def _mean(rows: Sequence[Mapping[str, Any]], key: str, k: str) -> float:
    """Return the mean of pass@k or maj@k over seeds; a vote of one is one sample."""
    values = [row[key].get(k, row["pass_at"].get(k)) for row in rows]
    return float(np.mean([value["value"] for value in values]))


def learning_table(cells: Mapping[str, Cell], results: Results) -> Lines:
    """Return the lines of the table of trainings: first and last reward, and their price."""
    rows = []
    for family in families_of(cells):
        for method in METHODS:
            names = names_of(cells, f"{family}-train-{method}")
            if not names or not all(name in results for name in names):
                continue
            curves = [learning_curves(cells, results, name) for name in names]
            first = np.mean([curve["reward"][:3].mean() for curve in curves])
            last = np.mean([curve["reward"][-3:].mean() for curve in curves])
            tokens, flops, seconds = (
                np.mean([curve[key][-1] for curve in curves])
                for key in ("tokens", "flops", "seconds")
            )
            price = "" if np.isnan(seconds) else f"{seconds:.0f}"
            row = [f"{first:.3f}", f"{last:.3f}", f"{tokens:,.0f}", f"{flops / 1e12:.2f}", price]
            rows.append([family, method, *row])
    head = ["family", "method", "reward, first 3 steps", "last 3", "tokens", "TFLOPs", "seconds"]
    return table(head, rows)


def slopes_table(analysis: Analysis) -> Lines:
    """Return the lines of the table of the slopes of claim 4."""
    words = {"seconds": "seconds", "flops": "FLOPs", "peak_bytes": "peak memory"}
    rows = [
        [
            slope.family,
            slope.phase,
            words[slope.figure],
            slope.method,
            f"{slope.value:.3f} ({slope.low:.3f} to {slope.high:.3f})",
            slope.verdict if slope.method == "delethink" else "",
        ]
        for slope in sorted(analysis.slopes, key=lambda s: (s.family, s.phase, s.figure, s.method))
    ]
    return table(["family", "work", "figure", "method", "slope (99 % interval)", "verdict"], rows)


def ratios_table(cells: Mapping[str, Cell], results: Results) -> Lines:
    """Return the lines of the table of LongCoT over Delethink, measured and by the cost model."""
    rows = []
    for name in (n for n, cell in cells.items() if cell.kind == "cost" and n in results):
        settings = cells[name].settings
        family = str(settings["family"])
        for phase in ("sampling", "training"):
            figures = ("seconds", "flops", "predicted_flops", "peak_bytes", "cache_bytes")
            ratios = {
                figure: np.divide(
                    *(
                        cost_values(results, family, method, phase, figure).mean(1)
                        for method in ("longcot", "delethink")
                    )
                )
                for figure in figures
            }
            for i, multiple in enumerate(settings["cost"]["multiples"]):
                values = [f"{ratios[figure][i]:.2f}" for figure in figures]
                values[-1] = values[-1] if phase == "sampling" else ""
                rows.append([family, phase, f"{multiple} C", *values])
    head = ["family", "work", "n", "seconds", "FLOPs", "cost model's FLOPs", "peak memory"]
    return table([*head, "cost model's cache"], rows)


def longer_table(cells: Mapping[str, Cell], results: Results) -> Lines:
    """Return the lines of the table of claim 5."""
    rows = []
    family = _tier_b_family(cells)
    for when in ("before", "after"):
        stem = f"{family}-own-{when}"
        scores = scores_of(cells, results, stem, "delethink")
        if scores is not None:
            seeds = ", ".join(f"{value:.3f}" for value in scores.mean((1, 2)))
            length = _mean_length(cells, results, stem, "delethink")
            rows.append([when, seeds, f"{scores.mean():.3f}", f"{length:,.0f}"])
    return table(["", "accuracy by seed", "mean", "mean thinking tokens"], rows)


def ablations_table(cells: Mapping[str, Cell], results: Results) -> Lines:
    """Return the lines of the table of claims 6 and 7: accuracies of all ablations."""
    family, rows = _tier_b_family(cells), []
    stems = {"default": f"{family}-eval-delethink"}
    stems |= {name: f"{family}-own-{name}" for name in ablations_of(cells)}
    stems["m9, base"] = f"{family}-own-m9-base"
    for name, stem in stems.items():
        scores = scores_of(cells, results, stem, "delethink")
        if scores is not None:
            seeds = ", ".join(f"{value:.3f}" for value in scores.mean((1, 2)))
            length = _mean_length(cells, results, stem, "delethink")
            rows.append([name, seeds, f"{scores.mean():.3f}", f"{length:.0f}"])
    has_ablations = any(not row[0].startswith("default") for row in rows)
    head = ["change", "accuracy by seed", "mean", "thinking tokens"]
    return table(head, rows if has_ablations else [])


def compression_line(cells: Mapping[str, Cell], results: Results) -> Lines:
    """Return what RL makes of half a state."""
    found = compression(cells, results)
    if found is None:
        return [NOT_RUN]
    return [
        f"With m = 9, on {found.result.problems} problems of 4 and more steps, RL changes the "
        f"accuracy by {_interval(found)}."
    ]


def _tier_b_family(cells: Mapping[str, Cell]) -> str:
    return next((str(c.settings["family"]) for c in cells.values() if c.tier == "B"), "")


def make_tables(cells: Mapping[str, Cell], results: Results) -> Iterator[tuple[str, Lines]]:
    """Yield the name and the lines of every table."""
    yield "finished", finished_line(cells, results)
    analysis = Analysis(cells, results)
    yield "summary", summary_table(analysis)
    for tier, tests in analysis.tests.items():
        yield f"tests {tier}", claims_table(tests)
    yield "slopes", slopes_table(analysis)
    for make in (
        accuracy_table,
        probe_table,
        grid_table,
        learning_table,
        beyond_table,
        ratios_table,
        longer_table,
        ablations_table,
        compression_line,
    ):
        name = make.__name__.removesuffix("_table").removesuffix("_line")
        yield name, make(cells, results)
