"""Answers as votes: what a trace answers, in a form in which equal answers are equal texts."""

from __future__ import annotations

import hashlib

from delethink.registry import resolve
from delethink.types import END_OF_THINKING

_LONGEST = 200  # letters of a vote; of a longer answer its digest is kept


def vote(text: str) -> str | None:
    """The answer that rewards find after the first end of thinking, or all that follows it.

    Returns:
        ``None`` where thinking never ends or nothing follows.

    White space is made plain. Answers that are equal by value but written in another way are two
    votes, so that maj@n is a lower bound where rewards compare values.
    """
    found: str | None = resolve("delethink.scoring", "answer")(text)
    if found is None:
        rest = text.partition(END_OF_THINKING)[2]
        found = "" if "\\boxed" in rest else rest  # an empty or unfinished box is no answer
    said = " ".join(found.split())
    if len(said) > _LONGEST:
        return f"digest {hashlib.blake2b(said.encode(), digest_size=16).hexdigest()}"
    return said or None
