"""There is one way to print, to log and to write JSON; whoever takes another is found here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "delethink"
OUTPUT = "output.py"  # the home of printing
REDACTION = "redaction.py"  # the home of JSON for files and programs
FILES = {
    file.relative_to(PACKAGE).as_posix(): file
    for root in (PACKAGE, PACKAGE / "envs", PACKAGE / "rewards")
    for file in sorted(root.rglob("*.py"))
    if "__pycache__" not in file.parts
}

PRINTERS = {
    *("print", "pprint", "breakpoint"),
    *("sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__"),
    *("warnings.warn", "warnings.warn_explicit"),
    *("traceback.print_exc", "traceback.print_exception", "traceback.print_stack"),
    *(f"logging.{name}" for name in ("basicConfig", "StreamHandler", "FileHandler")),
    *(f"logging.{name}" for name in ("debug", "info", "warning", "error", "critical", "exception")),
    *("call of argparse.ArgumentParser", "call of logging.getLogger"),
}
PRINTING_MODULES = {"rich", "rich.console", "rich.pretty", "click", "tqdm", "pprint", "loguru"}

WRITERS = {"json.dump", "json.dumps"}
MAY_WRITE_JSON = {
    "trace_io.py": "compares values, and makes columns of values that are redacted before",
    "json_io.py": "checks a value that was read",
    "evaluation/settings.py": "a fingerprint",
    "evaluation/records.py": "an error text",
    "envs/presets.py": "a gold answer, in memory",
    "rewards/reasoning_gym.py": "a key of a cache, in memory",
    "view/search.py": "a search pattern, in memory",
    "scoring/": "messages between processes",
    "serve/sending.py": "answers to clients, in which texts of the model stay as they are",
}


def used_names(tree: ast.AST) -> Iterator[str]:
    """Yield each dotted name and imported module."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    skipped |= {  # setting the level of another library's logger prints nothing
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "setLevel"
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            yield name
            # The logger of another library, named by a literal, is configured and not written to.
            if not (node.args and isinstance(node.args[0], ast.Constant)):
                yield f"call of {name}"
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield re.sub(r"^logging\.getLogger\(.*\)", "logging", ast.unparse(node))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def names_of(path: str) -> set[str]:
    return set(used_names(ast.parse(FILES[path].read_text("utf-8"))))


def printers(names: set[str]) -> set[str]:
    return names & (PRINTERS | PRINTING_MODULES)


def test_only_one_module_prints_and_logs() -> None:
    found = {path: printers(names_of(path)) for path in FILES if path != OUTPUT}
    found = {path: names for path, names in found.items() if names}
    assert not found, "use echo, open_console or get_logger of delethink.output"


def test_json_that_leaves_the_process_has_no_secrets() -> None:
    found = {
        path
        for path in FILES
        if path != REDACTION
        and not any(path.startswith(allowed) for allowed in MAY_WRITE_JSON)
        and names_of(path) & WRITERS
    }
    assert not found, "use json_text of delethink.redaction"


@pytest.mark.parametrize(
    "code",
    [
        "print('a')",
        "import sys\nsys.stderr.write('a')",
        "shown = map(print, [])",
        "import logging\nlogging.getLogger(__name__)",
        "from sys import stdout",
        "import logging\nlogging.getLogger('a').warning('a')",
        "import logging\nlogging.warning('a')",
        "from tqdm import tqdm",
        "from rich.console import Console",
        "from rich import print",
        "import warnings\nwarnings.warn('a')",
        "import argparse\nargparse.ArgumentParser()",
        "import traceback\ntraceback.print_exc()",
    ],
)
def test_a_printer_is_found(code: str) -> None:
    assert printers(set(used_names(ast.parse(code))))


@pytest.mark.parametrize(
    "code",
    [
        "import logging\nlogging.getLogger('vllm').setLevel(logging.ERROR)",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rich.console import Console",
        "from delethink.output import echo\necho('a')",
    ],
)
def test_what_prints_nothing_is_allowed(code: str) -> None:
    assert not printers(set(used_names(ast.parse(code))))
