"""Answers as votes: what a trace answers, in a form in which equal answers are equal texts."""

from __future__ import annotations

import hashlib

from delethink.types import END_OF_THINKING

_BOX = "\\boxed{"
_LONGEST = 200  # letters of a vote; of a longer answer its digest is kept


def vote(text: str) -> str | None:
    """What follows the first end of thinking: its last box, or all of it.

    Returns:
        ``None`` where thinking never ends or nothing follows.

    White space is made plain. Answers that are equal by value but written in another way are two
    votes, so that maj@n is a lower bound where rewards compare values.
    """
    _, _, answer = text.partition(END_OF_THINKING)
    boxed = _last_box(answer)
    said = " ".join((answer if boxed is None else boxed).split())
    if len(said) > _LONGEST:
        return f"digest {hashlib.blake2b(said.encode(), digest_size=16).hexdigest()}"
    return said or None


def _last_box(text: str) -> str | None:
    """What is in the last box, whose braces are in pairs."""
    begin = text.rfind(_BOX)
    if begin < 0:
        return None
    begin += len(_BOX)
    depth = 1
    for i, letter in enumerate(text[begin:], begin):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if not depth:
            return text[begin:i]
    return None
