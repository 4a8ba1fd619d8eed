"""Wheel, sdist and editable install hold the whole library, under its own name only.

Everything is built from a clean copy of the tree, outside it, and installed without the network: a
fresh environment sees the core dependencies of this one through a folder of links, and nothing else
of it, so what installs and imports there needs no extra. An index, a download, or a package that
happens to be installed here cannot change the verdict.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import delethink

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
LINKED = ("envs", "rewards")  # top-level folders that are linked into the package


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints; its failure is an assertion with its words."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


def tracked_files() -> list[Path]:
    """What a commit of the tree would hold: tracked files and new ones that are not ignored."""
    listed = run("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT).split("\0")
    return [Path(name) for name in listed if name and (ROOT / name).exists()]


def importable(files: Iterable[Path]) -> set[str]:
    """Where the files of the package belong in an installation."""
    paths = [file for file in files if file.suffix != ".md"]
    inside = {path.as_posix() for path in paths if path.parts[0] == "delethink"}
    linked = {f"delethink/{path.as_posix()}" for path in paths if path.parts[0] in LINKED}
    return (inside | linked) - {f"delethink/{name}" for name in LINKED}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the tree, links kept as links."""
    copy = tmp_path_factory.mktemp("tree")
    for file in tracked_files():
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, copy / file, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "-o", out, ".", cwd=tree)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "-o", out, ".", cwd=tree)
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel_from_sdist(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel_from_sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    source = next(path for path in out.iterdir() if path.is_dir())
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "-o", out, ".", cwd=source)
    return next(out.glob("*.whl"))


def link_distribution(name: str, folder: Path) -> None:
    """Makes an installed distribution importable from ``folder`` too."""
    files = distribution(name).files or []
    for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
        if not (folder / top).exists():
            (folder / top).symlink_to(Path(str(distribution(name).locate_file(top))))


def closure(requirements: Iterable[str]) -> set[str]:
    """The names of distributions that these requirements lead to, extras left out."""
    found: set[str] = set()
    waiting = list(requirements)
    while waiting:
        requirement = Requirement(waiting.pop())
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name not in found:
            found.add(requirement.name)
            waiting += distribution(requirement.name).requires or []
    return found


@pytest.fixture(scope="module")
def core_only(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel's own metadata requires without extras."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    folder = tmp_path_factory.mktemp("core")
    for name in closure(
        line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist:")
    ):
        link_distribution(name, folder)
    return folder


def fresh_python(folder: Path, core_only: Path) -> Path:
    """The interpreter of a new environment that sees ``core_only`` and nothing else."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=ROOT)
    python = folder / "bin" / "python"
    purelib = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    )
    (Path(purelib.strip()) / "core_only.pth").write_text(f"{core_only}\n")
    return python


def pip_install(python: Path, *what: str | Path, **environment: str) -> None:
    command: list[str | Path] = [sys.executable, "-m", "pip", "--python", python, "install"]
    run(*command, "--quiet", "--no-deps", "--no-index", *what, cwd=python.parent, **environment)


@pytest.fixture(scope="module", params=["wheel", "wheel_from_sdist", "editable"])
def installed(
    request: pytest.FixtureRequest, core_only: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The interpreter of an environment with delethink installed in one of the three ways."""
    folder = tmp_path_factory.mktemp(request.param)
    python = fresh_python(folder / "venv", core_only)
    if request.param != "editable":
        pip_install(python, request.getfixturevalue(request.param))
        return python
    source = folder / "source"
    shutil.copytree(request.getfixturevalue("tree"), source, symlinks=True)
    tools = folder / "tools"  # what an editable install builds with
    tools.mkdir()
    link_distribution("setuptools", tools)
    pip_install(python, "--no-build-isolation", "-e", source, PYTHONPATH=str(tools))
    return python


@pytest.mark.parametrize("kind", ["wheel", "wheel_from_sdist"])
def test_the_wheel_holds_every_file_of_the_library_and_no_other(
    kind: str, request: pytest.FixtureRequest
) -> None:
    with zipfile.ZipFile(request.getfixturevalue(kind)) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == importable(tracked_files())


def test_the_sdist_holds_files_where_the_tree_has_links(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive.getmembers() if member.issym()]


def test_envs_and_rewards_import_with_the_core_dependencies_alone(
    installed: Path, tmp_path: Path
) -> None:
    code = """
import importlib, pkgutil
import delethink.envs, delethink.rewards
for room in (delethink.envs, delethink.rewards):
    for module in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
        importlib.import_module(module.name)
"""
    run(installed, "-c", code, cwd=tmp_path)


def test_environments_play_with_the_core_dependencies_alone(
    installed: Path, tmp_path: Path
) -> None:
    code = """
import sys, gymnasium
from delethink.testing import check_thinking_env
for kind in ("Thinking", "TextThinking", "TokenThinking"):
    check_thinking_env(gymnasium.make(f"delethink.envs:delethink/{kind}-v0"), episodes=4)
print(sorted({"torch", "vllm", "ray", "trl", "transformers", "yaml"} & set(sys.modules)))
"""
    assert run(installed, "-c", code, cwd=tmp_path).strip() == "[]"


def test_the_version_is_the_same_everywhere(installed: Path, tmp_path: Path) -> None:
    code = "import delethink; from importlib.metadata import version as v; "
    printed = run(
        installed, "-c", f"{code}print(delethink.__version__, v('delethink'))", cwd=tmp_path
    )
    assert printed.split() == [delethink.__version__] * 2
    assert version("delethink") == delethink.__version__


def test_the_command_answers_help(installed: Path, tmp_path: Path) -> None:
    assert "train" in run(installed.parent / "delethink", "--help", cwd=tmp_path)


@pytest.mark.parametrize("name", LINKED)
def test_nothing_squats_a_common_name(installed: Path, tmp_path: Path, name: str) -> None:
    code = f"import importlib.util as u; print(u.find_spec({name!r}))"
    assert run(installed, "-c", code, cwd=tmp_path).strip() == "None"


@pytest.mark.parametrize("name", LINKED)
def test_the_folder_itself_teaches_how_to_import_it(installed: Path, tree: Path, name: str) -> None:
    code = f"try: import {name}\nexcept ImportError as e: print(e)"
    assert f"'delethink.{name}'" in run(installed, "-c", code, cwd=tree)


def test_the_links_are_relative() -> None:
    for name in LINKED:
        assert os.readlink(ROOT / "delethink" / name) == f"../{name}"
