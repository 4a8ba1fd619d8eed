"""Arrows go one way, and what is light stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "delethink"
HEAVY = {"torch", "vllm", "ray", "trl", "transformers"}

NOUNS = {"errors", "types"}
CHUNKS = NOUNS | {"tokens", "carryover", "chunking"}
SHOWN = {"output", "redaction"}
TEXT = {"chat_templates", "thinking_marks", "tokenization"}
ROLLOUT = CHUNKS | SHOWN | TEXT | {"json_io", "policy", "rollout", "rows"}
SETTINGS = {"config", "registry"}
SCORING = {"tasks", "scoring"}

# Each package or module and what it may import, itself aside. envs and rewards appear on the right
# of no other row: the library reaches them by registered name.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "types": {"errors", "tokens"},
    "tokens": {"errors"},  # types use its arrays
    "chat_templates": NOUNS,
    "thinking_marks": NOUNS | {"chat_templates"},
    "tokenization": NOUNS | {"tokens", "chat_templates", "thinking_marks"},
    "carryover": NOUNS | {"tokenization", "tokens"},  # some policies read text
    "chunking": NOUNS | {"tokenization", "tokens", "carryover"},
    "policy": NOUNS | {"tokens"},
    "rollout": CHUNKS | SHOWN | {"policy"},
    "redaction": set(),
    "json_io": {"errors"},
    "yaml_io": {"errors", "json_io"},
    "rows": {"errors", "json_io"},
    "output": NOUNS | {"redaction"},
    "tasks": NOUNS,
    "registry": NOUNS | {"json_io"},
    "trace_io": ROLLOUT,
    "report_page": {"errors"} | SHOWN,
    "report_process": set(),
    "trace_index": {"errors", "json_io", "redaction"},
    "trace_map": NOUNS | {"tokens"},
    "trace_svg": NOUNS | {"trace_map"},
    "trace_html": NOUNS | SHOWN | {"scoring", "tokens", "trace_map", "trace_svg"},
    "testing": ROLLOUT,
    "scoring": ROLLOUT | {"registry"},
    "rewards": NOUNS | {"scoring"},
    "envs": ROLLOUT | {"engines", "registry", "scoring", "tasks", "trace_html", "trace_io"},
    "config_faults": {"errors", "json_io"},
    "config": CHUNKS
    | {"config_faults", "json_io", "redaction", "registry", "thinking_marks", "yaml_io"},
    "cost": CHUNKS | SETTINGS | SHOWN | {"json_io"},  # calibration reads the recipe of a run
    "engines": ROLLOUT | SETTINGS,
    "evaluation.metrics": NOUNS,
    "evaluation": ROLLOUT
    | SETTINGS
    | SCORING
    | {"cost", "engines", "evaluation.metrics", "report_page", "report_process", "trace_io"},
    "training": ROLLOUT
    | SETTINGS
    | SCORING
    | {"cost", "engines", "evaluation", "evaluation.metrics", "report_page", "report_process"}
    | {"trace_index", "trace_io", "yaml_io"},
    "serve": ROLLOUT | SETTINGS | {"", "engines"},
    "view": ROLLOUT
    | SHOWN
    | {"engines", "evaluation", "scoring", "trace_html", "trace_index", "trace_io", "trace_map"}
    | {"yaml_io"},
    "integrations": ROLLOUT | SETTINGS | SCORING | {"engines", "trace_io"},
    "": ROLLOUT,  # the public names, in delethink/__init__.py
}
ARROWS["cli"] = {"", *ARROWS} - {"envs", "rewards", "integrations"}

# Load without any extra, because tests, environments and laptops use them alone.
CORE = {"", *ROLLOUT, "registry", "cost", "trace_io", "testing", "tasks", "scoring", "output"}
CORE |= {"envs", "rewards", "evaluation.metrics", "trace_html", "trace_index", "trace_map"}
CORE |= {"trace_svg"}

FILES = sorted(file for file in PACKAGE.rglob("*.py") if "__pycache__" not in file.parts) + sorted(
    file for link in ("envs", "rewards") for file in (PACKAGE / link).rglob("*.py")
)
MODULES = {file.relative_to(PACKAGE).as_posix(): file for file in FILES}


def room_of(module: str) -> str:
    """The room of a dotted name inside the package: the longest one in the table."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in ARROWS:
            return ".".join(parts[:length])
    raise AssertionError(
        f"delethink.{module} is in no room: add it to ARROWS, and say what it may see"
    )


