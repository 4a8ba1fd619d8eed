"""Rules of CONTRIBUTING.md that a program can check: names, functions, imports, docstrings."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "delethink"
MAX_FUNCTION_LINES = 60
COMMAND_FUNCTIONS = {"run", "main", "add_arguments"}  # each command has its own
RELATIVE_WORD = re.compile(r"(What|Where|How|Whether|Who|Whose|Why|Of|That|As)\b")


def _modules() -> dict[str, Path]:
    found = {}
    for root in (PACKAGE, PACKAGE / "envs", PACKAGE / "rewards"):
        for file in sorted(root.rglob("*.py")):
            dotted = file.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".")
            found[dotted.removesuffix(".__init__")] = file
    return found


MODULES = _modules()


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text("utf-8"))


def imports(module: str) -> set[str]:
    """Return the modules of the package imported by a module, inside functions too."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return (found & set(MODULES)) - {module}


def public_names(module: str) -> set[str]:
    names = set()
    for node in tree(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_") and len(name) > 1}


def test_imports_have_no_circle() -> None:
    waiting = {module: imports(module) for module in MODULES}
    while waiting:
        ready = {module for module, needed in waiting.items() if not needed & set(waiting)}
        assert ready, f"these modules import each other: {sorted(waiting)}"
        waiting = {module: needed for module, needed in waiting.items() if module not in ready}


def test_one_name_has_one_meaning() -> None:
    owners = defaultdict(list)
    for module in MODULES:
        for name in public_names(module) - COMMAND_FUNCTIONS:
            owners[name].append(module)
    shared = {name: modules for name, modules in owners.items() if len(modules) > 1}
    assert not shared


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module: str) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("module", MODULES)
def test_a_caught_exception_is_called_error(module: str) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ExceptHandler) and node.name:
            assert node.name in ("error", "exc"), f"line {node.lineno}: {node.name}"


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_begin_with_a_verb_or_a_noun(module: str) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            assert not RELATIVE_WORD.match(text), f"{text.splitlines()[0]!r} in {module}"
