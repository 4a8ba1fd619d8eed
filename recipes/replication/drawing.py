"""Tables and figures of the study, from its results alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cells import METHODS, Cell
from inference import MARGIN, ClaimTest, claim_verdict, combined_bootstrap, correct

from delethink.chunking import ChunkSpec

Results = Mapping[str, Mapping[str, Any]]
Scores = npt.NDArray[np.float64]


def training_budget(cell: Cell) -> int:
    """Return the training budget of a cell's family, in tokens."""
    return ChunkSpec(**cell.settings["thinking"]).budget


def scores_of(
    cells: Mapping[str, Cell], results: Results, stem: str, way: str, budget: int | None = None
) -> Scores | None:
    """Return scores [seeds, problems, samples] of the cells ``stem-s*``; ``None`` if any is absent.

    ``budget`` is in tokens; by default the largest.
    """
    names = [name for name in cells if name.rpartition("-s")[0] == stem]
    if not names or not all(name in results for name in names):
        return None
    found = []
    for name in names:
        by_budget = results[name]["values"]["ways"][way]["scores"]
        own = by_budget[str(budget or max(map(int, by_budget)))]
        found.append([[float(sign) for sign in problem] for problem in zip(*own, strict=True)])
    return np.array(found)


def make_tests(cells: Mapping[str, Cell], results: Results) -> list[ClaimTest]:
    """Return the tests of claims 1, 2, 3 and 8 with results."""
    families = dict.fromkeys(str(cell.settings["family"]) for cell in cells.values())
    return [test for family in families for test in _tests_of(family, cells, results)]


def _tests_of(family: str, cells: Mapping[str, Cell], results: Results) -> Iterator[ClaimTest]:
    def scores(stem: str, way: str, budget: int | None = None) -> Scores | None:
        return scores_of(cells, results, f"{family}-{stem}", way, budget)

    budget = training_budget(next(c for c in cells.values() if c.name == f"{family}-probe"))
    trained = scores("eval-delethink", "delethink")
    pairs = [
        (1, "Delethink matches LongCoT", scores("eval-base", "delethink"), "eval-base", -MARGIN),
        (2, "Delethink-RL matches LongCoT-RL", trained, "eval-longcot", -MARGIN),
        (2, "Delethink-RL beats LongCoT-RL of budget C", trained, "eval-longcot-short", 0.0),
    ]
    terms: list[tuple[int, str, float, list[tuple[float, Scores | None]]]] = [
        (claim, name, bound, [(1.0, first), (-1.0, scores(second, "longcot"))])
        for claim, name, first, second, bound in pairs
    ]
    beyond = [
        (sign * weight, scores(f"beyond-{way}", way, at))
        for sign, way in ((1.0, "delethink"), (-1.0, "longcot"))
        for weight, at in ((1.0, None), (-1.0, budget))
    ]
    terms.append((3, "Delethink-RL gains more beyond its budget", 0.0, beyond))
    doubt = [(1.0, scores("eval-longcot", "delethink")), (-1.0, trained)]
    terms.append((8, "LongCoT-RL in chunks matches Delethink-RL", -MARGIN, doubt))
    for claim, name, bound, parts in terms:
        given = [(weight, values) for weight, values in parts if values is not None]
        if len(given) == len(parts):
            yield ClaimTest(claim, f"{family}: {name}", combined_bootstrap(given), bound)


