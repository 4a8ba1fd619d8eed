"""Data sets of the paper's training and evaluation, as registered tasks.

Each preset has its name on the Hugging Face hub, its columns, its prompt and its reward. Use
``task.args.dataset`` for a local copy.
"""

from __future__ import annotations

import base64
import json
import pickletools
import random
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from delethink.envs.dataset import DatasetSpec
from delethink.envs.sources import SourceRow
from delethink.errors import ConfigError
from delethink.types import Problem

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MAX_TESTS_BYTES = 2**28  # of one problem's private tests; zlib packs a thousand bytes in one
_TEXT_OPCODES = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}

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
    return _make_choice(spec, str(question), shuffled, _LETTERS[order.index(0)])


def convert_options(spec: DatasetSpec, row: SourceRow) -> Problem | None:
    """Convert a question with a list of options and the letter of the right one."""
    question = spec.value(row, spec.problem_key)
    options = [str(option).strip() for option in spec.value(row, "options") or ()]
    letter = str(spec.value(row, spec.answer_key) or "").strip().upper()
    if not question or not letter:
        return None
    if letter not in list(_LETTERS[: len(options)]):
        raise ValueError(f"the answer {letter!r} is none of the {len(options)} options")
    return _make_choice(spec, str(question), options, letter)


def _make_choice(spec: DatasetSpec, question: str, choices: Sequence[str], right: str) -> Problem:
    listed = "\n".join(f"{letter}) {text}" for letter, text in zip(_LETTERS, choices, strict=False))
    question = f"{question.strip()}\n\n{listed}"
    return spec.make_problem(question, right, {"choices": list(choices)})


def demonstrate_choice(problem: Problem) -> tuple[str, str]:
    """Return the right letter and a wrong letter."""
    place = _LETTERS.index(problem.answer) + 1
    wrong = _LETTERS[place % len(problem.metadata["choices"])]
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


def _unpack(packed: str) -> str:
    """Decode private tests: JSON, pickled, compressed and in base 64."""
    unzip = zlib.decompressobj()
    try:
        data = unzip.decompress(base64.b64decode(packed), _MAX_TESTS_BYTES)
        if unzip.unconsumed_tail:
            raise ValueError(f"they have more than {_MAX_TESTS_BYTES:,} bytes once decompressed")
        if not unzip.eof:
            raise ValueError("their end is missing")
        return _pickled_text(data)
    except (zlib.error, ValueError, LookupError) as error:
        raise ConfigError(f"private tests cannot be unpacked: {error}") from None


def _pickled_text(data: bytes) -> str:
    """Return the text of a pickle that holds one text. Its opcodes are read, and never executed.

    Raises:
        ValueError: anything else, such as a pickle that would run code.
    """
    texts: list[str] = []
    for opcode, argument, _ in pickletools.genops(data):
        if "GLOBAL" in opcode.name:
            name = ".".join(texts[-2:]) if argument is None else str(argument).replace(" ", ".")
            raise ValueError(f"the pickle of a test refers to {name[:100]}")
        if "UNICODE" in opcode.name:
            texts.append(str(argument))
        elif opcode.name not in _TEXT_OPCODES:
            raise ValueError(f"private tests must be text, got a pickle with {opcode.name}")
    if len(texts) != 1:
        raise ValueError(f"private tests must be one text, got {len(texts)}")
    return texts[0]


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
aime_2026 = DatasetSpec("aime_2026", "MathArena/aime_2026", for_evaluation=True)
hmmt_2025 = DatasetSpec("hmmt_2025", "MathArena/hmmt_feb_2025", for_evaluation=True)
hmmt_nov_2025 = DatasetSpec("hmmt_nov_2025", "MathArena/hmmt_nov_2025", for_evaluation=True)
hmmt_feb_2026 = DatasetSpec("hmmt_feb_2026", "MathArena/hmmt_feb_2026", for_evaluation=True)
beyond_aime = DatasetSpec(
    "beyond_aime", "ByteDance-Seed/BeyondAIME", split="test", for_evaluation=True
)
imo_answerbench = DatasetSpec(
    "imo_answerbench",
    "evalscope/imo-answerbench",
    problem_key="Problem|problem",
    answer_key="Short Answer|short_answer|answer",
    for_evaluation=True,
)
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
supergpqa = DatasetSpec(
    "supergpqa",
    "m-a-p/SuperGPQA",
    problem_key="question",
    answer_key="answer_letter",
    template=CHOICES,
    rewards={"multiple_choice": 1.0},
    for_evaluation=True,
    convert=convert_options,
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
    date_key="contest_date",
    for_evaluation=True,
    convert=convert_program,
    demonstrate=demonstrate_program,
)
# Release 6 in the months that reports use (August 2024 to May 2025).
livecodebench_v6 = replace(
    livecodebench, name="livecodebench_v6", start_date="2024-08-01", end_date="2025-05-01"
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
