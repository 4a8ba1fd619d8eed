"""The tests of the rule notice when it is broken: each mutation is made in a copy of the library.

A test that passes whatever the rule does shows nothing; here the rule is changed on purpose and the
tests that hold it must fail.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
TESTS = ("test_chunking.py", "test_env_laws.py", "test_carryover.py")

# What is broken: (file, line as it is, line as it is not).
MUTATIONS = {
    "one token too many is carried": (
        "delethink/carryover.py",
        "return ids[max(0, len(ids) - count) :]",
        "return ids[max(0, len(ids) - count - 1) :]",
    ),
    "the head is dropped": (
        "delethink/carryover.py",
        "head, window = window[: self.head_size], window[self.head_size :]",
        "head, window = window[:0], window[self.head_size :]",
    ),
    "later chunks are as long as the first": (
        "delethink/chunking.py",
        "room = self.spec.context_size - min(inside, self.spec.carryover_size)",
        "room = self.spec.context_size",
    ),
    "carried tokens are no material for the next carryover": (
        "delethink/chunking.py",
        "self.spec.carry(self.head, self.tail + output_ids)",
        "self.spec.carry(self.head, output_ids)",
    ),
    "an abort is a boundary": (
        "delethink/chunking.py",
        "if stop is not StopReason.LENGTH:",
        "if stop is StopReason.EOS:",
    ),
    "one chunk more than max_chunks": (
        "delethink/chunking.py",
        "num_chunks == self.spec.max_chunks or",
        "num_chunks > self.spec.max_chunks or",
    ),
    "the bound of a policy is not checked": (
        "delethink/chunking.py",
        "if bound is not None and count > bound:",
        "if bound is None and count > 10**9:",
    ),
    "a written carryover is not counted as sampled": (
        "delethink/chunking.py",
        "self.num_sampled + count, self.num_written + count",
        "self.num_sampled + count, self.num_written",
    ),
    "a boundary by predicate is not cut at": (
        "delethink/chunking.py",
        "return output_ids[:count], StopReason.LENGTH",
        "return output_ids, stop",
    ),
    "the environment shows the context before": (
        "envs/thinking.py",
        "prompt_ids = state.prompt_ids",
        "prompt_ids = state.query_ids",
    ),
    "a token-level chunk ends one token late": (
        "envs/token_thinking.py",
        "self._used - self._first == self._limit or (",
        "self._used - self._first == self._limit + 1 or (",
    ),
}


def copy_of_the_library(folder: Path) -> Path:
    for name in ("delethink", "envs", "rewards", "tests/unit", "tests/conftest.py"):
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "assets")
            shutil.copytree(source, target, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, target)
    return folder


def failures(folder: Path) -> int:
    """How many tests of the rule fail against the library in ``folder``: it stops at the first."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["--import-mode=importlib", *(f"tests/unit/{name}" for name in TESTS)]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = re.search(r"(\d+) (?:failed|error)", done.stdout)
    return int(found.group(1)) if found else 0


def test_every_line_that_is_to_be_broken_is_there_once() -> None:
    for name, line, _ in MUTATIONS.values():
        assert (ROOT / name).read_text("utf-8").count(line) == 1, (name, line)


@pytest.mark.slow
def test_the_rule_as_it_is_passes(tmp_path: Path) -> None:
    assert failures(copy_of_the_library(tmp_path)) == 0


@pytest.mark.parametrize(
    "mutation",
    [
        pytest.param(name, marks=pytest.mark.slow if i >= 5 else ())
        for i, name in enumerate(MUTATIONS)
    ],
)
def test_a_broken_rule_is_noticed(mutation: str, tmp_path: Path) -> None:
    name, line, broken = MUTATIONS[mutation]
    path = copy_of_the_library(tmp_path) / name
    path.write_text(path.read_text("utf-8").replace(line, broken), "utf-8")
    assert failures(tmp_path) >= 1, f"no test noticed that {mutation}"
