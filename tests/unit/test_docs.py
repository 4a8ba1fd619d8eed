"""Every example of the documentation runs, as a program of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.dom.minidom
from pathlib import Path

import pytest
import yaml

from delethink.config import ThinkingConfig

DOCS = Path(__file__).parents[2] / "docs"


def blocks(name: str, language: str) -> list[str]:
    text = (DOCS / name).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


EXAMPLES = {re.sub(r"\W+", " ", code)[:40]: code for code in blocks("environment.md", "python")}
PRINTED = ["1.0 completed", "", "", "", "replayed 1.0\nscored {'length': ", ""]


@pytest.mark.parametrize(("code", "printed"), list(zip(EXAMPLES.values(), PRINTED, strict=True)))
def test_an_example_runs(code: str, printed: str, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(code, "utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "example.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(DOCS.parent), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(printed)
    for figure in tmp_path.glob("*.svg"):
        xml.dom.minidom.parse(str(figure))
        assert (DOCS / figure.name).exists(), "the page shows the figure that the example makes"


def test_the_promised_sizes_hold() -> None:
    loop, policy, *_ = EXAMPLES.values()
    body = loop[loop.index("env =") :]
    assert len(body.strip().splitlines()) == 10
    own = policy[policy.index("@register") : policy.index("check_carryover(")]
    assert len(own.strip().splitlines()) <= 20


@pytest.mark.parametrize("text", blocks("environment.md", "yaml"))
def test_a_piece_of_a_recipe_is_one(text: str) -> None:
    ThinkingConfig.model_validate(yaml.safe_load(text)["thinking"]).spec()
