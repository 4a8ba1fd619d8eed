"""The data sets of the paper's training and evaluation, ready by name.

Each says where its problems are on the Hugging Face hub, which columns matter, how a problem is
asked and what scores it. ``task.args.dataset`` points at a local copy instead.
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
from delethink.envs.sources import Row
from delethink.errors import ConfigError
from delethink.types import END_OF_THINKING, Problem

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


def convert_choices(spec: DatasetSpec, row: Row) -> Problem | None:
    """A question, one right and three wrong answers: options A to D in an order of its own."""
    question = spec.value(row, spec.problem_key)
    right = spec.value(row, spec.answer_key)
    wrong = [spec.value(row, f"Incorrect Answer {i}") for i in (1, 2, 3)]
    if not question or not right or not all(wrong):
        return None
    choices = [str(choice).strip() for choice in (right, *wrong)]
    order = [0, 1, 2, 3]
    random.Random(f"choices of {question}").shuffle(order)  # the same on every machine
    shuffled = [choices[i] for i in order]
    listed = "\n".join(f"{letter}) {text}" for letter, text in zip("ABCD", shuffled, strict=True))
    asked = f"{str(question).strip()}\n\n{listed}"
    return spec.ask(asked, "ABCD"[order.index(0)], {"choices": shuffled})


def demonstrate_choice(problem: Problem) -> tuple[str, str]:
    """The right letter, and the next one."""
    wrong = "ABCD"[("ABCD".index(problem.answer) + 1) % 4]
    say = f"Let me see.{END_OF_THINKING}\\boxed{{%s}}"
    return say % problem.answer, say % wrong


def convert_program(spec: DatasetSpec, row: Row) -> Problem | None:
    """A programming contest's problem with its public and private tests."""
    statement = spec.value(row, spec.problem_key)
    tests = [*_tests(row.get("public_test_cases")), *_tests(row.get("private_test_cases"))]
    if not statement or not tests:
        return None
    asked, starter = str(statement).strip(), str(row.get("starter_code") or "").strip()
    if starter:
        asked += f"\n\nComplete this code:\n```python\n{starter}\n```"
    about = json.loads(row.get("metadata") or "{}")
    metadata: dict[str, Any] = {"tests": tests, "function": about.get("func_name")}
    metadata |= {
        key: row[key] for key in ("question_id", "difficulty", "contest_date") if key in row
    }
    return spec.ask(asked, str(row.get("solution") or ""), metadata)


def demonstrate_program(problem: Problem) -> tuple[str | None, str]:
    """The data set's solution where it has one, and a program that prints nothing."""
    say = f"Let me see.{END_OF_THINKING}```python\n%s\n```"
    return (say % problem.answer if problem.answer else None), say % "pass"


def _tests(cases: Any) -> list[dict[str, Any]]:
    if not cases:
        return []
    listed = json.loads(cases if str(cases).lstrip().startswith("[") else _unpack(str(cases)))
    return [
        {"input": case["input"], "output": case["output"], "type": case.get("testtype", "stdin")}
        for case in listed
    ]


class _NothingButText(pickle.Unpickler):
    """Reads a pickled string and refuses all that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a test names {module}.{name}")


def _unpack(packed: str) -> str:
    """Private tests come as JSON, pickled, compressed and in base 64."""
    try:
        text = _NothingButText(io.BytesIO(zlib.decompress(base64.b64decode(packed)))).load()
    except (zlib.error, pickle.UnpicklingError, EOFError, ValueError, LookupError) as exc:
        raise ConfigError(f"private tests cannot be unpacked: {exc}") from None
    if not isinstance(text, str):
        raise ConfigError(f"private tests are not a text but a {type(text).__name__}")
    return text


def convert_crossword(spec: DatasetSpec, row: Row) -> Problem | None:
    """A grid and its clues; the answer is the key as JSON."""
    entries = json.loads(row["reference_answer"])
    state = json.loads(row["puzzle_state"])
    if not entries:
        return None
    place = {word: (int(y), int(x), int(down)) for word, _, y, x, down in state["wordlist"]}
    lines = [
        f"{e['direction'].capitalize()} (row {place[e['answer']][0] + 1}, column "
        f"{place[e['answer']][1] + 1}, {len(e['answer'])} letters): {e['clue']}"
        for e in entries
    ]
    asked = (
        "Solve this crossword. In the grid, '_' is a cell to fill and '#' is blocked.\n\n"
        f"{_grid(state, place)}\n\n" + "\n".join(lines)
    )
    return spec.ask(asked, json.dumps({e["direction"]: e["answer"] for e in entries}), {})


def _grid(state: dict[str, Any], place: dict[str, tuple[int, int, int]]) -> str:
    """A cell is open where a word crosses it, whatever sign the file has there."""
    cells = {
        (y + i * down, x + i * (1 - down))
        for word, (y, x, down) in place.items()
        for i in range(len(word))
    }
    rows = range(len(state["grid"]))
    return "\n".join(
        " ".join("_" if (y, x) in cells else "#" for x in range(len(state["grid"][y])))
        for y in rows
    )


def demonstrate_crossword(problem: Problem) -> tuple[str, str]:
    """The key, and the key with one word spelt backwards and a letter more."""
    key = json.loads(problem.answer)
    wrong = dict(key)
    first = next(iter(key))
    wrong[first] = key[first][::-1] + "x"
    say = [
        f"Let me see.{END_OF_THINKING}" + "\n".join(f"{k}: {v}" for k, v in words.items())
        for words in (key, wrong)
    ]
    return say[0], say[1]


deepscaler = DatasetSpec("deepscaler", "agentica-org/DeepScaleR-Preview-Dataset")
# The set that the 96K run of the paper was trained on, filtered by its authors.
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
    files="test*.jsonl",  # the hub has a script beside them, which the library no longer runs
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
