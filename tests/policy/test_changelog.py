"""The changelog speaks of this version first."""

from __future__ import annotations

import re
from pathlib import Path

import delethink


def test_the_newest_entry_is_this_version() -> None:
    text = (Path(__file__).parents[2] / "CHANGELOG.md").read_text("utf-8")
    versions = re.findall(r"^## \[?(\d+\.\d+\.\d+)\]?", text, flags=re.MULTILINE)
    assert versions[0] == delethink.__version__
    assert len(versions) == len(set(versions))
