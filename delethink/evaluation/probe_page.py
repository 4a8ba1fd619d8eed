"""The report of a probe: what ``report.html`` shows."""

from __future__ import annotations

from pathlib import Path

from delethink.evaluation.page import installed_versions, try_report
from delethink.evaluation.probe import CONDITIONS, Findings, TraceMean
from delethink.report_page import Chart, ChartCurve, Report, ReportSection, ReportTable

_BOUND = 1e300  # an interval without an end


def write_probe_report(findings: Findings, folder: Path) -> None:
    """Write ``report.html`` of a probe with boundaries; a failure is a warning."""
    if findings.lines:
        try_report(probe_report(findings, folder), folder)


def probe_report(findings: Findings, folder: Path) -> Report:
    """Return the report of a probe in a folder."""
    rows = [
        (
            f"{line.carryover_size:,}",
            CONDITIONS[line.condition],
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
        ReportSection("Cost of a reset", [table] if rows else []),
        ReportSection("By distance from the boundary", _distances(findings)),
        ReportSection(
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
    details = {"versions": installed_versions(), "all numbers": f"{folder / 'probe.json'}"}
    found = [section for section in sections if section.parts]
    return Report(f"How Markovian is {findings.model}?", status, found, details)


def _distances(findings: Findings) -> list[Chart]:
    binned = [line for line in findings.lines if line not in findings.totals]
    charts = []
    for name, label in (("gap", "loss of log-likelihood"), ("divergence", "KL")):
        curves = []
        for size, condition in dict.fromkeys((b.carryover_size, b.condition) for b in binned):
            own = [b for b in binned if (b.carryover_size, b.condition) == (size, condition)]
            means = [getattr(line, name) for line in own]
            ends = [max(-_BOUND, mean.low) > -_BOUND and mean.high < _BOUND for mean in means]
            curves.append(
                ChartCurve(
                    f"m = {size:,}, {CONDITIONS[condition]}",
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
