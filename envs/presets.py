"""Data sets of the paper's training and evaluation, as registered tasks.

Each preset has its name on the Hugging Face hub, its columns, its prompt and its reward. Use
``task.args.dataset`` for a local copy.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import random
import zlib
from typing import Any

from delethink.envs.dataset import DatasetSpec
from delethink.envs.sources import SourceRow
from delethink.errors import ConfigError
from delethink.types import Problem

CHOICES = (
    "{problem}\n\nThink step by step. Choose one of the options, and put its letter within "
    "\\boxed{}."
)
PROGRAM = (
    "{problem}\n\nThink step by step, then write the whole program in Python, in one block that "
    "starts with ```python."
)
CROSSWORD = (
    "{problem}\n\nThink step by step. Then write one line for each clue, as in 'Across 1: WORD' "
    "and 'Down 2: WORD'."
)


def convert_choices(spec: DatasetSpec, row: SourceRow) -> Problem | None:
    """Convert a question with one right and three wrong answers to options A to D, shuffled."""
    question = spec.value(row, spec.problem_key)
    right = spec.value(row, spec.answer_key)
    wrong = [spec.value(row, f"Incorrect Answer {i}") for i in (1, 2, 3)]
    if not question or not right or not all(wrong):
        return None
    order = [0, 1, 2, 3]
    random.Random(f"choices of {question}").shuffle(order)  # the same on every machine
    shuffled = [str((right, *wrong)[i]).strip() for i in order]
    listed = "\n".join(f"{letter}) {text}" for letter, text in zip("ABCD", shuffled, strict=True))
    question = f"{str(question).strip()}\n\n{listed}"
    return spec.make_problem(question, "ABCD"[order.index(0)], {"choices": shuffled})


def demonstrate_choice(problem: Problem) -> tuple[str, str]:
    """Return the right letter and a wrong letter."""
    wrong = "ABCD"[("ABCD".index(problem.answer) + 1) % 4]
    return f"\\boxed{{{problem.answer}}}", f"\\boxed{{{wrong}}}"


def convert_program(spec: DatasetSpec, row: SourceRow) -> Problem | None:
    """Convert a programming problem with its public and private tests."""
    statement = spec.value(row, spec.problem_key)
    tests = [*_tests(row.get("public_test_cases")), *_tests(row.get("private_test_cases"))]
    if not statement or not tests:
        return None
    question, starter = str(statement).strip(), str(row.get("starter_code") or "").strip()
    if starter:
        question += f"\n\nComplete this code:\n```python\n{starter}\n```"
    details = json.loads(row.get("metadata") or "{}")
    kept = {k: row[k] for k in ("question_id", "difficulty", "contest_date") if k in row}
    metadata = {"tests": tests, "function": details.get("func_name")} | kept
    return spec.make_problem(question, str(row.get("solution") or ""), metadata)


def demonstrate_program(problem: Problem) -> tuple[str | None, str]:
    """Return the data set's solution, if any, and a program without output."""
    solution = f"```python\n{problem.answer}\n```" if problem.answer else None
    return solution, "```python\npass\n```"


def _tests(cases: Any) -> list[dict[str, Any]]:
    if not cases:
        return []
    listed = json.loads(cases if str(cases).lstrip().startswith("[") else _unpack(str(cases)))
    return [
        {"input": case["input"], "output": case["output"], "type": case.get("testtype", "stdin")}
        for case in listed
    ]


class _TextUnpickler(pickle.Unpickler):
    """Unpickles strings, and refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"the pickle of a test refers to {module}.{name}")


def _unpack(packed: str) -> str:
    """Decode private tests: JSON, pickled, compressed and in base 64."""
    try:
        text = _TextUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(packed)))).load()
    except (zlib.error, pickle.UnpicklingError, EOFError, ValueError, LookupError) as error:
        raise ConfigError(f"private tests cannot be unpacked: {error}") from None
    if not isinstance(text, str):
        raise ConfigError(f"private tests must be text, got {type(text).__name__}")
    return text


def convert_crossword(spec: DatasetSpec, row: SourceRow) -> Problem | None:
    """Convert a grid and its clues. The answer is the solution as JSON."""
    entries = json.loads(row["reference_answer"])
    state = json.loads(row["puzzle_state"])
    if not entries:
        return None
    positions = {word: (int(y), int(x), int(down)) for word, _, y, x, down in state["wordlist"]}
    lines = [
        f"{e['direction'].capitalize()} (row {positions[e['answer']][0] + 1}, column "
        f"{positions[e['answer']][1] + 1}, {len(e['answer'])} letters): {e['clue']}"
        for e in entries
    ]
    question = (
        "Solve this crossword. In the grid, '_' is a cell to fill and '#' is blocked.\n\n"
        f"{_grid(state, positions)}\n\n" + "\n".join(lines)
    )
    key = {e["direction"]: e["answer"] for e in entries}
    return spec.make_problem(question, json.dumps(key), {})


def _grid(state: dict[str, Any], positions: dict[str, tuple[int, int, int]]) -> str:
    """Return the grid as text. Cells of words are open, regardless of the file's characters."""
    cells = {
        (y + i * down, x + i * (1 - down))
        for word, (y, x, down) in positions.items()
        for i in range(len(word))
    }
    return "\n".join(
        " ".join("_" if (y, x) in cells else "#" for x in range(len(row)))
        for y, row in enumerate(state["grid"])
    )


def demonstrate_crossword(problem: Problem) -> tuple[str, str]:
    """Return the solution, and the solution with one wrong word."""
    solution = json.loads(problem.answer)
    right = [f"{name}: {word}" for name, word in solution.items()]
    return "\n".join(right), "\n".join([right[0] + "x", *right[1:]])


deepscaler = DatasetSpec("deepscaler", "agentica-org/DeepScaleR-Preview-Dataset")
# The training set of the paper's 96K run, filtered by its authors.
openmath = DatasetSpec(
    "openmath", "McGill-NLP/openmath-filtered", answer_key="answer|expected_answer"
)
math_500 = DatasetSpec("math_500", "HuggingFaceH4/MATH-500", split="test", for_evaluation=True)
aime_2024 = DatasetSpec("aime_2024", "HuggingFaceH4/aime_2024", for_evaluation=True)
aime_2025 = DatasetSpec("aime_2025", "MathArena/aime_2025", for_evaluation=True)
hmmt_2025 = DatasetSpec("hmmt_2025", "MathArena/hmmt_feb_2025", for_evaluation=True)
gpqa_diamond = DatasetSpec(
    "gpqa_diamond",
    "Idavidrein/gpqa",
    config="gpqa_diamond",
    problem_key="Question",
    answer_key="Correct Answer",
    template=CHOICES,
    rewards={"multiple_choice": 1.0},
    for_evaluation=True,
    convert=convert_choices,
    demonstrate=demonstrate_choice,
)
livecodebench = DatasetSpec(
    "livecodebench",
    "livecodebench/code_generation_lite",
    split="test",
    files="test*.jsonl",  # the loading script on the hub is not supported by `datasets`
    problem_key="question_content",
    template=PROGRAM,
    rewards={"code": 1.0},
    for_evaluation=True,
    convert=convert_program,
    demonstrate=demonstrate_program,
)
crosswordbench = DatasetSpec(
    "crosswordbench",
    "HINT-lab/CrossWordBench",
    config="english",
    split="7x7",
    template=CROSSWORD,
    rewards={"crossword": 1.0},
    for_evaluation=True,
    convert=convert_crossword,
    demonstrate=demonstrate_crossword,
)
