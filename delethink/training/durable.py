"""Files that are whole after a crash: replaced in one move, and on the disk when we say so."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

PART = ".part"  # ends the name of what is being written


def write_text(path: Path, text: str) -> None:
    """Writes a whole file in place of the one before, never half of it.

    Raises:
        OSError: it cannot be written; the one before is as it was.
    """
    part = path.with_name(path.name + PART)
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync(path.parent)


def append_text(path: Path, text: str) -> None:
    """Appends to a file; all of it is on the disk afterwards.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if path.is_file():  # a device cannot be told to
            os.fsync(file.fileno())


def put_in_place(part: Path, path: Path) -> None:
    """Renames a folder that was written under another name, when all of it is on the disk.

    A folder that is there already goes away first.

    Raises:
        OSError: it cannot be renamed.
    """
    for file in part.rglob("*"):
        sync(file)
    sync(part)
    if path.exists():
        shutil.rmtree(path)
    part.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
