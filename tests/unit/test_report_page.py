"""A report is one page that works offline, with scripts by hash and texts that stay texts."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from pathlib import Path

import pytest
from evaluation_fakes import GuessingPolicy, guessing_problems, opener
from installed import need

need("bokeh")

from delethink.evaluation.live import draw_evaluation  # noqa: E402
from delethink.evaluation.run import Evaluation, evaluate  # noqa: E402
from delethink.evaluation.settings import SamplingPlan, make_settings  # noqa: E402
from delethink.report_page import (  # noqa: E402
    Chart,
    ChartCurve,
    Report,
    ReportSection,
    ReportTable,
    report_html,
    write_report,
)
from delethink.report_process import UPDATE_INTERVAL_S  # noqa: E402
from delethink.training.report import RunReport, draw_run  # noqa: E402
from delethink.training.run_directory import RunDirectory  # noqa: E402

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[2J\u202e"


def a_report(text: str = "plain") -> Report:
    chart = Chart(
        text,
        "step",
        text,
        [
            ChartCurve(text, [1, 2, 3], [0.1, 0.2, None]),
            ChartCurve("b", [1, 2], [1, 2], [0, 1], [2, 3]),
        ],
    )
    table = ReportTable(text, (text, "b"), [(text, 1.5), ("x", None)])
    return Report(text, text, [ReportSection(text, [chart, table, text])], {text: text})


def parts(page: str) -> tuple[str, list[str], str]:
    """Policy, scripts that run, and everything else."""
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    return policy[1], scripts, re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def test_only_the_two_scripts_of_the_page_may_run() -> None:
    policy, scripts, rest = parts(report_html(a_report()))
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert re.findall(r'(?:src|href)="', rest) == []


def test_texts_of_a_report_are_not_live() -> None:
    _, scripts, rest = parts(report_html(a_report(ATTACK)))
    assert len(scripts) == 2
    assert "alert(1)</script>" not in rest
    assert "<img" not in rest
    assert "\x1b" not in rest
    assert "\u202e" not in rest


def test_a_page_fits_the_limit_and_has_its_values() -> None:
    page = report_html(a_report())
    assert len(page) < 5e6
    data = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page)
    assert data is not None
    assert json.loads(data[1])[0]["target_id"] == "chart-0"
    assert "<td>1.5</td>" in page
    assert "<td>none</td>" in page


def test_a_page_without_charts_allows_no_script() -> None:
    policy, scripts, _ = parts(report_html(Report("t", "s", [ReportSection("a", ["text"])])))
    assert scripts == []
    assert "script-src 'none'" in policy


def test_a_long_curve_is_averaged_in_bins_and_gaps_are_left_out() -> None:
    curve = ChartCurve("a", range(5000), [float(i) for i in range(5000)])
    assert len(curve.points) == 1000
    assert curve.points[0] == (2.0, 2.0, 2.0, 2.0)
    assert ChartCurve("a", [1, 2, 3], [None, math.nan, 3.0]).points == [(3.0, 3.0, 3.0, 3.0)]


def test_a_report_is_replaced_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    write_report(a_report(), tmp_path)
    first = (tmp_path / "report.html").read_text()
    (tmp_path / "report.html.part").mkdir()  # in the way
    with pytest.raises(OSError, match="report.html.part"):
        write_report(a_report("other"), tmp_path)
    assert (tmp_path / "report.html").read_text() == first


def a_run(path: Path) -> RunDirectory:
    config = "name: mine\nmodel: toy\ntraining: {max_steps: 9, num_generations: 4}\n"
    config += "thinking: {context_size: 90, carryover_size: 45, max_chunks: 9, head_size: 0}\n"
    run = RunDirectory.create(path / "run", config)
    for step in range(1, 4):
        values = {"reward": 0.1 * step, "thinking_tokens": 300.0, "chunks": 6.0, "entropy": 0.01}
        by_chunk = {"by_chunk": {"entropy": [0.1, 0.2]}, "seconds_sampling": 1.0}
        run.add_metrics({"step": step, **values, **by_chunk, "heldout_accuracy": None})
    return run


def test_the_report_of_a_run_that_goes_on_says_how_far(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    page = draw_run(run.path).read_text()
    for text in ("Training run mine", "step 3 of 9", "entropy by chunk", "estimated FLOPs",
                 "delethink train", "LongCoT"):  # fmt: skip
        assert text in page, text
    run.finish(3)
    assert "finished after 3 steps" in draw_run(run.path).read_text()


def test_a_report_that_cannot_be_drawn_is_a_line_and_no_error(tmp_path: Path) -> None:
    run, said = a_run(tmp_path), []
    (run.path / "metrics.jsonl").write_text("{broken\n\n{}\n")
    RunReport(run.path, said.append).finish()
    assert len(said) == 1
    assert "report.html cannot be drawn" in said[0]


def test_a_run_without_results_gets_no_report(tmp_path: Path) -> None:
    RunReport(tmp_path, print).finish()
    assert list(tmp_path.iterdir()) == []


def test_another_process_updates_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = a_run(tmp_path), []
    report = RunReport(run.path, said.append)
    report.update()  # too early
    assert report.process.wait(0) is None
    monkeypatch.setattr("time.monotonic", lambda: 1e9 + UPDATE_INTERVAL_S)
    report.update()
    monkeypatch.undo()
    assert report.process.wait(120) == 0
    assert "step 3 of 9" in (run.path / "report.html").read_text()
    assert said == []


def test_an_evaluation_that_goes_on_has_a_report(tmp_path: Path) -> None:
    settings = make_settings(["guess"], ["delethink", "longcot"], [20], [10], (3,), head_size=0)
    evaluation = Evaluation(guessing_problems(4), settings, SamplingPlan(2, seed=5))
    evaluate(evaluation, opener(GuessingPolicy()), tmp_path / "out")
    file = tmp_path / "out/traces.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-3]) + lines[-3][:20])  # as a run leaves it midway
    page = draw_evaluation(tmp_path / "out").read_text()
    assert "13 of 16 traces so far" in page
    assert "guess | longcot" in page
    assert "pass@k" in page


def test_a_full_disk_leaves_no_part_of_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, *args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_report(a_report(), tmp_path)
    assert list(tmp_path.iterdir()) == []
