"""The result of a check before a run, and the comparison of a size with what is there."""

from __future__ import annotations

from typing import Literal, NamedTuple

from delethink.training.system import Memory

BYTES_PER_GIB = 2**30
WARNING_SHARE = 0.9  # warn above this share of the free memory or disk


class Check(NamedTuple):
    """Result of a check."""

    name: str
    status: Literal["ok", "warning", "problem", "not checked"]
    found: str
    advice: str = ""


def compare_size(name: str, needed: float, memory: Memory, found: str, advice: str) -> Check:
    """Compare the bytes needed with the memory: a problem above it, a warning near what is free."""
    sizes = f"{gib(memory.total)} {memory.name}, {gib(memory.free)} of it free"
    text = f"{gib(needed)} of {sizes}: {found}"
    if needed > memory.total:
        return Check(name, "problem", text, advice)
    if needed > WARNING_SHARE * memory.free:
        return Check(name, "warning", text, f"{advice}; or end other programs")
    return Check(name, "ok", text)


def gib(size: float) -> str:
    """Return a size in GiB as text."""
    digits = 1 if size >= 0.1 * BYTES_PER_GIB else 3
    return f"{size / BYTES_PER_GIB:.{digits}f} GiB"
