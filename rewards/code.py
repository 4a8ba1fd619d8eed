"""Reward for code that passes tests.

``metadata["tests"]`` is a list of mappings with ``input`` and ``output``, in the schema of
LiveCodeBench (arXiv 2403.07974):

- ``"type": "stdin"``: the text on standard input, and the expected standard output;
- ``"type": "functional"``: the arguments of the function ``metadata["function"]``, one JSON value
  per line, and the expected JSON value.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from decimal import Decimal
from importlib import import_module
from typing import Any

from delethink.errors import ConfigError
from delethink.scoring.answer import final_answer
from delethink.scoring.reward import runs_programs
from delethink.scoring.sandbox import Sandbox, SandboxLimits, run_python
from delethink.types import END_OF_THINKING

_FENCE = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)

_MAX_DIGITS = 4000
_MAX_EXPANSION = 8  # of a JSON text by spaces and escapes

_CALL = """

import json as _json, sys as _sys
_out = _sys.stdout
_sys.stdout = _sys.stderr
_arguments = [_json.loads(_line) for _line in _sys.stdin.read().splitlines() if _line.strip()]
_function = getattr(Solution(), {name!r}) if "Solution" in globals() else globals()[{name!r}]
_value = _function(*_arguments)
_out.write("\\n" + {mark!r} + _json.dumps(_value))
"""


@runs_programs
def passes_tests(
    text: str,
    metadata: Mapping[str, Any],
    partial: bool = False,
    seconds: float = 10.0,
    memory_mb: int = 1024,
    max_tests: int | None = None,
    sandbox: str | None = None,
    end: str | None = END_OF_THINKING,
    run_program: Sandbox = run_python,
) -> float | None:
    """Return 1.0 if the last code block after the end of thinking passes all tests, else 0.0.

    Args:
        text: the trace.
        metadata: of the problem; without tests the reward is ``None``.
        partial: return the share of passed tests. By default the first failure ends the run.
        seconds: time limit of each test.
        memory_mb: memory limit of each test.
        max_tests: number of tests to run, from the first.
        sandbox: ``"module:function"`` of another sandbox.
        end: the end of thinking.
        run_program: sandbox of the scorer's pool, used without ``sandbox``.
    """
    tests: Sequence[Mapping[str, Any]] = metadata.get("tests") or ()
    tests = tests[:max_tests]
    if not tests:
        return None
    code = extract_code(text, end)
    if code is None:
        return 0.0
    run = run_program if sandbox is None else _import(sandbox)
    limits = SandboxLimits(seconds, memory_mb)
    passed = 0
    for test in tests:
        if _passes(run, code, test, metadata.get("function"), limits):
            passed += 1
        elif not partial:
            return 0.0
    return passed / len(tests)


def extract_code(text: str, end: str | None = END_OF_THINKING) -> str | None:
    """Return the last fenced Python block after the end of thinking."""
    blocks = _FENCE.findall(final_answer(text, end) or "")
    return blocks[-1] if blocks else None


def _passes(
    run: Sandbox, code: str, test: Mapping[str, Any], function: str | None, limits: SandboxLimits
) -> bool:
    is_functional = test.get("type", "stdin") != "stdin"
    mark = secrets.token_hex(16)
    if is_functional:
        if function is None:
            raise ConfigError(
                'a functional test needs the name of the function in metadata["function"]'
            )
        code += _CALL.format(name=function, mark=mark)
    ran = run(code, str(test["input"]), limits)
    if ran.status != "ended" or ran.exit_code != 0:
        return False
    if not is_functional:
        return same_output(ran.stdout, str(test["output"]))
    _, found, value = ran.stdout.rpartition(mark)  # absent if the program ended before its call
    return bool(found) and same_value(value, str(test["output"]))


def same_value(output: str, expected: str) -> bool:
    """Return whether two JSON texts have the same value. Any other output is different."""
    wanted = json.loads(expected, parse_int=_integer)
    if len(output) > 1000 + _MAX_EXPANSION * len(expected):
        return False
    try:
        return bool(json.loads(output, parse_int=_integer) == wanted)
    except (ValueError, RecursionError):  # no JSON, or too deep to read or to compare
        return False


def _integer(digits: str) -> int | Decimal:
    """Return an integer of any length; Python reads up to 4,300 digits as an ``int``."""
    return int(digits) if len(digits) <= _MAX_DIGITS else Decimal(digits)


def same_output(output: str, expected: str) -> bool:
    """Return whether two outputs are equal by line, ignoring spaces and number formats."""
    lines, wanted = output.strip().splitlines(), expected.strip().splitlines()
    return len(lines) == len(wanted) and all(map(_same_words, lines, wanted))


def _same_words(line: str, expected: str) -> bool:
    words, wanted = line.split(), expected.split()
    if words == wanted:
        return True
    try:
        return len(words) == len(wanted) and all(
            Decimal(a) == Decimal(b) for a, b in zip(words, wanted, strict=True)
        )
    except (ArithmeticError, ValueError):  # no numbers
        return False


def _import(path: str) -> Sandbox:
    module, _, name = path.partition(":")
    try:
        found: Sandbox = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"cannot import the sandbox {path!r}, which must be written module:function: {error}"
        ) from None
    return found
