"""Where results go: relative paths start from ``DELETHINK_OUTPUT``, or from the current folder."""

from __future__ import annotations

import os
from pathlib import Path

from delethink.errors import ConfigError

VARIABLE = "DELETHINK_OUTPUT"
_TEMPORARY = {"runtime_resources", "working_dir_files"}  # parts of the path of a Ray job's folder


def output_path(asked: str | os.PathLike[str]) -> Path:
    """The folder that results are written to.

    Args:
        asked: by the user, or a default; ``~`` is the home folder.

    Raises:
        ConfigError: it lies where Ray unpacks the files of a job, and deletes them again.
    """
    folder = os.environ.get(VARIABLE, "").strip()
    path = Path(folder).expanduser() / Path(asked).expanduser()
    if _TEMPORARY <= set(path.absolute().parts):
        raise ConfigError(
            f"the results would go to {path} in the job's working directory, which Ray deletes "
            f"when the job is gone: give an absolute output path, or set {VARIABLE} to a folder "
            "that stays, under env_vars of the job's runtime environment"
        )
    return path
