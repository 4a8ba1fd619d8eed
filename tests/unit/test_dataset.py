"""Tasks out of files: every schema of the hub that a preset reads, written small by the test."""

from __future__ import annotations

import base64
import csv
import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from delethink.envs.dataset import BOXED, dataset_task
from delethink.envs.presets import _unpack
from delethink.envs.sources import read_rows
from delethink.errors import ConfigError
from delethink.registry import make_task
from delethink.tasks import demonstrations_of, left_out_of, rewards_of, select_problems, task_size
from delethink.types import Problem

HubCopy = Callable[[str], str]
PRESETS = [
    "deepscaler",
    "openmath",
    "math_500",
    "aime_2024",
    "aime_2025",
    "aime_2026",
    "hmmt_2025",
    "hmmt_nov_2025",
    "hmmt_feb_2026",
    "beyond_aime",
    "imo_answerbench",
    "gpqa_diamond",
    "supergpqa",
    "livecodebench",
    "livecodebench_v6",
    "crosswordbench",
]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbers(n: int, **extra: Any) -> list[dict[str, Any]]:
    return [{"problem": f"What is {i} + {i}?", "answer": str(2 * i)} | extra for i in range(n)]


@pytest.fixture
def file(tmp_path: Path) -> str:
    return write_lines(tmp_path / "train.jsonl", numbers(200))


def test_a_problem_is_asked_with_its_template(file: str) -> None:
    task = dataset_task(file, template="Q: {problem}\nA:", system="Be brief.")
    problem = task.problem("train", 0)
    assert problem.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": problem.prompt},
    ]
    assert problem.prompt.startswith("Q: What is ")
    assert dataset_task(file).problem("train", 0).prompt.endswith(BOXED[len("{problem}") :])


def test_braces_and_percent_signs_in_a_problem_are_left_alone(tmp_path: Path) -> None:
    rows = [{"problem": "{x} 50% {problem} \\frac{1}{2}", "answer": "1"}]
    task = dataset_task(write_lines(tmp_path / "a.jsonl", rows), heldout_share=0.0)
    assert task.problem("train", 0).prompt.startswith("{x} 50% {problem} \\frac{1}{2}\n")


def test_problems_are_fixed_by_seed_split_and_index(file: str) -> None:
    first, again, other = (dataset_task(file, seed=seed) for seed in (0, 0, 1))
    prompts = [first.problem("train", i).prompt for i in range(50)]
    assert prompts == [again.problem("train", i).prompt for i in range(50)]
    assert prompts != [other.problem("train", i).prompt for i in range(50)]


def test_an_epoch_has_every_problem_once_and_the_next_another_order(file: str) -> None:
    task = dataset_task(file)
    size = task.size("train")
    first = [task.problem("train", i).prompt for i in range(size)]
    second = [task.problem("train", i).prompt for i in range(size, 2 * size)]
    assert sorted(first) == sorted(second)
    assert first != second
    assert len(set(first)) == size


def test_what_is_held_out_is_the_same_for_ever_and_not_in_training(file: str) -> None:
    task, other = (
        dataset_task(file, heldout_share=0.3),
        dataset_task(file, heldout_share=0.3, seed=5),
    )
    heldout = {p.prompt for p in task.heldout}
    assert heldout == {p.prompt for p in other.heldout}
    assert not heldout & {p.prompt for p in task.train}
    assert 30 < len(heldout) < 90
    assert task.size("train") + task.size("heldout") == 200


def test_a_problem_that_is_also_held_out_leaves_training(tmp_path: Path, file: str) -> None:
    held = write_lines(tmp_path / "test.jsonl", numbers(10))
    task = dataset_task(file, eval_dataset=held)
    assert (task.size("train"), task.size("heldout")) == (190, 10)
    assert task.left_out == {"also_heldout": 10}


