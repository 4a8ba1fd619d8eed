"""Commands run by a user without rights, to whom the interpreter is readable nevertheless.

The interpreter or the checkout may be in a folder that only root can enter. A mount namespace of
the command's own has those folders in a place of the same name that everybody can enter.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence

NOBODY = 65534


def missing_tool() -> str | None:
    """Return why this machine cannot run such commands, or ``None``."""
    if os.geteuid() != 0:
        return "only root can become another user"
    missing = [tool for tool in ("unshare", "setpriv", "mount") if shutil.which(tool) is None]
    return f"without {missing[0]}" if missing else None


def as_nobody(command: Sequence[str], folders: Sequence[str], keep: str) -> list[str]:
    """Return the command of another user.

    Args:
        command: program and arguments.
        folders: what the command reads.
        keep: an empty folder, to hold mounts.
    """
    lines = ["set -e", f"mount -t tmpfs none {shlex.quote(keep)}"]
    shut: dict[str, list[tuple[str, str]]] = {}
    for number, folder in enumerate(_topmost(folders)):
        if (top := _shut_ancestor(folder)) is not None:
            kept = f"{keep}/{number}"
            lines.append(f"mkdir {kept}; mount --bind {shlex.quote(folder)} {kept}")
            shut.setdefault(top, []).append((kept, shlex.quote(folder)))
    for top, inner in shut.items():
        lines.append(f"mount -t tmpfs -o mode=755 none {shlex.quote(top)}")
        lines += [f"mkdir -p {folder}; mount --bind {kept} {folder}" for kept, folder in inner]
    user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    lines.append("exec " + shlex.join(["setpriv", *user, "--inh-caps=-all", *command]))
    return [
        "unshare",
        "--mount",
        "--propagation=private",
        "sh",
        "-c",
        "umask 022\n" + "\n".join(lines),
    ]


def _topmost(folders: Sequence[str]) -> list[str]:
    """Return the folders that are not below another one."""
    found: list[str] = []
    for folder in sorted({os.path.realpath(name) for name in folders if os.path.isdir(name)}):
        if not any(folder.startswith(f"{other}/") for other in found):
            found.append(folder)
    return found


def _shut_ancestor(folder: str) -> str | None:
    """Return the first folder on the way that others may not enter."""
    parts = folder.split("/")[1:-1]
    for length in range(1, len(parts) + 1):
        path = "/" + "/".join(parts[:length])
        if not os.stat(path).st_mode & 0o001:
            return path
    return None
