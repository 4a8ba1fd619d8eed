"""Locks of the study: one driver a folder, one process a cell."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from delethink.errors import ConfigError


@contextmanager
def locked(path: Path, task: str) -> Iterator[None]:
    """Hold a lock file with the id of this process; it is free again when the process ends.

    Args:
        path: the lock file, made if necessary.
        task: words for the error, such as ``"the study in runs"``.

    Raises:
        ConfigError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"{task} is running already, as process {file.read().strip() or 'unknown'}; wait "
                "for it or stop it first"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        # The file stays: removing it would let two processes lock two files of one name.
        yield
