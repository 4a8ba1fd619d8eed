"""Rows as other trainers keep them: conversations, nested answers, numbers, lists, odd files."""

from __future__ import annotations

import codecs
import gzip
import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from delethink.envs.dataset import BOXED, dataset_task
from delethink.envs.sources import read_rows
from delethink.errors import ConfigError
from delethink.registry import make_task
from delethink.rows import accepted_answers, read_question, value_at
from delethink.types import Problem

USER = {"role": "user", "content": "What is 2 + 2?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ASSISTANT = {"role": "assistant", "content": "4"}


def problems_of(tmp_path: Path, *rows: Any, **arguments: Any) -> list[Problem]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = dataset_task(str(file), heldout_share=1.0, **arguments)
    return list(task.heldout)


# The rows of well-known data sets, found without options.
KNOWN_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "verl": (
        {
            "data_source": "openai/gsm8k",
            "prompt": [USER],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "4"},
            "extra_info": {"split": "train", "index": 0, "answer": "2 + 2 = 4 #### 4"},
        },
        "4",
    ),
    "verl with a list in a text": (
        {"prompt": [USER], "reward_model": {"style": "rule", "ground_truth": '["4"]'}},
        "4",
    ),
    "Search-R1": (
        {"prompt": [USER], "reward_model": {"style": "rule", "ground_truth": {"target": ["4"]}}},
        "4",
    ),
    "verl saved as CSV": (
        {"prompt": json.dumps([USER]), "reward_model": '{"ground_truth": "4", "style": "rule"}'},
        "4",
    ),
    "TRL": ({"prompt": [USER], "solution": "\\boxed{4}"}, "\\boxed{4}"),
    "Tulu": ({"messages": [USER], "ground_truth": "4", "dataset": "gsm8k"}, "4"),
    "ShareGPT": ({"messages": [{"from": "human", "value": USER["content"]}], "answer": "4"}, "4"),
    "message with parts": (
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "What is 2 + 2?"}]}],
            "answer": "4",
        },
        "4",
    ),
    "one message": ({"prompt": USER, "answer": "4"}, "4"),
    "a list of each field": (
        {"prompt": {"role": ["user"], "content": [USER["content"]]}, "answer": "4"},
        "4",
    ),
    "columns of another row are null": (
        {"prompt": [USER | {"tool_calls": None, "name": None, "from": None}], "answer": "4"},
        "4",
    ),
}


@pytest.mark.parametrize("name", KNOWN_ROWS)
def test_conversations_are_used_as_they_stand(name: str, tmp_path: Path) -> None:
    row, answer = KNOWN_ROWS[name]
    (problem,) = problems_of(tmp_path, row)
    assert (problem.messages, problem.answer) == ([USER], answer)


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"problem": "2 + 2?", "expected_answer": "4"}, "4"),
        ({"question": "2 + 2?", "final_answer": "4"}, "4"),
        ({"question": "2 + 2?", "answer": "It is <<2+2=4>>4.\n#### 4"}, "4"),
        ({"question": "2 + 2?", "golden_answers": ["4"]}, "4"),
        ({"prompt": "2 + 2?", "label": "4"}, "4"),
        ({"prompt": "2 + 2?", "verification_info": '{"ground_truth": "4"}'}, "4"),
        ({"problem": "2 + 2?", "answer": 4, "solution": "The proof: ..."}, "4"),
        ({"problem": "2 + 2?", "answer": 4.0}, "4"),
    ],
)
def test_a_text_gets_the_template_and_its_answer_is_found(
    row: dict[str, Any], answer: str, tmp_path: Path
) -> None:
    (problem,) = problems_of(tmp_path, row)
    assert (problem.prompt, problem.answer) == (BOXED.replace("{problem}", "2 + 2?"), answer)


def test_the_columns_of_other_sets_in_a_mixture_are_empty(tmp_path: Path) -> None:
    rows = [
        {"problem": "1?", "answer": "1", "prompt": None, "reward_model": None},
        {"problem": None, "answer": None, "prompt": "2?", "reward_model": {"ground_truth": "2"}},
        {"problem": "", "answer": "", "prompt": "3?", "label": 3},
        {"problem": "4?", "answer": None, "solution": "Long steps."},
        {"problem": "5?", "solution": "5"},
    ]
    assert [problem.answer for problem in problems_of(tmp_path, *rows)] == ["1", "2", "3", "5"]
    found = problems_of(tmp_path, *rows[3:], answer_key="answer|solution")
    assert [problem.answer for problem in found] == ["Long steps.", "5"]


