"""The command ``delethink tasks``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from delethink.cli.main import main

AUTOMATON = ["tasks", "automaton", "min_steps=2", "max_steps=4"]


@pytest.fixture
def file(tmp_path: Path) -> str:
    rows = [{"question": f"{i}?", "gold": str(i)} for i in range(300)] + [{"question": "?"}]
    rows[-1]["gold"] = ""
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_it_lists_tasks_and_rewards(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "MATH-500" in report["tasks"]["math_500"]
    assert all(report["rewards"].values())
    assert main(["tasks"]) == 0
    assert "reasoning_gym" in capsys.readouterr().out


def test_it_shows_problems_and_checks_the_grader(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*AUTOMATON, "-n", "2"]) == 0
    printed = capsys.readouterr().out
    assert "--- train 1" in printed
    assert "8 gold and 8 wrong answers of 8 problems, 0 not scored as expected" in printed


def test_columns_are_named_as_options(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--dataset", file, "--problem-key", "question", "--answer-key", "gold"]
    assert main(["tasks", "dataset", *given, "reward=normalized", "--json", "--of", "heldout"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sum(report["sizes"].values()) == 300
    assert report["left_out"] == {"without_problem_or_answer": 1}
    assert report["rewards"] == {"normalized": 1.0}
    assert report["problems"][0]["prompt"].startswith("[user]\n")
    assert report["check"]["failures"] == []


def test_a_grader_that_rejects_gold_answers_fails(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--dataset", file, "--problem-key", "question", "--answer-key", "gold"]
    assert main(["tasks", "dataset", *given, "reward=exact"]) == 1
    assert "8 not scored as expected" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["automatn"], "Did you mean 'automaton'"),
        (["automaton", "min_steps=x"], "needs 'max_steps'"),
        (["automaton", "min_steps=2", "max_steps=1"], "min_steps <= max_steps"),
        (
            ["automaton", "min_steps=2", "max_steps=4", "--dataset", "x"],
            "has no parameter 'dataset'",
        ),
        (["dataset"], "must have 'dataset'"),
        (["dataset", "--dataset", "./none.jsonl"], "no such file"),
        ([*AUTOMATON[1:], "--model", "./none"], "the model folder none does not exist"),
        (["automaton", "words"], "dotted.key=value"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tasks", *arguments]) == 2
    printed = capsys.readouterr().err.strip()
    assert text in printed
    assert "\n" not in printed


@pytest.mark.parametrize("arguments", [["automaton", "--nonsense"], ["-n", "-1"], ["--of", "x"]])
def test_unknown_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["tasks", *arguments])
    assert caught.value.code == 2
