"""An environment of its own for a package whose pins conflict with the library's."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".peers"  # kept between runs, like .venv; git ignores it
STAMP = "installed"  # written last: the environment is whole
INSTALL_TIMEOUT_S = 1800


def peer_python(
    name: str,
    *requirements: str,
    editable: tuple[Path, ...] = (ROOT,),
    bare: tuple[str, ...] = (),
) -> Path:
    """Return the interpreter of an environment, made at the first call and whenever it changes.

    Args:
        name: folder of the environment under ``.peers``.
        requirements: packages by name and version; a release of torch comes first and alone.
        editable: folders of projects that are installed in place, the library by default.
        bare: packages that come last and without what they require, where that conflicts.

    Raises:
        AssertionError: pip failed, with the end of its output.
    """
    projects = [folder.resolve() for folder in editable]
    wanted = [sys.version, *requirements, *map(str, projects), *bare]
    wanted += [(folder / "pyproject.toml").read_text("utf-8") for folder in projects]
    digest = hashlib.sha256("\n".join(wanted).encode()).hexdigest()
    place = FOLDER / name
    python = place / "bin" / "python"
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run side by side
        stamp = place / STAMP
        if stamp.exists() and stamp.read_text("utf-8") == digest:
            return python
        shutil.rmtree(place, ignore_errors=True)
        venv.create(place, with_pip=False, symlinks=True)
        first = [name for name in requirements if name.startswith("torch==")]
        rest = [name for name in requirements if name not in first]
        if first:
            _install(python, *first)
        _install(python, *first, *rest, *(f"--editable={folder}" for folder in projects))
        if bare:
            _install(python, "--no-deps", *bare)
        stamp.write_text(digest, "utf-8")
    return python


def _install(python: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    command += ["--disable-pip-version-check", "--no-compile", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    assert ended.returncode == 0, f"{' '.join(arguments)}: {(ended.stdout + ended.stderr)[-4000:]}"