def test_earlier_messages_stay_before_the_last(tmp_path: Path) -> None:
    turns = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "And 3 + 3?"}]
    row = {"prompt": turns, "answer": 6}
    (problem,) = problems_of(tmp_path, row)
    assert problem.messages == turns
    assert problem.prompt == "And 3 + 3?"
    (problem,) = problems_of(tmp_path, row, system="Think.", template="{problem} Box it.")
    assert problem.messages == [
        {"role": "system", "content": "Think."},
        *turns[1:3],
        {"role": "user", "content": "And 3 + 3? Box it."},
    ]


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        ([USER, ASSISTANT], "must end with the user's message, got 'assistant'"),
        ([SYSTEM], "must end with the user's message, got 'system'"),
        ([{"role": "user", "content": None}], "a message needs a role and a text"),
        ([{"role": 3, "content": "x"}], "a message needs a role and a text"),
        (
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}],
            "only parts of type 'text' can be used, got 'image'",
        ),
        ("[{'role': 'user', 'content': 'x'}]", "as Python prints it"),
        ({"text": "x", "id": 1}, "with the keys text, id; name a text inside it"),
        (["x", "y"], "a text or a list of messages, got a list"),
        ([{"text": "x"}], "a text or a list of messages, got a list"),
    ],
)
def test_what_is_no_problem_is_refused_and_never_shown_as_python(
    problem: Any, text: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="row 1 of ") as caught:
        problems_of(tmp_path, {"prompt": problem, "answer": "4"})
    assert text in str(caught.value)


def test_empty_problems_are_counted_as_such(tmp_path: Path) -> None:
    rows = [{"prompt": p, "answer": 1} for p in (None, "", [], [USER | {"content": " "}])]
    rows += [{"prompt": "x", "answer": a} for a in (None, "", [], ["", None])]
    with pytest.raises(ConfigError, match="no problem left: 8 without_problem_or_answer"):
        problems_of(tmp_path, *rows)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("answer", 1),
        ("reward_model.ground_truth", "4"),
        ("reward_model.missing", None),
        ("models.Qwen-1.5B", 3),
        ("a.b", "a column with a dot"),
        ("turns.1.content", "second"),
        ("turns.2.content", None),
        ("turns.x", None),
        ("packed.gold.value", 7),
        ("text.gold", None),
        ("none.x", None),
        ("", None),
        (".", None),
    ],
)
def test_dotted_keys_lead_into_a_row(key: str, value: Any) -> None:
    row = {
        "answer": 1,
        "reward_model": {"ground_truth": "4"},
        "models": {"Qwen-1.5B": 3},
        "a.b": "a column with a dot",
        "turns": [{"content": "first"}, {"content": "second"}],
        "packed": '{"gold": {"value": 7}}',
        "text": "{gold}",
        "none": None,
    }
    found = value_at(row, key)
    assert (None if isinstance(found, object) and type(found) is object else found) == value


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        (204, ["204"]),
        (0, ["0"]),
        (-3, ["-3"]),
        (70.0, ["70"]),
        (0.25, ["0.25"]),
        (1e-07, ["0.0000001"]),
        (-0.0, ["0"]),
        (1e22, ["10000000000000000000000"]),
        (Decimal("5.00"), ["5"]),
        (True, ["True"]),
        (float("nan"), []),
        (None, []),
        (b"4", ["4"]),
        (" 070 ", ["070"]),
        (["1/2", "0.5"], ["1/2", "0.5"]),
        ([3, 3.0, "3"], ["3"]),
        (["x", "", None], ["x"]),
        ({"value": 4}, ["4"]),
        ({"text": ["a", "b"]}, ["a", "b"]),
        ('["24"]', ["24"]),
        ("['70']", ["70"]),
        ('["1", "2"]', ["1", "2"]),
        ("[1, 2]", ["[1, 2]"]),
        ("['a', 1]", ["['a', 1]"]),
        ("['a'", ["['a'"]),
        ("Six.\n#### 1,000 \n", ["1,000"]),
        ("#### 5", ["5"]),
        ("a #### b", ["a #### b"]),
    ],
)
def test_answers_are_texts_as_people_write_them(value: Any, answers: list[str]) -> None:
    assert list(accepted_answers(value, as_mathematics=True)) == answers


def test_a_list_as_text_is_an_answer_where_answers_are_no_formulas(tmp_path: Path) -> None:
    """The output of a program may be ``['a']``, which the answer ``a`` does not equal."""
    row = {"problem": "What does it print?", "answer": "['a']"}
    assert problems_of(tmp_path, row, reward="exact")[0].answer == "['a']"
    assert problems_of(tmp_path, row)[0].answer == "a"


def test_an_ambiguous_answer_names_its_keys(tmp_path: Path) -> None:
    row = {"prompt": [USER], "reward_model": {"ground_truth": {"target": 98, "numbers": [44, 19]}}}
    with pytest.raises(ConfigError, match="keys target, numbers; name one as answer_key="):
        problems_of(tmp_path, row)
    key = "reward_model.ground_truth.target"
    assert problems_of(tmp_path, row, answer_key=key)[0].answer == "98"
    with pytest.raises(ConfigError, match=r"Did you mean 'reward_model\.ground_truth'"):
        problems_of(tmp_path, row, answer_key="reward_model.ground_trut")


