"""The report of an evaluation that goes on, drawn from its folder by another process."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from delethink.errors import RunDirectoryError
from delethink.evaluation.curves import AXES, KINDS, curve_points
from delethink.evaluation.page import evaluation_report
from delethink.evaluation.records import ResultsDirectory
from delethink.evaluation.results import AnalysisSettings, summarise
from delethink.evaluation.settings import Setting
from delethink.json_io import as_mapping, get_count, get_list, read_json
from delethink.output import guard_process
from delethink.report_page import write_report


def draw_evaluation(folder: Path) -> Path:
    """Write ``report.html`` of the records so far, and return its path.

    Raises:
        RunDirectoryError: a file of the evaluation is damaged.
        OSError: the report cannot be written.
    """
    values = as_mapping(read_json(folder / "settings.json", RunDirectoryError), "settings.json")
    settings = [Setting.from_dict(one) for one in get_list(values, "settings")]
    budgets = {setting.key: setting.budgets for setting in settings}
    records = [
        record
        for record in ResultsDirectory(folder).read()
        if record.key.setting in budgets
        and (
            record.error is not None
            or tuple(outcome.budget for outcome in record.outcomes) == budgets[record.key.setting]
        )
    ]
    results = summarise(settings, records, AnalysisSettings())
    points = curve_points(results.rows)
    total = len(settings) * get_count(values, "problems") * get_count(values, "samples")
    done = len({record.key for record in records})
    report = evaluation_report(results, points, AXES, KINDS, values, folder)
    status = f"{done:,} of {total:,} traces so far; {report.status}"
    return write_report(replace(report, status=status), folder)


if __name__ == "__main__":
    guard_process()
    draw_evaluation(Path(sys.argv[1]))
