"""Evaluations on disk: continued from their folder alone, and compared with one another."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluation_fakes import GuessingPolicy, guessing_problems, opener

from delethink.carryover import LineBreak, SinkWindow, Tail
from delethink.chunking import ChunkSpec
from delethink.cli.eval_folders import continued_command, folder_to_continue, stored_command
from delethink.cli.main import main
from delethink.errors import ConfigError, RunDirectoryError
from delethink.evaluation.comparison import compare_evaluations, differences
from delethink.evaluation.probe import load_traces
from delethink.evaluation.results import AnalysisSettings
from delethink.evaluation.run import Evaluation, evaluate
from delethink.evaluation.settings import SamplingPlan, Setting, make_settings
from delethink.evaluation.stored import read_evaluation, thinking_lengths
from delethink.types import TraceStop

SPEC = ChunkSpec(20, 10, 3, head_size=0)


def write(path: Path, **changes: Any) -> Path:
    settings = make_settings(["guess"], ["delethink", "longcot"], [20], [10], [3], head_size=0)
    plan = SamplingPlan(3, temperature=1.0, seed=changes.pop("seed", 5))
    made = Evaluation(guessing_problems(changes.pop("problems", 12)), settings, plan)
    evaluate(replace(made, **changes), opener(GuessingPolicy()), path)
    return path


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        ChunkSpec(20, 10, 3, head_size=2, head_outside=True),
        ChunkSpec(20, 10, 3, carryover=Tail()),
        ChunkSpec(20, 10, 3, carryover=SinkWindow(num_sinks=4)),
        ChunkSpec(20, 10, 3, carryover=Tail(), boundary=LineBreak(within=8, text=", (\n")),
        ChunkSpec.longcot(40),
    ],
    ids=["tail", "head", "named", "arguments", "boundary", "longcot"],
)
def test_a_setting_is_read_back_as_it_was_written(spec: ChunkSpec) -> None:
    setting = Setting("m", "longcot" if spec.is_longcot else "delethink", spec, (spec.budget,))
    stored = json.loads(json.dumps(setting.as_dict()))
    found = Setting.from_dict(stored)
    assert found.key == setting.key
    assert found.as_dict() == setting.as_dict()
    assert found.spec.budget == spec.budget


def test_a_trace_with_early_boundaries_has_one_budget() -> None:
    bound = LineBreak(within=8)
    (setting,) = make_settings(["m"], ["delethink"], [20], [10], [9], boundary=bound)
    assert setting.budgets == (setting.spec.budget,)
    with pytest.raises(ConfigError, match="cannot be cut to a smaller budget"):
        make_settings(["m"], ["delethink"], [20], [10], [3, 9], boundary=bound)


def test_what_an_evaluation_keeps_of_its_command() -> None:
    given = ["-m", "toy", "-o", "out", "--resume", "--json", "-n", "3", "--output=x", "engine=vllm"]
    assert stored_command(given) == ["-m", "toy", "-n", "3", "engine=vllm"]


def test_an_evaluation_is_continued_from_its_folder_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", command=["-m", "toy", "--task", "t", "-n", "3"])
    continued = continued_command(folder, [str(folder), "-n", "8"])
    end = ["--resume", "-o", str(folder)]
    assert continued == ["-m", "toy", "--task", "t", "-n", "3", "-n", "8", *end]
    with pytest.raises(RunDirectoryError, match="does not know the command"):
        continued_command(write(tmp_path / "other"), [])


def arguments(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **({"values": [], "resume": False, "output": None, "preset": None} | given),
        **{name: None for name in ("model", "task") if name not in given},
    )


def test_the_folder_to_continue(tmp_path: Path) -> None:
    assert folder_to_continue(arguments(values=[str(tmp_path)])) == tmp_path
    assert folder_to_continue(arguments(resume=True, output="x")) == Path("x")
    assert folder_to_continue(arguments(resume=True, output="x", model=["toy"])) is None
    assert folder_to_continue(arguments(values=["engine=vllm"])) is None
    with pytest.raises(ConfigError, match="neither engine.key=value nor the folder"):
        folder_to_continue(arguments(values=["nope"]))


def test_two_evaluations_are_compared_on_the_same_problems(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b", seed=6)
    stored, results = compare_evaluations([first, second], AnalysisSettings())
    assert {row.model for row in results.rows} == {"a: guess", "b: guess"}
    assert {row.problems for row in results.rows} == {12}
    pairs = {(c.first, c.second) for c in results.comparisons}
    assert ("a: guess | longcot", "b: guess | longcot") in pairs
    assert differences(stored) == ["seed differs: a 5, b 6"]
    alone = read_evaluation(first)
    assert len(list(alone.records())) == 72


def test_the_comparison_equals_that_of_one_evaluation(tmp_path: Path) -> None:
    """An evaluation of both models in one folder pairs the same traces."""
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    _, results = compare_evaluations([first, second], AnalysisSettings())
    same = [c for c in results.comparisons if c.first.split("|")[1] == c.second.split("|")[1]]
    assert same
    assert all(c.difference.value == 0 for c in same)  # the same seeds give the same traces


def test_the_lengths_of_an_evaluation_are_those_of_longcot(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    stored = [json.loads(line) for line in (folder / "traces.jsonl").read_text().splitlines()]
    expected = [r["outcomes"][-1]["length"] for r in stored if "longcot" in r["setting"]]
    assert thinking_lengths(folder) == expected
    assert main(["cost", "--lengths", str(folder), "-C", "8", "--carryover-size", "4"]) == 0


def test_the_longcot_traces_of_an_evaluation_are_read_for_a_probe(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    traces = load_traces(folder)
    stored = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]
    expected = [s["output_ids"][0] for s in stored if "longcot" in s["setting"]]
    assert [list(trace.output_ids) for trace in traces] == expected
    assert all(len(trace.query_ids) for trace in traces)
    records = [json.loads(line) for line in (folder / "traces.jsonl").read_text().splitlines()]
    spent = [r["outcomes"][-1]["out_of_budget"] for r in records if "longcot" in r["setting"]]
    assert [trace.stop is TraceStop.BUDGET for trace in traces] == spent
    with pytest.raises(RunDirectoryError, match="has no tokens of guess"):
        load_traces(write(tmp_path / "b", keep_tokens=False))


def test_evaluations_of_other_problems_are_refused(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b", problems=9)
    with pytest.raises(ConfigError, match=r"their problems \(12 of \S+ and 9 of"):
        compare_evaluations([first, second], AnalysisSettings())
    with pytest.raises(ConfigError, match="at least two folders"):
        compare_evaluations([first], AnalysisSettings())
    with pytest.raises(ConfigError, match="named twice"):
        compare_evaluations([first, first], AnalysisSettings())
    with pytest.raises(RunDirectoryError, match="holds no evaluation"):
        compare_evaluations([first, tmp_path], AnalysisSettings())


@pytest.mark.parametrize(
    "damage",
    [
        {"settings": [{"model": "m"}]},
        {"settings": 3},
        {"samples": "many"},
        {"settings": [Setting("m", "delethink", SPEC, (20,)).as_dict() | {"carryover": "tale"}]},
        {"settings": [Setting("m", "delethink", SPEC, (20,)).as_dict() | {"carryover": "tail(("}]},
    ],
    ids=["missing", "type", "samples", "policy", "arguments"],
)
def test_damaged_settings_are_a_sentence(tmp_path: Path, damage: dict[str, Any]) -> None:
    path = write(tmp_path / "a") / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(RunDirectoryError, match=r"settings\.json"):
        read_evaluation(path.parent)
