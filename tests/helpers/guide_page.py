"""Blocks and commands of a guide, so that a test runs what a reader reads."""

from __future__ import annotations

import re
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "guide"


def blocks(page: str, language: str = "") -> list[str]:
    """Return the code blocks of a language, in order; shell blocks have none."""
    fenced = re.findall(r"^```(.*)\n((?:.*\n)*?)```$", (GUIDE / page).read_text("utf-8"), re.M)
    return [code for named, code in fenced if named == language]


def command_lines(page: str) -> list[str]:
    """Return the lines of the shell blocks, in order, with continued lines joined."""
    return [
        " ".join(line.split())
        for code in blocks(page)
        for line in code.replace("\\\n", " ").splitlines()
    ]