def test_several_accepted_answers_stand_in_the_metadata(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, {"question": "Half?", "answer": ["1/2", "0.5"]})
    assert (problem.answer, problem.accepted) == ("1/2", ("1/2", "0.5"))
    (problem,) = problems_of(tmp_path, {"question": "Half?", "answer": ["1/2"]})
    assert (problem.metadata, problem.accepted) == ({}, ("1/2",))


def test_metadata_of_that_name_may_hold_anything() -> None:
    for value in ("12", 12, None, [], {"a": 1}):
        assert Problem("q", "1", {"accepted_answers": value}).accepted == ("1",)


def test_rows_with_pictures_are_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"problem": f"{i}?", "answer": i, "image": image}
        for i, image in enumerate(["", None, "data:image/png;base64,AA", {"bytes": "AA"}])
    ]
    rows += [{"problem": "5?", "answer": 5, "images": images} for images in ([], ["a.png"])]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = dataset_task(str(file), heldout_share=0.0)
    assert (len(task.train), task.left_out) == (3, {"with_picture": 3})


def test_pass_rates_of_conversations_are_found(tmp_path: Path) -> None:
    rates = tmp_path / "rates.jsonl"
    lines = [{"prompt": [USER], "pass_rate": 0.5}, {"prompt": "3 + 3?", "pass_rate": 1}]
    rates.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [{"prompt": [SYSTEM, USER], "answer": 4}, {"prompt": "3 + 3?", "answer": 6}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"heldout_share": 0.0, "max_pass_rate": 0.9}
    task = dataset_task(str(file), pass_rates=str(rates), template="{problem}", **options)
    assert [problem.answer for problem in task.train] == ["4"]
    rows[0]["rates"] = {"Qwen-1.5B": 0.5}
    rows[1]["rates"] = {"Qwen-1.5B": 1}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = dataset_task(str(file), pass_rate_key="rates.Qwen-1.5B", **options)
    assert [problem.answer for problem in task.train] == ["4"]


def test_nothing_else_is_a_question() -> None:
    assert read_question(5).prompt == "5"  # type: ignore[union-attr]
    assert read_question("[{not JSON").prompt == "[{not JSON"  # type: ignore[union-attr]
    assert read_question(float("nan")) is None


# -- duplicates: what a reader would call the same -----------------------------------------------


@pytest.mark.parametrize(
    ("rows", "kept", "left_out"),
    [
        ([("ASCII code of A?", 65), ("ASCII code of a?", 97)], 2, {}),
        ([("Is A a vowel?", "yes"), ("Is a a vowel?", "yes")], 2, {}),
        ([("What is 3 mW in W?", "0.003"), ("What is 3 MW in W?", "3000000")], 2, {}),
        ([("Solve x + X = 2X", "x = X"), ("Solve x + x = 2x", "x = X")], 2, {}),
        ([("Upper case of ab?", "AB"), ("Upper case of aB?", "AB ")], 1, {"duplicates": 1}),
        ([("What is 1 + 1?", 2), ("what is  1 + 1?\n", "2")], 1, {"duplicates": 1}),
        ([("WHAT IS 1 + 1?", 2), ("What is 1 + 1?", 2.0)], 1, {"duplicates": 1}),
        ([("How many?", "070"), ("How many?", "70")], 1, {"duplicates": 1}),
        ([("x\u00b2 = 4", "2"), ("x2 = 4", "2")], 2, {}),
        ([("caf\u00e9?", "1"), ("cafe\u0301?", "1")], 1, {"duplicates": 1}),
        ([("Odd", 1), ("Odd ", 2), ("Even", 2)], 1, {"duplicates": 1, "contradictory": 1}),
        ([("Half?", ["1/2", "0.5"]), ("Half?", ["0.50", "1/2"])], 1, {"duplicates": 1}),
    ],
)
def test_duplicates_are_what_a_reader_calls_the_same(
    rows: list[tuple[str, Any]], kept: int, left_out: dict[str, int], tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in rows))
    task = dataset_task(str(file), heldout_share=0.0)
    assert (len(task.train), task.left_out) == (kept, left_out)


def test_conversations_with_another_beginning_are_different(tmp_path: Path) -> None:
    more = {"role": "user", "content": "And twice that?"}
    other = {"role": "user", "content": "What is 3 + 3?"}
    rows = [{"prompt": [first, ASSISTANT, more], "answer": 8} for first in (USER, other, USER)]
    assert len(problems_of(tmp_path, *rows)) == 2


