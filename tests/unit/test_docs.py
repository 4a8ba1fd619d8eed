"""Every example of the documentation runs, as a program of its own."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import xml.dom.minidom
from pathlib import Path
from typing import Any

import pytest
import yaml

from delethink.config import RolloutConfig, ThinkingConfig, load_recipe
from delethink.registry import names

DOCS = Path(__file__).parents[2] / "docs"
RECIPE: dict[str, Any] = {
    "name": "documented",
    "model": "toy",
    "task": {"name": "automaton"},
    "thinking": {"context_size": 96, "carryover_size": 48, "max_chunks": 8, "head_size": 0},
    "training": {"max_steps": 1, "num_generations": 4},
}


def blocks(name: str, language: str) -> list[str]:
    text = (DOCS / name).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


PRINTED = {
    "environment.md": ["1.0 completed", "", "", "", "replayed 1.0\nscored {'length': ", ""],
    "rollouts.md": ["{'a': {0}, 'b': {1}}"],
    "cost.md": ["3."],  # times fewer GPU-hours
}
EXAMPLES = [
    (page.name, code, printed)
    for page in sorted(DOCS.glob("*.md"))
    for code, printed in itertools.zip_longest(
        blocks(page.name, "python"), PRINTED.get(page.name, []), fillvalue=""
    )
]


@pytest.mark.parametrize(("page", "code", "printed"), EXAMPLES)
def test_an_example_runs(page: str, code: str, printed: str, tmp_path: Path) -> None:
    assert code, f"docs/{page} has fewer examples than are expected to print something"
    (tmp_path / "example.py").write_text(code, "utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "example.py"],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(DOCS.parent), *sys.path]), "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(printed)
    for figure in tmp_path.glob("*.svg"):
        xml.dom.minidom.parse(str(figure))
        assert (DOCS / figure.name).exists(), "the page shows the figure that the example makes"


def test_the_promised_sizes_hold() -> None:
    loop, policy, *_ = blocks("environment.md", "python")
    body = loop[loop.index("env =") :]
    assert len(body.strip().splitlines()) == 10
    own = policy[policy.index("@register") : policy.index("check_carryover(")]
    assert len(own.strip().splitlines()) <= 20


@pytest.mark.parametrize("text", blocks("environment.md", "yaml"))
def test_a_piece_of_a_recipe_is_one(text: str) -> None:
    ThinkingConfig.model_validate(yaml.safe_load(text)["thinking"]).spec()


@pytest.mark.parametrize(
    "text", [*blocks("tasks_and_rewards.md", "yaml"), *blocks("rollouts.md", "yaml")]
)
def test_a_section_of_a_recipe_is_one(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | yaml.safe_load(text)))
    load_recipe(path)


def test_the_settings_of_rollouts_are_all_there_with_their_defaults() -> None:
    (text,) = blocks("rollouts.md", "yaml")
    assert yaml.safe_load(text)["rollout"] == RolloutConfig().model_dump()


@pytest.mark.parametrize("group", ["tasks", "rewards"])
def test_every_name_is_in_a_table(group: str) -> None:
    text = (DOCS / "tasks_and_rewards.md").read_text("utf-8")
    for name in names(f"delethink.{group}"):
        assert re.search(rf"^\|.*`{name}(?:/NAME)?`.*\|", text, flags=re.MULTILINE), name
