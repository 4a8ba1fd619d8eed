"""Code, run against tests: all of them pass, or not.

A problem's ``metadata["tests"]`` is a list of tests, each a mapping with ``input`` and ``output``:
what the program reads and what it must print (``"type": "stdin"``), or the arguments of a function,
one JSON value a line, and the JSON value that it must return (``"type": "functional"``, and the
function's name in ``metadata["function"]``). This is the schema of LiveCodeBench (arXiv
2403.07974).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from importlib import import_module
from typing import Any

from delethink.errors import ConfigError
from delethink.scoring.answer import final_answer
from delethink.scoring.reward import threaded
from delethink.scoring.sandbox import Limits, Ran, Sandbox, check, run_python
from delethink.types import END_OF_THINKING

_FENCE = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)

_CALL = """

import json as _json, sys as _sys
_out = _sys.stdout
_sys.stdout = _sys.stderr
_arguments = [_json.loads(_line) for _line in _sys.stdin.read().splitlines() if _line.strip()]
_function = getattr(Solution(), {name!r}) if "Solution" in globals() else globals()[{name!r}]
_value = _function(*_arguments)
_out.write("\\n" + {mark!r} + _json.dumps(_value))
"""


@threaded(check)
def passes_tests(
    text: str,
    metadata: Mapping[str, Any],
    partial: bool = False,
    seconds: float = 10.0,
    memory_mb: int = 1024,
    max_tests: int | None = None,
    sandbox: str | None = None,
    end: str | None = END_OF_THINKING,
) -> float | None:
    """1.0 if the last code block after the end of thinking passes every test, else 0.0.

    Args:
        text: the trace.
        metadata: of the problem; ``None`` is returned where it has no tests.
        partial: the share of passed tests instead; without it the first failure ends the run.
        seconds: of each test.
        memory_mb: of each test.
        max_tests: how many tests are run, the first ones.
        sandbox: ``"module:function"`` of a stronger sandbox than our own.
        end: the mark that ends thinking.
    """
    tests: Sequence[Mapping[str, Any]] = metadata.get("tests") or ()
    tests = tests[:max_tests]
    if not tests:
        return None
    code = extract_code(text, end)
    if code is None:
        return 0.0
    run = run_python if sandbox is None else _import(sandbox)
    limits = Limits(seconds, memory_mb)
    passed = 0
    for test in tests:
        if _passes(run, code, test, metadata.get("function"), limits):
            passed += 1
        elif not partial:
            return 0.0
    return passed / len(tests)


def extract_code(text: str, end: str | None = END_OF_THINKING) -> str | None:
    """The last fenced block of Python after the end of thinking."""
    blocks = _FENCE.findall(final_answer(text, end) or "")
    return blocks[-1] if blocks else None


def _passes(
    run: Sandbox, code: str, test: Mapping[str, Any], function: str | None, limits: Limits
) -> bool:
    if test.get("type", "stdin") == "stdin":
        ran = run(code, str(test["input"]), limits)
        return _ended(ran) and same_output(ran.stdout, str(test["output"]))
    mark = secrets.token_hex(16)
    if function is None:
        raise ConfigError('a functional test needs the function\'s name in metadata["function"]')
    call = _CALL.format(name=function, mark=mark)
    ran = run(code + call, str(test["input"]), limits)
    _, found, value = ran.stdout.rpartition(mark)
    return _ended(ran) and bool(found) and _same_value(value, str(test["output"]))


def _ended(ran: Ran) -> bool:
    return ran.status == "ended" and ran.exit_code == 0


def same_output(said: str, expected: str) -> bool:
    """Whether two outputs are the same, line by line: spaces apart, and numbers by value."""
    lines, wanted = _lines(said), _lines(expected)
    if len(lines) != len(wanted):
        return False
    return all(_same_line(a, b) for a, b in zip(lines, wanted, strict=True))


def _lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.strip().splitlines()]


def _same_line(said: str, expected: str) -> bool:
    if said == expected:
        return True
    words, wanted = said.split(), expected.split()
    try:
        return len(words) == len(wanted) and all(
            Decimal(a) == Decimal(b) for a, b in zip(words, wanted, strict=True)
        )
    except InvalidOperation:
        return False


def _same_value(said: str, expected: str) -> bool:
    try:
        return bool(json.loads(said) == json.loads(expected))
    except json.JSONDecodeError:
        return False


def _import(path: str) -> Sandbox:
    module, _, name = path.partition(":")
    try:
        found: Sandbox = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"there is no sandbox {path!r}, which is written module:function: {error}"
        ) from None
    return found