def test_problems_alike_but_for_case_are_held_out_together(tmp_path: Path) -> None:
    rows = [{"problem": f"Code of {c}{i}?", "answer": f"{c}{i}"} for i in range(40) for c in "aA"]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = dataset_task(str(file), heldout_share=0.5)
    held = {problem.answer for problem in task.heldout}
    assert 0 < len(held) < 80
    assert {answer.lower() for answer in held} == {
        answer.lower() for answer in held if "A" in answer
    }


# -- files as editors, spreadsheets and other systems write them ---------------------------------

LINES = b'{"problem": "a", "answer": "1"}\n\n{"problem": "b", "answer": "2"}'
TABLE = b"problem,answer\na,1\n\nb,2"
LIST = b'[{"problem": "a", "answer": "1"}, {"problem": "b", "answer": "2"}]'


@pytest.mark.parametrize(
    ("name", "data"), [("x.jsonl", LINES), ("x.csv", TABLE), ("x.json", LIST), ("y.json", LINES)]
)
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("packed", [None, "named", "unnamed"])
def test_files_are_read_however_they_were_saved(
    name: str, data: bytes, marked: bool, end: bytes, packed: str | None, tmp_path: Path
) -> None:
    data = (codecs.BOM_UTF8 if marked else b"") + data.replace(b"\n", end)
    file = tmp_path / (f"{name}.gz" if packed == "named" else name)
    file.write_bytes(gzip.compress(data, mtime=0) if packed else data)
    rows = [{"problem": "a", "answer": "1"}, {"problem": "b", "answer": "2"}]
    assert read_rows(str(file), "train") == rows
    file.rename(file.with_name(file.name.replace(file.name[0], "train", 1)))
    assert read_rows(str(tmp_path), "train") == rows


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("x.csv", b"problem;answer\na;1\n", "separates its columns with ';'"),
        ("x.csv", b"problem\tanswer\na\t1\n", "separates its columns with '\\t'"),
        ("x.csv", b"problem,answer,answer\na,1,2\n", "has the column 'answer' twice"),
        ("x.jsonl", LINES.decode().encode("utf-16"), "no UTF-8"),
        ("x.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "cannot read"),
        ("x.jsonl.zst", LINES, "unknown suffix; allowed: .jsonl"),
        ("x.parquet.gz", LINES, "unknown suffix"),
    ],
)
def test_other_files_are_refused_with_what_to_do(
    name: str, data: bytes, text: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        dataset_task(str(tmp_path / name))
    assert text in str(caught.value)


def test_spaces_around_the_names_of_columns_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("problem, answer\n a ,1\n")
    (problem,) = dataset_task(str(tmp_path / "x.csv"), heldout_share=1.0).heldout
    assert problem.answer == "1"


# -- dates -------------------------------------------------------------------------------------


def test_problems_outside_a_window_of_dates_are_left_out(tmp_path: Path) -> None:
    days = ["2024-07-31T23:59:59", "2024-08-01", "2024-08-02T00:00:00", "2025-05-01T12:00:00"]
    rows = [{"problem": day, "answer": 1, "day": day} for day in days]
    for start, end, kept in (
        ("2024-08-01", "2024-08-02", 2),
        (date(2024, 8, 2), None, 2),  # as YAML reads it
        (None, "2024-07-31", 1),
        (None, None, 4),
    ):
        found = problems_of(tmp_path, *rows, date_key="day", start_date=start, end_date=end)
        assert len(found) == kept
    for given, text in (
        ({"start_date": "2024-08-01"}, "need date_key"),
        ({"date_key": "day", "start_date": "August"}, "start_date must be a date such as"),
        ({"date_key": "answer", "end_date": "2024-08-01"}, "answer must be a date such as"),
        ({"date_key": "dya", "end_date": "2024-08-01"}, "no column 'dya'. Did you mean 'day'"),
        ({"date_key": "day", "start_date": "2025-01-01", "end_date": "2024-01-01"}, "after end"),
    ):
        with pytest.raises(ConfigError) as caught:
            problems_of(tmp_path, *rows, **given)
        assert text in str(caught.value)


def test_release_6_of_livecodebench_has_its_months(hub_copy: Any) -> None:
    folder = hub_copy("livecodebench_v6")
    task = make_task("livecodebench_v6", {"dataset": folder}, 0)
    dates = [problem.metadata["contest_date"][:10] for problem in task.heldout]
    assert (dates, task.left_out) == (["2024-08-01", "2025-04-06"], {"outside_dates": 2})
    assert make_task("livecodebench", {"dataset": folder}, 0).size("heldout") == 4
    paper = {"start_date": "2024-08-01", "end_date": "2025-02-01"}
    assert make_task("livecodebench", {"dataset": folder, **paper}, 0).size("heldout") == 1