def test_an_evaluation_split_of_the_same_folder(tmp_path: Path) -> None:
    write_lines(tmp_path / "data" / "train-00000.jsonl", numbers(30)[10:])
    write_lines(tmp_path / "data" / "test-00000.jsonl", numbers(10))
    task = dataset_task(str(tmp_path), eval_split="test")
    assert (task.size("train"), task.size("heldout")) == (20, 10)


def test_files_below_a_cache_of_the_folder_are_no_data(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "copy"  # the folder itself may be in a cache
    write_lines(folder / "train.jsonl", numbers(3))
    write_lines(folder / ".cache" / "train.jsonl", numbers(5))
    assert len(read_rows(str(folder), "train")) == 3


def test_doubles_contradictions_and_gaps_are_counted(tmp_path: Path) -> None:
    rows = [
        *numbers(3),
        {"problem": "what is 1 +  1?", "answer": "2"},
        {"problem": "odd", "answer": "1"},
        {"problem": "odd", "answer": "2"},
        {"problem": " ", "answer": "2"},
        {"problem": "no answer", "answer": None},
    ]
    task = dataset_task(write_lines(tmp_path / "a.jsonl", rows), heldout_share=0.0)
    assert sorted(p.answer for p in task.train) == ["0", "2", "4"]
    assert left_out_of(task) == {
        "duplicates": 2,
        "without_problem_or_answer": 2,
        "contradictory": 1,
    }


def test_difficulty_by_a_measured_pass_rate_in_a_column(tmp_path: Path) -> None:
    rows = [row | {"rate": i / 10} for i, row in enumerate(numbers(10))]
    rows[3]["rate"] = None
    path = write_lines(tmp_path / "a.jsonl", rows)
    task = dataset_task(
        path, pass_rate_key="rate", min_pass_rate=0.2, max_pass_rate=0.7, heldout_share=0.0
    )
    assert sorted(int(p.answer) // 2 for p in task.train) == [2, 4, 5, 6, 7]
    assert task.left_out == {"pass_rate_unknown": 1, "pass_rate_out_of_range": 4}
    assert task.problem("train", 0).metadata == {}


def test_difficulty_by_the_traces_of_an_earlier_run(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", numbers(3))
    asked = dataset_task(path, heldout_share=0.0).train
    lines = [
        {"prompt": p.prompt, "rewards": {"math": float(n < i)}}
        for i, p in enumerate(sorted(asked, key=lambda p: int(p.answer)))
        for n in range(2)
    ]
    lines.append({"prompt": asked[0].prompt, "rewards": {"math": None}})  # one that failed
    traces = write_lines(tmp_path / "traces" / "step_000001.jsonl", lines)
    task = dataset_task(
        path, pass_rates=traces, min_pass_rate=0.1, max_pass_rate=0.9, heldout_share=0.0
    )
    assert [p.answer for p in task.train] == ["2"]
    assert task.left_out == {"pass_rate_out_of_range": 2}


def test_over_long_queries_are_counted(file: str) -> None:
    task = dataset_task(file, template="{problem}")
    taken = select_problems(task, "train", 20, lambda p: len(p.prompt), max_query_tokens=14)
    assert len(taken.problems) == 20
    assert taken.overlong > 0
    assert taken.longest > 14
    assert all(len(p.prompt) <= 14 for p in taken.problems)
    with pytest.raises(ConfigError, match="query of at most 3 tokens"):
        select_problems(task, "train", 20, lambda p: len(p.prompt), max_query_tokens=3)


def test_more_held_out_problems_than_there_are_is_refused(file: str) -> None:
    task = make_task("math_500", {"dataset": file}, 0)
    assert len(select_problems(task, "heldout", 200).problems) == 200
    with pytest.raises(ConfigError, match=r"evaluation\.num_problems=200"):
        select_problems(task, "heldout", 201)
    with pytest.raises(ConfigError, match="no training problems"):
        select_problems(task, "train", 1)


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    rows = numbers(3)
    lines = write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_text(json.dumps({"data": rows}))
    write_lines(tmp_path / "d.json", rows)
    with (tmp_path / "e.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for name in ("a.jsonl", "b.json", "c.json", "d.json", "e.csv"):
        assert read_rows(str(tmp_path / name), "train") == rows
    assert read_rows(lines, "any split") == rows


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    rows = numbers(3)
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
    assert read_rows(str(tmp_path), "train") == rows
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match="is not Parquet"):
        read_rows(str(tmp_path / "bad.parquet"), "train")


def test_structures_of_parquet_are_conversations_and_nested_answers(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    user = {"role": "user", "content": "What is 1 + 1?"}
    rows = [
        {"prompt": [user], "reward_model": {"ground_truth": "2"}, "extra": {"level": 1}},
        {"prompt": [user | {"name": "x"}], "reward_model": {"ground_truth": None}},
        {"prompt": None, "reward_model": None},
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    task = dataset_task(str(tmp_path), heldout_share=1.0, metadata_keys=["extra.level"])
    assert task.heldout == [Problem("What is 1 + 1?", "2", {"extra.level": 1})]
    assert task.left_out == {"without_problem_or_answer": 2}


def broken_json(folder: Path) -> dict[str, Any]:
    (folder / "a.jsonl").write_text('{"problem": "1"}\n{"problem": \n')
    return {"dataset": str(folder / "a.jsonl")}


def not_objects(folder: Path) -> dict[str, Any]:
    (folder / "a.jsonl").write_text("[1]\n")
    return {"dataset": str(folder / "a.jsonl")}


def not_text(folder: Path) -> dict[str, Any]:
    (folder / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    return {"dataset": str(folder / "a.jsonl")}


def nothing_left(folder: Path) -> dict[str, Any]:
    return {"dataset": write_lines(folder / "a.jsonl", [{"problem": "", "answer": ""}])}


def good(folder: Path, **extra: Any) -> dict[str, Any]:
    return {"dataset": write_lines(folder / "a.jsonl", numbers(2))} | extra


def odd_columns(folder: Path) -> dict[str, Any]:
    """A file whose columns have none of the usual names."""
    return {"dataset": write_lines(folder / "a.jsonl", [{"asked": "1 + 1", "result": 2}])}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (broken_json, "line 2 is not JSON"),
        (not_objects, "must be an object, got list"),
        (not_text, "no UTF-8"),
        (nothing_left, "no problem left: 1 without_problem_or_answer"),
        (lambda f: {}, "must have 'dataset'"),
        (lambda f: {"dataset": str(f / "none.jsonl")}, "no such file"),
        (lambda f: {"dataset": str(f)}, "no file of the split 'train'"),
        (lambda f: good(f, problem_key="problm"), "no column 'problm'. Did you mean 'problem'"),
        (lambda f: good(f, answer_key="x|y"), "no column 'x or y'"),
        (lambda f: good(f, answer_key="x|y"), "task.args.answer_key in a recipe, --task-arg"),
        (
            lambda f: odd_columns(f),
            "(problem, prompt, question, messages), only: asked, result.",
        ),
        (lambda f: odd_columns(f), "--task-arg problem_key=NAME in eval"),
        (lambda f: good(f, template="Solve."), "must contain {problem}"),
        (lambda f: good(f, template="{problem}\\n\\nSolve."), "double quotes"),
        (lambda f: good(f, heldout_share=1.5), "heldout_share"),
        (lambda f: good(f, min_pass_rate=0.5), "need measured rates"),
        (lambda f: good(f, min_pass_rate=0.5, max_pass_rate=0.1), "0 <= min_pass_rate"),
        (lambda f: good(f, pass_rate_key="rat"), "no column 'rat'"),
        (lambda f: good(f, pass_rates=str(f / "a.jsonl")), "is not a file of pass rates"),
        (lambda f: good(f, tempate="x"), "Did you mean 'template'"),
        (lambda f: good(f, split="test"), "split=test has no effect"),
        (lambda f: good(f, eval_split="test"), "eval_split=test has no effect"),
        (lambda f: good(f, files="*.jsonl"), "is one file; remove it"),
        (lambda f: good(f, problem_key=3), "problem_key must be a text, got 3"),
        (lambda f: good(f, reward=3), "reward must be a text, got 3; put it in quotes"),
        (lambda f: good(f, heldout_share="a"), "heldout_share must be a number, got 'a'"),
        (lambda f: good(f, metadata_keys=3), "metadata_keys must be a list of columns, got 3"),
        (lambda f: good(f, metadata_keys="answer, x"), "no column 'x'"),
        (lambda f: good(f, template={"a": "b"}), "template must be a text"),
    ],
)
def test_mistakes_are_explained(
    tmp_path: Path, make: Callable[[Path], dict[str, Any]], text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_task("dataset", make(tmp_path), 0)
    assert text in str(caught.value)


def test_what_the_hub_has_is_fetched_or_said_how(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*args: Any, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConfigError) as caught:
        make_task("aime_2025", {}, 0)
    said = str(caught.value)
    assert "hf download --repo-type dataset MathArena/aime_2025 --local-dir FOLDER" in said
    assert "task.args.dataset=FOLDER" in said
    with pytest.raises(ConfigError, match=r"--include 'test\*\.jsonl'"):
        make_task("livecodebench", {}, 0)


def test_rows_of_the_hub_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return datasets.Dataset.from_list(numbers(4))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **options: None)
    assert make_task("hmmt_2025", {}, 0).size("heldout") == 4
    assert asked == [(("MathArena/hmmt_feb_2025", None), {"split": "train"})]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reads_a_local_copy_of_its_schema(name: str, hub_copy: HubCopy) -> None:
    task = make_task(name, {"dataset": hub_copy(name)}, 0)
    split = "heldout" if task_size(task, "train") == 0 else "train"
    problem = select_problems(task, split, 1).problems[0]
    assert problem.prompt
    assert rewards_of(task)
    right, wrong = demonstrations_of(task, problem)
    assert right is not None
    assert right != wrong


def first(name: str, hub_copy: HubCopy) -> Problem:
    task = make_task(name, {"dataset": hub_copy(name)}, 0)
    problem: Problem = task.problem("heldout", 0)
    return problem


def test_choices_are_shuffled_the_same_way_everywhere(hub_copy: HubCopy) -> None:
    problem = first("gpqa_diamond", hub_copy)
    choices = problem.metadata["choices"]
    assert sorted(choices) == ["a fox", "a hen", "grass", "the sea"]
    assert choices["ABCD".index(problem.answer)] == "a fox"
    assert f"{problem.answer}) a fox" in problem.prompt
    assert first("gpqa_diamond", hub_copy) == problem


def test_programs_come_with_public_and_private_tests(hub_copy: HubCopy) -> None:
    tests = first("livecodebench", hub_copy).metadata["tests"]
    assert [t["output"] for t in tests] == ["3\n", "10\n"]


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("this must not run",))


def test_private_tests_that_would_run_code_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    row = {"question_content": "Add.", "private_test_cases": evil, "metadata": "{}"}
    write_lines(tmp_path / "test.jsonl", [row])
    with pytest.raises(
        ConfigError, match=r"cannot be unpacked: the pickle of a test refers to [\w.]*print"
    ):
        make_task("livecodebench", {"dataset": str(tmp_path)}, 0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("protocol", range(6))
def test_private_tests_are_read_from_every_kind_of_pickle(protocol: int) -> None:
    tests = '[{"input": "1\u2713", "output": "2"}]'
    assert _unpack(base64.b64encode(zlib.compress(pickle.dumps(tests, protocol))).decode()) == tests


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (zlib.compress(pickle.dumps("1" * 5000)), "more than 4,000 bytes once decompressed"),
        (zlib.compress(pickle.dumps("x" * 99))[:-6], "their end is missing"),
        (zlib.compress(pickle.dumps(["a", "b"])), "must be text, got a pickle with EMPTY_LIST"),
        (zlib.compress(pickle.dumps(b"a", 4)), "must be text, got a pickle with SHORT_BINBYTES"),
        (zlib.compress(b"\x8c\x05abc"), "cannot be unpacked"),
        (zlib.compress(b""), "cannot be unpacked"),
        (zlib.compress(pickle.dumps(1, 0)), "must be text, got a pickle with INT"),
        (zlib.compress(b"."), "must be one text, got 0"),
        (b"no zlib", "cannot be unpacked"),
    ],
)
def test_private_tests_of_another_form_are_refused(
    data: bytes, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("delethink.envs.presets._MAX_TESTS_BYTES", 4000)
    with pytest.raises(ConfigError, match="private tests cannot be unpacked") as caught:
        _unpack(base64.b64encode(data).decode())
    assert text in str(caught.value)


def test_options_have_as_many_letters_as_the_row(hub_copy: HubCopy, tmp_path: Path) -> None:
    task = make_task("supergpqa", {"dataset": hub_copy("supergpqa")}, 0)
    ten, two = task.heldout
    assert "I) R\nJ) J\n\nThink" in ten.prompt
    assert (ten.answer, ten.metadata["choices"][9], two.answer) == ("J", "J", "A")
    assert demonstrations_of(task, two)[1].endswith("\\boxed{B}")  # type: ignore[union-attr]
    row = {"question": "Which?", "options": ["x", "y"], "answer_letter": "C"}
    with pytest.raises(ConfigError, match="'C' is none of the 2 options"):
        make_task("supergpqa", {"dataset": write_lines(tmp_path / "a.jsonl", [row])}, 0)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("aime_2026", "7"),
        ("hmmt_feb_2026", "\\sqrt{2}"),
        ("hmmt_nov_2025", "\\frac{3}{2}"),
        ("beyond_aime", "5001"),
        ("imo_answerbench", "$[-1, 1]$"),
    ],
)
def test_answers_of_contests_are_texts(name: str, answer: str, hub_copy: HubCopy) -> None:
    problem = first(name, hub_copy)
    assert problem.answer == answer
    assert problem.prompt.endswith(BOXED[len("{problem}") :])


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("crosswordbench", {"reference_answer": "[{}]", "puzzle_state": "{"}),
        ("crosswordbench", {"reference_answer": "[{}]", "puzzle_state": '{"wordlist": [1]}'}),
        ("crosswordbench", {}),
        ("livecodebench", {"question_content": "Add.", "public_test_cases": "[1]"}),
        ("livecodebench", {"question_content": "Add.", "private_test_cases": "no base 64"}),
        ("gpqa_diamond", {"Question": "Which?", "Correct Answer": "this"}),
    ],
)
def test_a_row_of_another_schema_is_refused(name: str, row: dict[str, Any], tmp_path: Path) -> None:
    split = {"crosswordbench": "7x7", "livecodebench": "test"}.get(name, "train")
    write_lines(tmp_path / f"{split}.jsonl", [row])
    with pytest.raises(ConfigError, match="row 1 of|no column|cannot be unpacked"):
        make_task(name, {"dataset": str(tmp_path)}, 0)


def test_a_crossword_shows_its_grid_and_not_its_key(hub_copy: HubCopy) -> None:
    problem = first("crosswordbench", hub_copy)
    assert "_ _ _\n# _ #" in problem.prompt
    assert "Across 1 (row 1, column 1, 3 letters): It purrs" in problem.prompt
    assert "CAT" not in problem.prompt
    assert json.loads(problem.answer) == {"across 1": "CAT", "down 2": "AX"}


def test_gold_answers_that_the_reward_cannot_read_are_counted(tmp_path: Path) -> None:
    rows = [
        {"problem": "one", "answer": "1"},
        {"problem": "two", "answer": "no number at all"},
        {"problem": "three", "answer": ["x y z", "3"]},
    ]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    task = dataset_task(dataset=path, reward="numeric", heldout_share=1.0)
    assert task.left_out == {"unreadable_answer": 1}
    assert task.size("heldout") == 2
