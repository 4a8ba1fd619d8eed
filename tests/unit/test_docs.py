"""Examples of the documentation run, its commands parse, and its keys exist."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
import xml.dom.minidom
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from delethink.cli.main import parse
from delethink.config import EngineConfig, load_recipe, parse_engine
from delethink.registry import names

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("recipes/*/README.md"))]
PAGES += sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
QUICKSTART = ROOT / "recipes" / "quickstart" / "recipe.yaml"
RECIPE: dict[str, Any] = {
    "name": "documented",
    "model": "toy",
    "task": {"name": "automaton"},
    "thinking": {"context_size": 96, "carryover_size": 48, "max_chunks": 8, "head_size": 0},
    "training": {"max_steps": 1, "num_generations": 4},
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """Code blocks of a page, without the indentation of the list that they stand in."""
    fences = r"^( *)```(.*)\n((?:.*\n)*?) *```$"
    found = re.findall(fences, page.read_text("utf-8"), flags=re.MULTILINE)
    return [
        re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)
        for indent, named, code in found
        if named == language
    ]


def command_lines(page: Path) -> Iterator[str]:
    """Lines of shell blocks, with continued lines joined and comments and prompts removed."""
    for code in blocks(page, ""):
        for line in code.replace("\\\n", " ").splitlines():
            yield line.partition("  #")[0].removeprefix("$ ").strip()


# Expected beginning of what the first examples of a page print.
PRINTED = {
    "docs/guide/environment.md": ["1.0 completed"],
    "docs/guide/traces.md": ["replayed 1.0\nscored {'length': "],
    "docs/guide/cost.md": ["3."],  # times fewer GPU-hours
}
# What the reader of README.md brings.
READERS = """
query_ids, output_ids = (5, 6, 7), [5] * 64
def sample(prompt_ids, max_new_tokens):
    return [5] * max_new_tokens, StopReason.LENGTH