def dotted(path: str) -> str:
    """``serving/engine.py`` -> ``serving.engine``."""
    return path.removesuffix(".py").replace("/", ".").removesuffix("__init__").strip(".")


def room_of_file(path: str) -> str:
    return room_of(dotted(path)) if dotted(path) else ""


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere under ``tree``, by its absolute name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute, so that they can be searched for"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_seen(tree: ast.AST) -> set[str]:
    """The rooms that a module imports, inside functions and for type checkers too."""
    seen = set()
    for name in imports(tree):
        package, _, rest = name.partition(".")
        if package == "delethink":
            first = rest.partition(".")[0]
            known = (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file()
            seen.add(room_of(rest) if first and known else "")
    return seen


def runs_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when a module is imported: no function bodies, no type checking."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from runs_at_import(child)


def test_the_table_has_no_circle() -> None:
    done: set[str] = set()
    while len(done) < len(ARROWS):
        ready = {room for room, seen in ARROWS.items() if seen <= done} - done
        assert ready, f"these see each other: {sorted(set(ARROWS) - done)}"
        done |= ready


@pytest.mark.parametrize("path", MODULES)
def test_arrows_go_one_way(path: str) -> None:
    room = room_of_file(path)
    forbidden = rooms_seen(ast.parse(MODULES[path].read_text("utf-8"))) - ARROWS[room] - {room}
    assert not forbidden, f"delethink/{path} may not import {sorted(forbidden)}"


@pytest.mark.parametrize("path", [path for path in MODULES if room_of_file(path) in CORE])
def test_the_core_needs_no_extra(path: str) -> None:
    tree = ast.parse(MODULES[path].read_text("utf-8"))
    found = {
        name.partition(".")[0]
        for node in runs_at_import(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imports(node)
    }
    allowed = {"delethink", "numpy", "gymnasium"} | sys.stdlib_module_names
    assert found <= allowed, f"delethink/{path} imports {sorted(found - allowed)} when it is loaded"


@pytest.mark.parametrize("path", MODULES)
def test_only_the_registry_names_what_environments_and_rewards_hold(path: str) -> None:
    if room_of_file(path) in {"registry", "envs", "rewards"}:
        return
    tree = ast.parse(MODULES[path].read_text("utf-8"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    found = [
        text
        for text in texts
        if isinstance(text, str) and re.fullmatch(r"delethink\.(envs|rewards)[.:][\w.:]+", text)
    ]
    assert not found, f"delethink/{path} names {found}: ask delethink.registry for it"


@pytest.mark.parametrize(
    "code",
    [
        "import delethink",
        "import delethink.registry",
        "import delethink.envs, delethink.rewards",
        "sys.argv[1:] = ['--help']; from delethink.cli.main import main; main()",
        "sys.argv[1:] = ['eval', '--help']; from delethink.cli.main import main; main()",
        "sys.argv[1:] = ['train', '--help']; from delethink.cli.main import main; main()",
        "sys.argv[1:] = ['cost', '--thinking', '96k']; from delethink.cli.main import main; main()",
    ],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    loaded = "[m for m in sys.modules if m.partition('.')[0] in " + repr(HEAVY) + "]"
    say = f"import atexit, sys; atexit.register(lambda: print({loaded}, file=sys.stderr))\n"
    done = subprocess.run([sys.executable, "-c", say + code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_the_core_is_the_standard_library() -> None:
    code = "import sys, delethink; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
