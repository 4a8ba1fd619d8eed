"""The report of a training run: ``report.html``, drawn from the files of its directory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from delethink.chunking import ChunkSpec
from delethink.cost.flops import Cut, cut_traces, sampling_flops
from delethink.cost.models import model_shape
from delethink.errors import DelethinkError
from delethink.evaluation.heldout import HeldOutResult
from delethink.evaluation.metrics import wilson
from delethink.output import guard_process
from delethink.report_page import (
    Chart,
    ChartCurve,
    Report,
    ReportSection,
    ReportTable,
    write_report,
)
from delethink.report_process import ReportProcess
from delethink.training.metrics import find_metric
from delethink.training.run_directory import RunDirectory
from delethink.yaml_io import load_yaml

_PHASES = ("sampling", "scoring", "training", "weight_update")
_MAIN = ("reward", "thinking_tokens", "chunks", "budget_share")
_POLICY = ("entropy", "logprob_difference", "logprob_difference_max", "loss", "gradient_norm",
           "clip_fraction", "kl", "groups_without_signal", "staleness", "padding")  # fmt: skip
_BY_CHUNK = ("entropy", "logprob_difference", "trained_tokens")


class RunReport:
    """Keeps ``report.html`` of a run up to date; ``log`` receives a line if it cannot be drawn."""

    def __init__(self, path: Path, log: Callable[[str], None]) -> None:
        self._path, self._log = path, log
        self.process = ReportProcess("delethink.training.report", path, log)

    def update(self) -> None:
        """Draw the report in another process, if the last drawing is long ago."""
        self.process.update()

    def finish(self) -> None:
        """Draw the report of the files as they are now."""
        self.process.close()
        if not any((self._path / name).exists() for name in ("metrics.jsonl", "table.json")):
            return  # the directory of a run without results is removed
        try:
            draw_run(self._path)
        except Exception as error:  # a report must not cost a run, whatever is in its files
            self._log(f"report.html cannot be drawn: {error}")


@contextmanager
def kept_report(path: Path, log: Callable[[str], None]) -> Iterator[RunReport]:
    """Give the report of a run, and draw it at the end, also after a failure."""
    report = RunReport(path, log)
    try:
        yield report
    finally:
        report.finish()


def draw_run(path: Path) -> Path:
    """Write ``report.html`` of a run, and return its path.

    Raises:
        MissingExtraError: Bokeh is not installed.
        RunDirectoryError: a file of the run is damaged.
        OSError: the report cannot be written.
    """
    run = RunDirectory(path)
    metrics = run.read_metrics()
    rows = [HeldOutResult.from_dict(row) for row in run.read_table()]
    config = (path / "config.yaml").read_text(encoding="utf-8")
    return write_report(run_report(run, metrics, rows, config), path)


def run_report(
    run: RunDirectory,
    metrics: Sequence[Mapping[str, Any]],
    rows: Sequence[HeldOutResult],
    config: str,
) -> Report:
    """Return the report of a run's values."""
    found = load_yaml(config)
    recipe: Mapping[str, Any] = found if isinstance(found, dict) else {}
    steps = metrics[-1]["step"] if metrics else 0
    total = _setting(recipe, "training", "max_steps") or steps
    finished = run.finished_step is not None
    name = recipe.get("name", run.path.name)
    limit = _setting(recipe, "evaluation", "num_problems_at_intervals") or 0
    sections = [
        ReportSection("Results", [*_headline(rows), *_headline_steps(metrics)]),
        ReportSection(
            "Reward and length", _charts(metrics, _MAIN) + _accuracy(metrics, rows, limit)
        ),
        ReportSection("Policy and loss", _charts(metrics, _POLICY)),
        ReportSection("By chunk index", _by_chunk(metrics)),
        ReportSection("Time", [_phases(metrics), *_charts(metrics, ("tokens_per_second",))]),
        ReportSection("Cost", _cost(recipe, metrics)),
        ReportSection("Traces", [_links(run.path)]),
    ]
    versions = run.path / "versions.json"
    details = {
        "configuration (config.yaml)": config,
        "versions (versions.json)": versions.read_text("utf-8") if versions.is_file() else "",
        "command to repeat the run": f"delethink train {run.path / 'config.yaml'} output=NEW",
    }
    status = f"finished after {steps} steps" if finished else f"step {steps} of {total}"
    return Report(f"Training run {name}", status, [s for s in sections if s.parts], details)


def _setting(recipe: Mapping[str, Any], section: str, key: str) -> int | None:
    """Return a number of the resolved recipe, if it is there."""
    values = recipe.get(section)
    value = values.get(key) if isinstance(values, dict) else None
    return value if isinstance(value, int) else None


