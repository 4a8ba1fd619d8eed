"""What a process sets for itself before it samples or trains; each in a process of its own."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from delethink.cli import train

SET_UP = "from delethink.cli.process import set_up_process; set_up_process()"


def thresholds_after(before: str) -> tuple[int, ...]:
    """Python's thresholds once a process has set itself up."""
    code = f"import gc; {before}; {SET_UP}; print(gc.get_threshold())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return tuple(map(int, said.stdout.strip("()\n").split(", ")))


def test_garbage_is_looked_for_rarely() -> None:
    assert thresholds_after("pass")[0] > 10_000


def test_training_sets_its_process_up_before_it_reads_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The checks import torch and transformers, which read their variables at import."""
    calls = []

    def prepare(recipe: Any) -> Any:
        calls.append("checks")
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "set_up_process", lambda: calls.append("set up"))
    monkeypatch.setattr(train, "prepare", prepare)
    recipe = str(Path(__file__).parents[2] / "recipes" / "quickstart" / "recipe.yaml")
    with pytest.raises(KeyboardInterrupt):
        train.run(argparse.Namespace(recipe=recipe, values=[]))
    assert calls == ["set up", "checks"]
