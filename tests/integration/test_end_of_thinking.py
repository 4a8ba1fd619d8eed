"""Models with other marks of the end of thinking, through the commands; the weights are the toy's.

The toy writes ``</think>`` by the name of a token, so a copy with another name writes that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from marked_toys import make_marked_toy

from delethink.cli.main import main

pytestmark = pytest.mark.integration

TASK = ["--task", "automaton", "--task-arg", "min_steps=2", "--task-arg", "max_steps=4"]
SIZES = ["--mode", "delethink", "-C", "90", "--carryover-size", "45", "--head-size", "0"]
SAMPLING = ["--num-problems", "4", "-n", "1", "--no-curves", "engine=transformers"]
GRADERS = """
def last_answer(text, answer):
    return float(text.endswith(answer))


def only_some(text, answer):
    return None if answer.startswith("1") else float(text.partition("</think>")[2] == answer)
"""


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("toys")
    closed = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}#={% endif %}"
    return {
        "magistral": make_marked_toy(folder / "magistral", "[THINK]", "[/THINK]"),
        "silent": make_marked_toy(folder / "silent", "#", "="),
        "closed": make_marked_toy(folder / "closed", "#", "=", closed),
    }


def run(model: str, folder: Path, *options: str, chunks: str = "3") -> dict[str, Any]:
    command = ["eval", "-m", model, *TASK, *SIZES, *SAMPLING, "--max-chunks", chunks, "--json"]
    assert main([*command, "-o", str(folder), *options]) == 0
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def last(results: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = results["rows"][-1]
    return row


def test_a_mark_of_the_template_scores_like_the_usual_one(
    toys: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual, other = run("toy", tmp_path / "a"), run(toys["magistral"], tmp_path / "b")
    for key in ("avg", "maj_at", "thinking_tokens", "marked"):
        assert last(usual)[key] == last(other)[key]
    assert last(other)["avg"]["value"] == last(other)["marked"] == 1.0
    assert usual["end_of_thinking"] == {"toy": "</think>"}
    assert other["end_of_thinking"] == {toys["magistral"]: "[/THINK]"}
    assert "no trace wrote" not in capsys.readouterr().err


def test_a_model_that_shows_no_mark_is_hinted_at_and_takes_the_setting(
    toys: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "-m", toys["silent"]]) == 0
    said = capsys.readouterr().out
    assert "warning      thinking" in said
    assert "every reward is 0 until the model writes </think>" in said
    assert last(run(toys["silent"], tmp_path / "a"))["avg"]["value"] == 0.0
    hint = capsys.readouterr().err
    assert "no trace wrote </think>, the end of thinking (assumed: neither" in hint
    assert "--end-of-thinking, to its mark or null" in hint
    for i, options in enumerate((["--end-of-thinking", "="], ["--reward-arg", "end=="])):
        found = run(toys["silent"], tmp_path / f"b{i}", *options)
        assert last(found)["avg"]["value"] == last(found)["maj_at"]["1"]["value"] == 1.0
        assert found["end_of_thinking"] == {toys["silent"]: "="}
        assert "no trace wrote" not in capsys.readouterr().err


def test_without_a_mark_the_whole_output_is_graded(
    toys: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "graders_of_a_user.py").write_text(GRADERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = ["--reward", "graders_of_a_user:last_answer"]
    found = run(toys["silent"], tmp_path / "a", *reward, "--end-of-thinking", "null")
    assert last(found)["avg"]["value"] == last(found)["marked"] == 1.0
    assert found["end_of_thinking"] == {toys["silent"]: None}
    refused = ["eval", "-m", "toy", *TASK, *SIZES, *SAMPLING, "-o", str(tmp_path / "b")]
    assert main([*refused, "--end-of-thinking", "null", "--force-answer", "4"]) == 2
    assert "leave one of them out" in capsys.readouterr().err
    assert main([*refused, "--end-of-thinking", "none"]) == 2
    assert "Did you mean null" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_closed_template_is_refused_unless_nothing_looks_for_the_mark(
    toys: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "-m", toys["closed"], *TASK, *SIZES, *SAMPLING, "-o", str(tmp_path / "a")]
    assert main([*command, "--end-of-thinking", "="]) == 2
    assert "chat template ends with =: it closes the thinking" in capsys.readouterr().err
    for i, options in enumerate((["--end-of-thinking", "null"], ["--reward-arg", "end=null"])):
        assert run(toys["closed"], tmp_path / f"b{i}", *options)["end_of_thinking"] == {
            toys["closed"]: None
        }


def test_a_forced_answer_closes_with_the_mark(toys: dict[str, str], tmp_path: Path) -> None:
    options = ["--force-answer", "12"]
    usual = run("toy", tmp_path / "a", *options, chunks="1")
    other = run(toys["magistral"], tmp_path / "b", *options, chunks="1")
    assert last(usual)["forced"] == last(other)["forced"]
    assert last(usual)["avg"] == last(other)["avg"]


def test_another_mark_is_another_evaluation(
    toys: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(toys["magistral"], tmp_path / "a")
    command = ["eval", "-m", toys["magistral"], *TASK, *SIZES, *SAMPLING, "--max-chunks", "3"]
    resume = ["-o", str(tmp_path / "a"), "--resume", "--end-of-thinking", "</think>"]
    assert main([*command, *resume]) == 2
    assert 'end_of_thinking was {"' in capsys.readouterr().err


RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart" / "recipe.yaml"
SHORT = [
    "training.max_steps=2",
    "task.args.min_steps=2",
    "task.args.max_steps=3",
    "thinking.max_chunks=2",
    "evaluation.num_problems=8",
    "evaluation.every=1",
    "evaluation.num_problems_at_intervals=8",
    "training.per_device_train_batch_size=8",
    "training.gradient_accumulation_steps=1",
    "training.num_generations=4",
    "preflight=warn",
]


def train(folder: Path, *values: str) -> list[dict[str, Any]]:
    """Run a short training, and return the rows of its table."""
    assert main(["train", str(RECIPE), *SHORT, f"output={folder}", *values]) == 0
    rows: list[dict[str, Any]] = json.loads((folder / "table.json").read_text())
    return rows


@pytest.mark.slow
def test_training_counts_answers_without_a_grade_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "graders_of_a_user.py").write_text(GRADERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = "rewards={some: {reward: 'graders_of_a_user:only_some'}, exact: 1}"
    rows = train(tmp_path / "run", own)
    assert len(rows) == 4
    for row in rows:
        assert 0 < row["ungraded"] < row["num_problems"] == 8
        assert row["accuracy"] == 1.0  # the toy is right on problems that short
        assert row["unscored"] == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["heldout_accuracy"] == 1.0
    said = capsys.readouterr().out
    assert "traces have no grade (the reward some gave None) and are left out" in said


@pytest.mark.slow
def test_training_says_that_no_trace_ends_its_thinking(
    toys: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = train(tmp_path / "a", f"model={toys['silent']}")
    assert {row["marked"] for row in rows} == {0.0}
    assert capsys.readouterr().out.count("warning: no trace wrote </think>") == 1
    rows = train(tmp_path / "b", f"model={toys['silent']}", "task.end_of_thinking==")
    assert {row["accuracy"] for row in rows} == {1.0}
    assert "no trace wrote" not in capsys.readouterr().out
    assert "end_of_thinking: '='" in (tmp_path / "b" / "config.yaml").read_text()
