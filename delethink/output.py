"""Output paths, relative to ``DELETHINK_OUTPUT`` or the current folder."""

from __future__ import annotations

import os
from pathlib import Path

from delethink.errors import ConfigError

VARIABLE = "DELETHINK_OUTPUT"
_RAY_TEMPORARY = {"runtime_resources", "working_dir_files"}  # path parts of a Ray job's folder


def output_path(path: str | os.PathLike[str]) -> Path:
    """Return the folder for results.

    Args:
        path: the user's path, or a default; ``~`` is the home folder.

    Raises:
        ConfigError: the folder is inside a Ray job's working directory, which Ray deletes.
    """
    folder = os.environ.get(VARIABLE, "").strip()
    resolved = Path(folder).expanduser() / Path(path).expanduser()
    if _RAY_TEMPORARY <= set(resolved.absolute().parts):
        raise ConfigError(
            f"the results would go to {resolved} in the job's working directory, which Ray deletes "
            f"after the job: give an absolute output path, or set {VARIABLE} to a permanent "
            "folder, under env_vars of the job's runtime environment"
        )
    return resolved
