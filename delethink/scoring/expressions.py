"""Restriction of the expressions that a grader evaluates to plain arithmetic.

Some scorers call ``eval`` on an answer. The isolation keeps such code from everything outside, but
the code shares the process of its grader and could write the grader's result itself. An audit hook
therefore refuses every evaluated expression with more than literals, operators, and calls of
functions in scope: no attribute, no import, no assignment, and few built-in functions.
"""

from __future__ import annotations

import builtins
import dis
import sys
from types import CodeType
from typing import Any

_ALLOWED_BUILTINS = frozenset(
    [
        "abs",
        "bool",
        "complex",
        "dict",
        "divmod",
        "enumerate",
        "filter",
        "float",
        "frozenset",
        "int",
        "len",
        "list",
        "map",
        "max",
        "min",
        "pow",
        "range",
        "repr",
        "reversed",
        "round",
        "set",
        "slice",
        "sorted",
        "str",
        "sum",
        "tuple",
        "zip",
    ]
)
_REFUSED_NAMES = frozenset(set(dir(builtins)) - _ALLOWED_BUILTINS)
_REFUSED_OPERATIONS = ("ATTR", "METHOD", "IMPORT_NAME", "STORE_GLOBAL", "DELETE")
# Packages that generate code of their own.
_GENERATORS = ("collections", "dataclasses", "enum", "functools", "inspect", "mpmath", "typing")


class RefusedExpressionError(Exception):
    """An evaluated expression is more than arithmetic."""


def allow_only_expressions() -> None:
    """Refuse code from text, from now on, unless it is plain arithmetic. Never undone."""
    sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "exec" and isinstance(arguments[0], CodeType):
        code = arguments[0]
        if code.co_filename.startswith("<") and not code.co_filename.startswith("<frozen"):
            caller = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
            if caller not in _GENERATORS:
                _check(code)


def _check(code: CodeType) -> None:
    for instruction in dis.get_instructions(code):
        name, operand = instruction.opname, instruction.argval
        is_refused = any(part in name for part in _REFUSED_OPERATIONS) or (
            name in ("LOAD_NAME", "LOAD_GLOBAL")
            and (operand in _REFUSED_NAMES or str(operand).startswith("_"))
        )
        if is_refused and (name, operand) != ("IMPORT_NAME", "sympy"):  # by sympy's own parser
            raise RefusedExpressionError(f"an answer may not use {operand!r}")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _check(constant)
