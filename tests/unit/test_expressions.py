"""Graders may evaluate arithmetic that a model wrote, and nothing that reaches further."""

from __future__ import annotations

import subprocess
import sys

import pytest

RUN = """
import sys
from delethink.scoring.expressions import RefusedExpressionError, allow_only_expressions
allow_only_expressions()
def f(x): return 2 * x
try:
    print(eval(sys.argv[1], {"f": f, "here": sys}))
except RefusedExpressionError as error:
    print("refused:", error)
"""


def evaluate(text: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", RUN, text], capture_output=True, text=True, check=False
    )
    return (ran.stdout or ran.stderr.strip().rpartition("\n")[2]).strip()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 + 3 * 4", "14"),
        ("[['a', 'b'], [1, 2]]", "[['a', 'b'], [1, 2]]"),
        ("f(3) - abs(-1)", "5"),
        ("sum(x * x for x in range(4))", "14"),
        ("max([1, 2], key=lambda x: -x)", "1"),
    ],
)
def test_arithmetic_is_evaluated(text: str, value: str) -> None:
    assert evaluate(text) == value


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("__import__('os').system('true')", "__import__"),
        ("().__class__", "__class__"),
        ("here.modules", "modules"),
        ("f'{here.path}'", "path"),
        ("[x.real for x in [1]]", "real"),
        ("(lambda: open('x'))()", "open"),
        ("eval('1')", "eval"),
        ("exec('1')", "exec"),
        ("getattr(f, 'x')", "getattr"),
        ("globals()", "globals"),
        ("vars()", "vars"),
        ("breakpoint()", "breakpoint"),
        ("type(1)", "type"),
        ("_", "_"),
        ("\uff45val('1')", "eval"),  # Python folds the full-width letter
        ("[f for f in [1]] and __builtins__", "__builtins__"),
    ],
)
def test_anything_else_is_refused_by_name(text: str, name: str) -> None:
    assert evaluate(text) == f"refused: an answer may not use {name!r}"