def _headline(rows: Sequence[HeldOutResult]) -> list[ReportTable]:
    if not rows:
        return []
    columns = ("setting", "accuracy (95 %)", "thinking tokens", "chunks", "out of budget")
    return [
        ReportTable(
            f"{rows[0].num_problems} held-out problems",
            columns,
            [
                (
                    row.setting,
                    row.accuracy_text(" to "),
                    f"{row.thinking_tokens:,.0f}",
                    f"{row.chunks:.1f}",
                    f"{row.budget_share:.1%}",
                )
                for row in rows
            ],
        )
    ]


def _headline_steps(metrics: Sequence[Mapping[str, Any]]) -> list[ReportTable]:
    """Return first and last values of the main metrics."""
    rows = []
    for key in (*_MAIN, "entropy", "tokens_per_second"):
        _, values = _values(metrics, key)
        if values:
            few = max(1, min(5, len(values) // 4))
            rows.append((key, fmean(values[:few]), fmean(values[-few:]), _unit(key)))
    return [ReportTable("Training", ("metric", "first steps", "last steps", "unit"), rows)] * bool(
        rows
    )


def _values(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(line["step"], line.get(key)) for line in metrics]
    numbers = [(step, value) for step, value in found if isinstance(value, (int, float))]
    return [step for step, _ in numbers], [float(value) for _, value in numbers]


def _unit(key: str) -> str:
    metric = find_metric(key)
    return metric.unit if metric else ""


def _charts(metrics: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[Any]:
    charts = []
    for key in keys:
        steps, values = _values(metrics, key)
        if any(values):
            curve = ChartCurve(key, steps, values)
            charts.append(Chart(key, "step", _unit(key), [curve], smooth=True))
    return charts


def _accuracy(
    metrics: Sequence[Mapping[str, Any]], rows: Sequence[HeldOutResult], limit: int
) -> list[Any]:
    """Return held-out accuracy with Wilson's intervals."""
    steps, values = _values(metrics, "heldout_accuracy")
    if not values:
        return []
    number = max(1, min(limit, rows[0].num_problems) if rows else limit)
    intervals = [wilson(value * number, number) for value in values]
    curve = ChartCurve(
        "held-out", steps, values, [i[0] for i in intervals], [i[1] for i in intervals]
    )
    return [Chart("held-out accuracy, 95 % intervals", "step", "share of problems", [curve])]


def _by_chunk(metrics: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return metrics over the index of the chunk, of the first, middle and last steps."""
    lines = [line for line in metrics if isinstance(line.get("by_chunk"), dict)]
    if not lines:
        return []
    places = sorted({0, len(lines) // 2, len(lines) - 1})
    charts = []
    for key in _BY_CHUNK:
        curves = []
        for place in places:
            values = lines[place]["by_chunk"].get(key) or []
            curves.append(
                ChartCurve(f"step {lines[place]['step']}", range(1, len(values) + 1), values)
            )
        charts.append(Chart(f"{key} by chunk", "index of the chunk", _unit(key), curves))
    return charts


def _phases(metrics: Sequence[Mapping[str, Any]]) -> Chart:
    curves = [
        ChartCurve(phase.replace("_", " "), *_values(metrics, f"seconds_{phase}"))
        for phase in _PHASES
    ]
    return Chart("time of a step", "step", "s", curves, smooth=True)


def _cost(recipe: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the estimated FLOPs of the measured lengths, beside those of LongCoT."""
    steps, values = _values(metrics, "thinking_tokens")
    thinking, group = recipe.get("thinking"), _setting(recipe, "training", "num_generations")
    if not values or not isinstance(thinking, dict) or thinking.get("carryover") or not group:
        return []
    keys = ("context_size", "carryover_size", "max_chunks", "head_size", "head_outside")
    try:
        shape = model_shape(str(recipe["model"]))
        spec = ChunkSpec(**{key: thinking[key] for key in keys if thinking.get(key) is not None})
        cuts = {"Delethink": Cut.of(spec), "LongCoT": Cut.of(ChunkSpec.longcot(spec.budget))}
    except (DelethinkError, KeyError, TypeError, ValueError):
        return []  # a model without an estimate
    import numpy as np

    curves, rows = [], []
    for name, cut in cuts.items():
        flops = sampling_flops(shape, cut_traces(np.array(values), 1, cut, group))
        curves.append(ChartCurve(name, steps, [float(number) for number in flops]))
        rows.append((name, float(flops[-1])))
    seconds = sum(sum(_values(metrics, f"seconds_{phase}")[1]) for phase in _PHASES)
    return [
        f"All steps took {seconds:,.0f} s. FLOPs are estimates for the mean lengths of each step; "
        "LongCoT would think as long in one context.",
        ReportTable("Sampling of a trace, last step", ("mode", "estimated FLOPs"), rows),
        Chart("sampling, estimated", "step", "FLOPs per trace", curves),
    ]


def _links(path: Path) -> str:
    return (
        f"Every sampled trace is in traces/. Look at them with: delethink view {path} "
        "(addresses end with #trace?name=traces/step_000001.jsonl:1)"
    )


if __name__ == "__main__":
    guard_process()
    draw_run(Path(sys.argv[1]))
