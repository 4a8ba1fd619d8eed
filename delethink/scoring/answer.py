r"""Finds the final answer of a trace: one linear pass over the text, whatever the text is.

The answer is what stands in the last complete ``\boxed{...}`` after the end of thinking. Where
there is no complete box, it is the last ``<answer>...</answer>``; where there is none of those
either, what the last "the answer is ...", "Answer: ..." or ``#### ...`` says. A number that merely
stands somewhere is no answer: it could be any.
"""

from __future__ import annotations

import hashlib
import re

from delethink.types import END_OF_THINKING

_TOKEN = re.compile(
    r"\\(?:boxed|fbox)\s{0,9}(?P<bare>-?\d(?:[\d,./]{0,99}\d)?)?|\\.|[{}]", re.DOTALL
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,9}(?=\{)")
_DEEPEST = 20  # braces around an answer that are taken off
_TAG = re.compile(r"<answer>((?:(?!<answer>|</answer>).){1,5000})</answer>", re.DOTALL)
_PHRASE = re.compile(
    r"(?:\banswer\W{0,8}?(?:\s{0,9}is\b)?\s{0,9}[:=]|\banswer\s{1,9}is\b|^\s{0,9}\#{4})"
    r"[ \t*]{0,9}(?P<said>[^\n]{1,500})",
    re.IGNORECASE | re.MULTILINE,
)


def final_answer(text: str, end: str | None = END_OF_THINKING) -> str | None:
    """What follows the first end of thinking, stripped; ``None`` where thinking never ends.

    ``text`` is the whole sampled trace, stitched over its chunks, so that it does not matter
    whether the mark or the answer lies across a boundary. With ``end=None`` all of it is the
    answer, as of a model that does not think.
    """
    if end is None:
        return text.strip()
    _, mark, answer = text.partition(end)
    return answer.strip() if mark else None


def extract_answer(text: str, end: str | None = END_OF_THINKING) -> str | None:
    r"""The final answer in ``text``, without its box; ``None`` where there is none.

    Example: ``"... so 3.</think>It is \boxed{\frac{1}{2}}."`` gives ``"\frac{1}{2}"``.
    """
    answer = final_answer(text, end)
    if answer is None:
        return None
    found = last_box(answer)
    if found is None:
        found = _last_phrase(answer)
    return found.strip() if found and found.strip() else None


def last_box(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{...}`` of ``text``; of nested ones the outer."""
    span = None
    open_braces: list[int | None] = []  # where a box's content begins; None for any other brace
    box_at = -1  # where a brace must stand to open a box
    for token in _TOKEN.finditer(text):
        if token.group() == "{":
            open_braces.append(token.end() if token.start() == box_at else None)
        elif token.group() == "}":
            begin = open_braces.pop() if open_braces else None
            if begin is not None and text[begin : token.start()].strip():  # not an empty box
                span = (begin, token.start())
        elif token.group("bare"):
            span = token.span("bare")
        elif token.group().startswith(("\\boxed", "\\fbox")):
            box_at = token.end()
    if span is None:
        return None
    return _unwrap(text[slice(*span)])


def _unwrap(content: str) -> str:
    """Without boxes in it and without braces around all of it."""
    content = _BOX.sub("", content).strip()
    for _ in range(_DEEPEST):
        if not content.startswith("{") or not _closes_at_end(content):
            return content
        content = content[1:-1].strip()
    return content


def _closes_at_end(text: str) -> bool:
    """Whether the brace that ``text`` begins with is closed by its last character."""
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return token.end() == len(text)
    return False


def _last_phrase(text: str) -> str | None:
    found = [m.group(1) for m in _TAG.finditer(text)]
    found = found or [_tidy(m.group("said")) for m in _PHRASE.finditer(text)]
    return found[-1] if found else None


def _tidy(said: str) -> str:
    """Without the end of the sentence, emphasis and dollar signs around it."""
    said = said.strip().strip("*_ ")
    if said.endswith(".") and not said.endswith(".."):
        said = said[:-1]
    said = said.strip("*_ ")
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if said.startswith(opening) and said.endswith(closing) and len(said) > len(opening):
            return said[len(opening) : -len(closing)]
    return said


_LONGEST = 200  # letters of a vote; of a longer answer its digest is kept


def vote(text: str) -> str | None:
    """The answer that rewards find after the first end of thinking, or all that follows it.

    Returns:
        ``None`` where thinking never ends or nothing follows.

    White space is made plain. Answers that are equal by value but written in another way are two
    votes, so that maj@n is a lower bound where rewards compare values.
    """
    found = extract_answer(text)
    if found is None:
        rest = text.partition(END_OF_THINKING)[2]
        found = "" if "\\boxed" in rest else rest  # an empty or unfinished box is no answer
    said = " ".join(found.split())
    if len(said) > _LONGEST:
        return f"digest {hashlib.blake2b(said.encode(), digest_size=16).hexdigest()}"
    return said or None
