"""Reasons of failed rewards, as text: type and message of an exception, and its place."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

MAX_REASON_CHARACTERS = 500
# Frames of the library and of installed packages say nothing about a user's reward.
_INSTALLED = tuple(
    f"{folder}{os.sep}"
    for folder in {
        str(Path(__file__).parents[1]),
        *(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    }
)


def describe(error: BaseException) -> str:
    """Return type and message of an exception, shortened, and the line of the user's code."""
    try:
        text = str(error)
    except Exception:  # an exception of the code under test
        text = ""
    reason, place = f"{type(error).__name__}: {text}", _place(error)
    return reason[: MAX_REASON_CHARACTERS - len(place)] + place


def _place(error: BaseException) -> str:
    """Return file, line and function of the innermost frame outside of installed code."""
    place, step = "", error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        if not code.co_filename.startswith((*_INSTALLED, "<")):
            name = Path(code.co_filename).name[-60:]
            place = f" ({name}, line {step.tb_lineno}, in {code.co_name[:60]})"
        step = step.tb_next
    return place
