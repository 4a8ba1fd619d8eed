"""Reward for code that passes tests.

``metadata["tests"]`` is a list of mappings with ``type``, ``input`` and ``output``. The first two
types have the schema of LiveCodeBench (arXiv 2403.07974):

- ``"stdin"``: the text on standard input, and the expected standard output;
- ``"functional"``: the arguments of the function ``metadata["function"]``, one JSON value per line,
  and the expected JSON value;
- ``"assertion"``: ``input`` is source code with ``assert`` statements, as in HumanEval, MBPP and
  EvalPlus. It calls functions by name, or ``metadata["function"]`` as ``candidate``. ``setup``,
  which may be missing, is trusted source before the program: imports and helpers of the prompt.

Programs may use the names of the usual modules without an import (``delethink.rewards.prelude``).
"""

from __future__ import annotations

import ast
import json
import re
import secrets
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from importlib import import_module
from typing import Any

from delethink.errors import ConfigError, did_you_mean
from delethink.rewards.assertions import called_names, passes_assertions
from delethink.rewards.gold import reads_gold
from delethink.rewards.prelude import program_source
from delethink.scoring.answer import final_answer
from delethink.scoring.reward import runs_programs
from delethink.scoring.sandbox import Sandbox, SandboxLimits, run_python
from delethink.types import END_OF_THINKING

_TYPES = ("stdin", "functional", "assertion")
_FENCE = re.compile(r"(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})(?P<info>[^`\n]*)\Z")
_PYTHON = re.compile(r"(?:i|c|micro)?py(?:thon|py)?[\d.]*", re.IGNORECASE)
_MAX_DIGITS = 4000
_MAX_EXPANSION = 8  # of a JSON text by spaces and escapes

_CALL = """

import json as _json, sys as _sys
_out = _sys.stdout
_sys.stdout = _sys.stderr
_arguments = [_json.loads(_line) for _line in _sys.stdin.read().splitlines() if _line.strip()]
_function = getattr(_scope["Solution"](), {name!r}) if "Solution" in _scope else _scope[{name!r}]
_value = _function(*_arguments)
_out.write("\\n" + {mark!r} + _json.dumps(_value))
"""


def can_read_tests(_: str, metadata: Mapping[str, Any]) -> bool:
    """Return whether the tests of a problem can be run."""
    tests: Sequence[Mapping[str, Any]] = metadata.get("tests") or ()
    try:
        return bool(tests) and all(_is_complete(test, metadata.get("function")) for test in tests)
    except ConfigError:
        return False


@reads_gold(can_read_tests)
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
    """Return 1.0 if the last Python block after the end of thinking passes all tests, else 0.0.

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
    """Return the last fenced Python block after the end of thinking.

    A block without a language counts only where none is marked as Python: it may be sample output.
    Of such blocks the last one counts that is a program rather than a value.
    """
    blocks = list(_blocks(final_answer(text, end) or ""))
    marked = [code for language, code in blocks if _PYTHON.fullmatch(language)]
    unmarked = [code for language, code in blocks if not language]
    programs = marked or [code for code in unmarked if _is_program(code)] or unmarked
    return programs[-1] if programs else None


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield the language and the content of each complete fenced block."""
    opened: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.splitlines():
        if opened is None:
            opened, lines = _opening(line), []
            continue
        rest = line.rstrip()
        if rest.lstrip() == rest.lstrip()[:1] * len(rest.lstrip()) and _closes(rest, opened):
            pass  # the fence alone
        elif rest.endswith(opened["fence"]) and not rest.endswith("\\" + opened["fence"]):
            lines.append(rest.removesuffix(opened["fence"]))
        else:
            lines.append(line)
            continue
        code = "\n".join(lines) + "\n"
        yield _language(opened["info"]), textwrap.dedent(code) if opened["indent"] else code
        opened = None


def _opening(line: str) -> re.Match[str] | None:
    """Return the fence that opens a block at the end of a line, after any text."""
    at = min((i for i in (line.find("```"), line.find("~~~")) if i >= 0), default=-1)
    if at < 0:
        return None
    before = line[:at]
    return _FENCE.match(line[at:] if before.strip() else line)


def _closes(line: str, opened: re.Match[str]) -> bool:
    fence = line.strip()
    return fence[:1] == opened["fence"][0] and len(fence) >= len(opened["fence"])


def _language(info: str) -> str:
    """Return the language of a fence, as in ``python``, ``{.python}`` or ``python title="a"``."""
    words = info.strip().strip("{}").replace(",", " ").split()
    return words[0].lstrip(".").partition(":")[0] if words else ""


def _is_program(code: str) -> bool:
    """Return whether a text is Python with more than names and literals."""
    try:
        statements = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(
        not isinstance(statement, ast.Expr) or isinstance(statement.value, ast.Call | ast.Await)
        for statement in statements
    )


def _is_complete(test: Mapping[str, Any], function: str | None) -> bool:
    kind = _type_of(test)
    if "input" not in test or (kind != "assertion" and "output" not in test):
        return False
    if kind == "assertion":
        return bool(called_names(str(test["input"]), str(test.get("setup") or ""), function))
    if kind == "functional":
        json.loads(str(test["output"]), parse_int=_integer)
        return function is not None
    return True


def _type_of(test: Mapping[str, Any]) -> str:
    kind = str(test.get("type", "stdin"))
    if kind not in _TYPES:
        raise ConfigError(
            f"got a test of type {kind!r}, and a test is of type {', '.join(_TYPES)}."
            f"{did_you_mean(kind, _TYPES)}"
        )
    return kind


def _passes(
    run: Sandbox, code: str, test: Mapping[str, Any], function: str | None, limits: SandboxLimits
) -> bool:
    kind = _type_of(test)
    if kind == "assertion":
        setup = str(test.get("setup") or "")
        return passes_assertions(run, code, str(test["input"]), setup, function, limits)
    mark = secrets.token_hex(16)
    source = program_source(code, asked=(function,) if kind == "functional" and function else ())
    if kind == "functional":
        if function is None:
            raise ConfigError(
                'a functional test needs the name of the function in metadata["function"]'
            )
        source += _CALL.format(name=function, mark=mark)
    ran = run(source, str(test["input"]), limits)
    if ran.status != "ended" or ran.exit_code != 0:
        return False
    if kind == "stdin":
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
