"""Settings for every test, and small local copies of the data sets that presets read."""

from __future__ import annotations

import base64
import csv
import gc
import json
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Tests check behaviour, never wall-clock time: a busy machine must not fail them.
settings.register_profile("delethink", deadline=None)
settings.load_profile("delethink")

gc.set_threshold(50_000)  # as the commands do

# Ray's processes yield to all others by default, and starve beside a busy test.
os.environ.setdefault("RAY_worker_niceness", "0")

# Files of minutes, the longest first: two run side by side, and the last should not run alone.
LONGEST = [
    "test_ray_chaos",
    "test_ray_jobs",
    "test_cli_train",
    "test_cli_train_together",
    "test_ray_vllm",
    "test_weight_transfer",
    "test_cli_train_options",
    "test_evaluation_run",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def numbers(n: int, **extra: Any) -> list[dict[str, Any]]:
    return [{"problem": f"What is {i} + {i}?", "answer": str(2 * i)} | extra for i in range(n)]


TESTS = [
    {"input": "1 2\n", "output": "3\n", "testtype": "stdin"},
    {"input": "5 5\n", "output": "10\n", "testtype": "stdin"},
]


def packed(tests: list[dict[str, Any]]) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


CROSSWORD = {
    "reference_answer": json.dumps(
        [
            {"direction": "across 1", "answer": "CAT", "clue": "It purrs"},
            {"direction": "down 2", "answer": "AX", "clue": "It chops"},
        ]
    ),
    "puzzle_state": json.dumps(
        {
            "grid": [["C", "A", "T"], ["-", "X", "-"]],
            "wordlist": [["CAT", "It purrs", 0, 0, 0], ["AX", "It chops", 0, 1, 1]],
        }
    ),
}
GPQA = {
    "Question": "Which is red?",
    "Correct Answer": "a fox",
    "Incorrect Answer 1": "a hen",
    "Incorrect Answer 2": "the sea",
    "Incorrect Answer 3": "grass",
    "Subdomain": "colours",
}
LIVECODEBENCH = {
    "question_content": "Print the sum of two numbers.",
    "starter_code": "",
    "public_test_cases": json.dumps(TESTS[:1]),
    "private_test_cases": packed(TESTS[1:]),
    "metadata": "{}",
    "question_id": "1",
    "solution": "print(sum(map(int, input().split())))",
}
DATES = ("2024-07-31T00:00:00", "2024-08-01T17:30:00", "2025-04-06T00:00:00", "2025-05-02T00:00:00")
SUPERGPQA = {
    "uuid": "ab12",
    "question": "Which is the tenth letter?",
    "options": list("ZYXWVUTSRJ"),
    "answer": "J",
    "answer_letter": "J",
    "discipline": "Literature",
    "field": "Language",
    "subfield": "Alphabets",
    "difficulty": "easy",
    "is_calculation": False,
}
SCHEMAS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "deepscaler": ("train.jsonl", [r | {"solution": "..."} for r in numbers(200)]),
    "openmath": (
        "data/train-0.jsonl",
        [{"problem": r["problem"], "expected_answer": r["answer"]} for r in numbers(200)],
    ),
    "math_500": ("test.jsonl", numbers(5, solution="...", subject="Algebra", level=1)),
    "aime_2024": ("data/train-0.jsonl", [r | {"answer": int(r["answer"])} for r in numbers(5)]),
    "aime_2025": ("data/train-0.jsonl", [r | {"answer": int(r["answer"])} for r in numbers(5)]),
    "hmmt_2025": (
        "data/train-0.jsonl",
        [
            {"problem_idx": 1, "problem": "Halve 1.", "answer": "\\frac{1}{2}"},
            {"problem_idx": 2, "problem": "Which?", "answer": "$-1, 2\\sqrt{3}$"},
        ],
    ),
    "aime_2026": (
        "data/train-0.jsonl",
        [{"problem_idx": i, "problem": f"What is 7 + {i}?", "answer": 7 + i} for i in range(3)],
    ),
    "hmmt_feb_2026": (
        "data/train-0.jsonl",
        [
            {
                "problem_idx": 1,
                "problem": "Root?",
                "answer": "\\sqrt{2}",
                "problem_type": ["Algebra"],
            },
            {"problem_idx": 2, "problem": "How many?", "answer": "12", "problem_type": []},
        ],
    ),
    "hmmt_nov_2025": (
        "data/train-0.jsonl",
        [{"problem_idx": 1, "problem": "Half of 3?", "answer": "\\frac{3}{2}", "problem_type": []}],
    ),
    "beyond_aime": ("data/test-0.jsonl", [{"problem": "What is 5000 + 1?", "answer": 5001}]),
    "imo_answerbench": (
        "train.csv",
        [
            {
                "Problem ID": "imo-bench-algebra-001",
                "Problem": "Find all $x$ with $x^2 \\le 1$.",
                "Short Answer": "$[-1, 1]$",
                "Category": "Algebra",
                "Subcategory": "Inequality",
                "Source": "Shortlist 2005",
            }
        ],
    ),
    "supergpqa": (
        "SuperGPQA-all.jsonl",
        [SUPERGPQA, SUPERGPQA | {"options": ["one", "two"], "answer": "one", "answer_letter": "A"}],
    ),
    "livecodebench_v6": (
        "test6.jsonl",
        [
            LIVECODEBENCH | {"question_content": f"Sum {i}.", "contest_date": day}
            for i, day in enumerate(DATES)
        ],
    ),
    "gpqa_diamond": ("gpqa_diamond.csv", [GPQA, GPQA | {"Question": "And which is not?"}]),
    "livecodebench": ("test6.jsonl", [LIVECODEBENCH]),
    "crosswordbench": ("english/7x7-0.jsonl", [CROSSWORD]),
}


@pytest.fixture
def hub_copy(tmp_path: Path) -> Callable[[str], str]:
    """Writes a few rows in the schema of a preset's data set; gives the folder."""

    def write(name: str) -> str:
        folder = tmp_path / name
        path, rows = SCHEMAS[name]
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="", encoding="utf-8") as out:
            if file.suffix == ".csv":
                writer = csv.DictWriter(out, rows[0])
                writer.writeheader()
                writer.writerows(rows)
            else:
                out.writelines(json.dumps(row) + "\n" for row in rows)
        return str(folder)

    return write