"""
# Run by test_cli_eval.py and test_serve_clients.py, as they sample with a real engine.
REAL_ENGINE = ("import Evaluation, evaluate", "openai.OpenAI(")
# Run by the slow tests of the adapters, in environments that have the peers.
PEERS = {f"docs/guide/integrations_{peer}.md" for peer in ("openenv", "tinker", "trl", "verifiers")}
EXAMPLES = [
    (name_of(page), READERS + code if page.parent == ROOT else code, printed)
    for page in PAGES
    for code, printed in itertools.zip_longest(
        blocks(page, "python"), PRINTED.get(name_of(page), []), fillvalue=""
    )
    if name_of(page) not in PEERS and not any(words in code for words in REAL_ENGINE)
]


@pytest.mark.parametrize(("page", "code", "printed"), EXAMPLES)
def test_an_example_runs(page: str, code: str, printed: str, tmp_path: Path) -> None:
    assert code, f"{page} has fewer examples than are expected to print something"
    (tmp_path / "example.py").write_text(code, "utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "example.py"],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(printed)
    for figure in tmp_path.glob("*.svg"):
        xml.dom.minidom.parse(str(figure))
        assert (ROOT / page).with_name(figure.name).exists(), "the page shows this figure"


def test_the_promised_sizes_hold() -> None:
    (loop, *_) = blocks(DOCS / "guide" / "environment.md", "python")
    assert len(loop[loop.index("env =") :].strip().splitlines()) == 10
    (policy, *_) = blocks(DOCS / "reference" / "carryovers.md", "python")
    own = policy[policy.index("@register") : policy.index("check_carryover(")]
    assert len(own.strip().splitlines()) <= 20


def commands(page: Path) -> Iterator[str]:
    """Yield the ``delethink`` commands of a page, in shell blocks and in text."""
    inline = re.findall(r"`(delethink [a-z][^`]*)`", page.read_text("utf-8"))
    whole = [" ".join(code.split()) for code in inline if len(code.split()) > 3]  # else a name
    for line in [*command_lines(page), *whole]:
        if found := re.search(r"(?:^|[ /])(delethink (?=[a-z]).*)", line):
            yield found[1]


COMMANDS = [(name_of(page), line) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_is_one(page: str, line: str, tmp_path: Path) -> None:
    line = line.replace("…", "").replace("$(git describe --always --dirty --abbrev=40)", "")
    arguments = parse(shlex.split(line)[1:])
    values = list(getattr(arguments, "values", None) or [])
    command = shlex.split(line)[1]
    if command in ("train", "doctor") and arguments.recipe:
        load_recipe(QUICKSTART, values)
        if arguments.recipe.startswith("recipes/"):
            assert (ROOT / arguments.recipe).exists()
    elif command in ("eval", "probe", "serve"):
        parse_engine([value for value in values if "=" in value])


@pytest.mark.parametrize("page", sorted((DOCS / "guide").glob("*.md")), ids=name_of)
def test_a_guide_is_short(page: Path) -> None:
    most = 120 if page.name == "rollouts.md" else 150
    assert len(page.read_text("utf-8").splitlines()) <= most


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 25
    assert {line.split()[1] for _, line in COMMANDS} >= {"train", "eval", "probe", "cost", "tasks"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_scripts_and_their_options_exist(page: Path) -> None:
    for line in command_lines(page):
        found = re.search(r"(?:python |\./)((?:benchmarks|scripts|docs)/[\w./]+)(.*)", line)
        if found is None or line.startswith(("git", "ray")):
            continue
        script = ROOT / found[1]
        assert script.exists(), line
        for option in re.findall(r"--[a-z-]+", found[2]):
            assert option in script.read_text("utf-8"), f"{line}: no {option}"


@pytest.mark.parametrize(
    ("page", "text"), [(name_of(page), text) for page in PAGES for text in blocks(page, "yaml")]
)
def test_a_section_of_a_recipe_is_one(page: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | yaml.safe_load(text)))
    load_recipe(path)


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=name_of)
def test_a_dotted_key_exists(page: Path) -> None:
    reference = (DOCS / "reference" / "configuration.md").read_text("utf-8")
    known = set(re.findall(r"^\| `([\w.]+)` \|", reference, flags=re.MULTILINE))
    sections = {key.partition(".")[0] for key in known if "." in key} - {"rewards"}
    for key in re.findall(r"`([a-z_]+\.[a-z_0-9.]+?)(?:=[^`]*)?`", page.read_text("utf-8")):
        if key == "engine.key" or key.startswith("task.args.") or key.endswith(".py"):
            continue
        if key.partition(".")[0] in sections:
            assert key in known, f"{name_of(page)}: `{key}` is no key of a recipe"


def test_the_settings_of_engines_are_all_there_with_their_defaults() -> None:
    (text,) = blocks(DOCS / "guide" / "rollouts.md", "yaml")
    assert yaml.safe_load(text)["engine"] == EngineConfig().model_dump()


def test_the_recipe_in_the_training_guide_is_the_quickstart() -> None:
    (text,) = blocks(DOCS / "guide" / "training.md", "yaml")
    assert yaml.safe_load(text) == yaml.safe_load(QUICKSTART.read_text("utf-8"))


@pytest.mark.parametrize("group", ["tasks", "rewards", "carryovers", "boundaries"])
def test_every_name_is_in_a_table(group: str) -> None:
    page = "rewards.md" if group in ("tasks", "rewards") else "carryovers.md"
    text = (DOCS / "reference" / page).read_text("utf-8")
    for name in names(f"delethink.{group}"):
        assert re.search(rf"^\|.*`{name}(?:/NAME)?`.*\|", text, flags=re.MULTILINE), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_have_one_width(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for line in text.splitlines():
        assert len(line) <= 100 or line.lstrip().startswith(("|", "![", "<!--")), line


@pytest.mark.integration
def test_reference_pages_are_those_of_the_code() -> None:
    done = subprocess.run(
        [sys.executable, DOCS / "_generate.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.integration
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", tmp_path / "doctrees", DOCS, tmp_path / "site"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "reference" / "configuration.html").exists()
