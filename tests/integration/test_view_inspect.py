"""An exported log is read by Inspect itself, with a message for each chunk and boundary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluation_fakes import GuessingPolicy, guessing_problems, opener

from delethink import Chunk, Problem, Trace
from delethink.cli.main import main
from delethink.evaluation.run import Evaluation, evaluate
from delethink.evaluation.settings import SamplingPlan, make_settings
from delethink.trace_io import TraceRecord
from delethink.types import StopReason, TraceStop

pytestmark = pytest.mark.slow  # Inspect takes long to load, and is not among the tests' packages


def test_inspect_reads_the_exported_log(tmp_path: Path) -> None:
    log = pytest.importorskip("inspect_ai.log", reason="pip install -e '.[inspect]'")
    chunks = (
        Chunk((8, 6), (6, 7, 6, 7), (-0.1,) * 4, StopReason.LENGTH),
        Chunk((8, 6, 6, 7), (7, 7), (-0.1,) * 2, StopReason.EOS, 2),
    )
    records = [
        TraceRecord(Problem("p\x1b[2J", "01"), Trace((8, 6), chunks, TraceStop.COMPLETED),
                    {"exact": reward}, reward=reward)
        for reward in (0.0, 1.0, None)
    ]  # fmt: skip
    (tmp_path / "traces").mkdir()
    (tmp_path / "config.yaml").write_text("model: toy\n")
    file = tmp_path / "traces/step_000001.jsonl"
    file.write_text("".join(json.dumps(record.to_json()) + "\n" for record in records))
    out = tmp_path / "x.eval"
    assert main(["view", str(tmp_path), "--export", str(out)]) == 0
    read = log.read_eval_log(str(out))
    assert read.status == "success"
    assert read.eval.model == "toy"
    assert read.results.scores[0].metrics["mean"].value == 0.5
    assert len(read.samples) == 3
    sample = read.samples[0]
    assert sample.input == "p\\x1b[2J"
    assert sample.scores["reward"].value == 0.0
    assert [message.role for message in sample.messages] == [
        "user",
        "assistant",
        "user",  # Inspect moves messages of the system to the top
        "assistant",
    ]
    boundary = sample.messages[2]
    assert boundary.content.startswith("✂ context reset: 2 tokens dropped, 2 carried over")
    assert boundary.metadata == {"boundary": True, "carried": 2, "dropped": 2}
    assert sample.messages[3].metadata["chunk"] == 2
    assert [event.event for event in sample.events] == ["model", "info", "model"]
    assert len(sample.events[2].input) == 2  # the query, and what was carried
    assert sample.model_usage["toy"].output_tokens == 6
    assert sample.scores["reward"].explanation == "completed, 2 chunks, 6 sampled tokens"


def test_an_evaluation_has_a_mean_for_each_setting(tmp_path: Path) -> None:
    log = pytest.importorskip("inspect_ai.log", reason="pip install -e '.[inspect]'")
    settings = make_settings(["guess"], ["delethink", "longcot"], [20], [10], (4,), head_size=3)
    plan = SamplingPlan(3, temperature=1.0, seed=5)
    evaluation = Evaluation(guessing_problems(4), settings, plan)
    evaluate(evaluation, opener(GuessingPolicy()), tmp_path / "ev")
    out = tmp_path / "x.eval"
    assert main(["view", str(tmp_path / "ev"), "--export", str(out)]) == 0
    read = log.read_eval_log(str(out))
    assert len(read.results.scores[0].metrics) == 2
    assert len(read.samples) == 2 * 4 * 3
    assert read.eval.config.epochs == 3
    assert read.eval.dataset.samples == 2 * 4
    assert read.samples[0].id.startswith("problem ")


def test_without_inspect_the_command_to_install_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "inspect_ai", None)
    record = TraceRecord(Problem("p", "a"), Trace((1,), (Chunk((1,), (2,), (), StopReason.EOS),),
                                                  TraceStop.COMPLETED))  # fmt: skip
    (tmp_path / "a.jsonl").write_text(json.dumps(record.to_json()) + "\n")
    out = str(tmp_path / "x.eval")
    assert main(["view", str(tmp_path / "a.jsonl"), "--export", out]) == 2
    assert "pip install -e '.[inspect]'" in capsys.readouterr().err