def claims_table(tests: Sequence[ClaimTest]) -> list[str]:
    """Return the lines of the table of all tests, and the verdicts of whole claims."""
    corrected = correct(tests)
    lines = [
        "| claim | test | difference (95 % interval) | above | p, corrected | verdict | needs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for test in tests:
        low, high = test.result.interval()
        verdict = test.verdict(corrected)
        needed = test.deciding_problems(2 * len(tests)) if verdict == "not decided" else None
        lines.append(
            f"| {test.claim} | {test.name} | {test.result.value:+.3f} ({low:+.3f} to {high:+.3f}) "
            f"| {test.bound:+.2f} | {corrected[f'{test.name}, above']:.4f} | {verdict} "
            f"| {f'{needed:,} problems' if needed else ''} |"
        )
    lines.append("")
    for claim in sorted({test.claim for test in tests}):
        verdicts = [test.verdict(corrected) for test in tests if test.claim == claim]
        lines.append(f"- Claim {claim}: {claim_verdict(verdicts)}.")
    return lines


def accuracy_table(cells: Mapping[str, Cell], results: Results) -> list[str]:
    """Return the lines of the table of accuracies at the training budget, by seed."""
    lines = ["| cells | way | accuracy by seed | mean |", "| --- | --- | --- | --- |"]
    stems = dict.fromkeys(n.rpartition("-s")[0] for n in cells if "-eval-" in n)
    for stem in stems:
        for way in ("delethink", "longcot"):
            scores = scores_of(cells, results, stem, way)
            if scores is not None:
                seeds = ", ".join(f"{value:.3f}" for value in scores.mean((1, 2)))
                lines.append(f"| {stem} | {way} | {seeds} | {scores.mean():.3f} |")
    return lines


def probe_table(cells: Mapping[str, Cell], results: Results) -> list[str]:
    """Return the lines of the table of the loss after a reset, in nats per token."""
    lines = [
        "| cell | context | loss, nats (95 % interval) | traces |",
        "| --- | --- | --- | --- |",
    ]
    for name in (n for n, cell in cells.items() if cell.kind == "probe" and n in results):
        for line in results[name]["values"]["nats"]:
            gap = line["gap"]
            lines.append(
                f"| {name} | {line['condition']} | {gap['mean']:.4f} ({gap['low']:.4f} to "
                f"{gap['high']:.4f}) | {gap['traces']} |"
            )
    return lines


def plot_beyond(cells: Mapping[str, Cell], results: Results, path: Path) -> bool:
    """Plot accuracy against the budget, in multiples of that of training; ``False`` if empty."""
    from matplotlib.figure import Figure

    families = list(dict.fromkeys(str(cell.settings["family"]) for cell in cells.values()))
    figure = Figure(figsize=(4.6 * len(families), 3.6), layout="constrained")
    is_drawn = False
    panels = figure.subplots(1, len(families), squeeze=False)[0]
    for axes, family in zip(panels, families, strict=True):
        axes.set(title=family, xlabel="budget / training budget", ylabel="accuracy", xscale="log")
        for i, way in enumerate(("delethink", "longcot")):
            stem = f"{family}-beyond-{way}"
            name = next(name for name in cells if name.rpartition("-s")[0] == stem)
            if scores_of(cells, results, stem, way) is None:
                continue
            is_drawn, unit = True, training_budget(cells[name])
            budgets = sorted(map(int, results[name]["values"]["ways"][way]["scores"]))
            means = [scores_of(cells, results, stem, way, b) for b in budgets]
            by_seed = np.array([scores.mean((1, 2)) for scores in means if scores is not None])
            x = np.array(budgets) / unit
            axes.plot(x, by_seed.mean(1), marker=".", color=f"C{i}", label=f"{way}-RL")
            axes.plot(x, by_seed, color=f"C{i}", alpha=0.3, linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.legend() if axes.lines else None
    if is_drawn:
        figure.savefig(path, dpi=120)
    return is_drawn


def plot_training(cells: Mapping[str, Cell], results: Results, path: Path) -> bool:
    """Plot the reward of training against sampled tokens; ``False`` if there is no run."""
    from matplotlib.figure import Figure

    runs = [cell for cell in cells.values() if cell.kind == "train" and cell.name in results]
    families = list(dict.fromkeys(str(cell.settings["family"]) for cell in runs))
    if not families:
        return False
    figure = Figure(figsize=(4.6 * len(families), 3.6), layout="constrained")
    panels = figure.subplots(1, len(families), squeeze=False)[0]
    for axes, family in zip(panels, families, strict=True):
        axes.set(title=family, xlabel="sampled tokens", ylabel="reward, mean of a step")
        for cell in (run for run in runs if run.settings["family"] == family):
            values, method = results[cell.name]["values"], cell.settings["method"]
            curve = np.array(values["curve"], float)
            tokens = np.cumsum(curve[:, values["columns"].index("sampled_tokens")])
            is_first = cell.settings["seed"] == min(r.settings["seed"] for r in runs)
            axes.plot(
                tokens,
                curve[:, values["columns"].index("reward")],
                color=f"C{METHODS.index(method)}",
                alpha=0.7,
                label=method if is_first else None,
            )
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    return True


def draw(cells: Mapping[str, Cell], results: Results, folder: Path) -> None:
    """Write ``tables.md``, ``beyond.png`` and ``training.png`` from the results there are.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tests = make_tests(cells, results)
    parts = {
        "Claims": claims_table(tests) if tests else ["No test has all its results yet."],
        "Accuracy at the training budget": accuracy_table(cells, results),
        "Loss at a reset": probe_table(cells, results),
    }
    text = "\n\n".join(f"## {title}\n\n" + "\n".join(lines) for title, lines in parts.items())
    finished = f"{len(results)} of {len(cells)} cells are finished."
    (folder / "tables.md").write_text(f"# Results\n\n{finished}\n\n{text}\n", "utf-8")
    plot_beyond(cells, results, folder / "beyond.png")
    plot_training(cells, results, folder / "training.png")
    print(f"{finished} Written: {folder / 'tables.md'}")
