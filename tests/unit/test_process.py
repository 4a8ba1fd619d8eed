"""What a process sets for itself before it samples or trains; each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from delethink.cli import main

SET_UP = "from delethink.cli.process import set_up_process; set_up_process()"


def thresholds_after(before: str) -> tuple[int, ...]:
    """Python's thresholds once a process has set itself up."""
    code = f"import gc; {before}; {SET_UP}; print(gc.get_threshold())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return tuple(map(int, said.stdout.strip("()\n").split(", ")))


def test_garbage_is_looked_for_rarely() -> None:
    assert thresholds_after("pass")[0] > 10_000


RUN = """
import argparse, sys
from delethink.cli import train

def stop():
    print([name for name in ("torch", "transformers", "huggingface_hub") if name in sys.modules])
    sys.exit(7)

train.set_up_process = stop
train.run(argparse.Namespace(recipe="recipes/quickstart/recipe.yaml", values=[]))
"""


def test_training_sets_its_process_up_before_it_loads_torch() -> None:
    """Torch and transformers read their variables at import: threads that wait, bars in logs."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", RUN], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (7, "[]"), done.stderr


def test_an_object_that_an_interrupt_leaves_half_made_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class HalfMade:
        def __del__(self) -> None:
            raise RuntimeError("cannot close what is not open")

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    half_made = HalfMade()
    with pytest.raises(KeyboardInterrupt):
        main._interrupt()
    del half_made
    assert capfd.readouterr().err == "\ninterrupted: closing files and engines\n"
