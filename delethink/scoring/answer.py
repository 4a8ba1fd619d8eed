r"""Extraction of the final answer of a trace, in linear time for any text.

The answer is the content of the last complete ``\boxed{...}`` after the end of thinking. Without a
complete box, the last ``<answer>...</answer>`` counts. Without both, the last "the answer is ...",
"Answer: ..." or ``#### ...`` counts. A number without such a mark is no answer.
"""

from __future__ import annotations

import hashlib
import re

from delethink.types import END_OF_THINKING

_TOKEN = re.compile(
    r"\\(?:boxed|fbox)\s{0,9}(?P<bare>-?\d(?:[\d,./]{0,99}\d)?)?|\\.|[{}]", re.DOTALL
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,9}(?=\{)")
_MAX_OUTER_BRACES = 20
_TAG = re.compile(r"<answer>((?:(?!<answer>|</answer>).){1,5000})</answer>", re.DOTALL)
_PHRASE = re.compile(
    r"(?:\banswer\W{0,8}?(?:\s{0,9}is\b)?\s{0,9}[:=]|\banswer\s{1,9}is\b|^\s{0,9}\#{4})"
    r"[ \t*]{0,9}(?P<said>[^\n]{1,500})",
    re.IGNORECASE | re.MULTILINE,
)


def final_answer(text: str, end: str | None = END_OF_THINKING) -> str | None:
    """Return the stripped text after the first end of thinking; ``None`` without one.

    ``text`` is the whole trace, joined over its chunks, so boundaries do not affect the result.
    With ``end=None`` the whole text is the answer, for models without thinking.
    """
    if end is None:
        return text.strip()
    _, mark, answer = text.partition(end)
    return answer.strip() if mark else None


def extract_answer(text: str, end: str | None = END_OF_THINKING) -> str | None:
    r"""Return the final answer of ``text`` without its box, or ``None``.

    Example: ``"... so 3.</think>It is \boxed{\frac{1}{2}}."`` gives ``"\frac{1}{2}"``.
    """
    answer = final_answer(text, end)
    if answer is None:
        return None
    found = last_box(answer)
    if found is None:
        said = [m[1] for m in _TAG.finditer(answer)]
        said = said or [_tidy(m["said"]) for m in _PHRASE.finditer(answer)]
        found = said[-1] if said else None
    return found.strip() if found and found.strip() else None


def answer_span(text: str, end: str | None = END_OF_THINKING) -> tuple[int, int] | None:
    """Return the place of the final answer in ``text``, as characters: begin and end.

    Without an extractable answer it is all text after the end of thinking. ``None`` without one.
    With ``end=None`` the whole text is searched, for models without thinking.
    """
    mark = 0 if end is None else text.find(end)
    if mark < 0:
        return None
    start = mark + len(end or "")
    found = extract_answer(text, end) or text[start:].strip()
    if not found:
        return None
    in_braces = text.rfind("{" + found, start)
    begin = in_braces + 1 if in_braces >= 0 else text.rfind(found, start)
    return None if begin < 0 else (begin, begin + len(found))


def last_box(text: str) -> str | None:
    r"""Return the content of the last complete ``\boxed{...}``, the outer one if nested."""
    span = None
    open_braces: list[int | None] = []  # start of a box's content; None for other braces
    box_at = -1  # position at which a brace opens a box
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
    content = _BOX.sub("", text[slice(*span)]).strip()
    for _ in range(_MAX_OUTER_BRACES):
        if not content.startswith("{") or not _closes_at_end(content):
            return content
        content = content[1:-1].strip()
    return content


def _closes_at_end(text: str) -> bool:
    """Return whether the last character closes the first brace."""
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return token.end() == len(text)
    return False


def _tidy(said: str) -> str:
    """Remove a full stop, emphasis and dollar signs at the ends."""
    said = said.strip().strip("*_ ")
    if said.endswith(".") and not said.endswith(".."):
        said = said[:-1]
    said = said.strip("*_ ")
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if said.startswith(opening) and said.endswith(closing) and len(said) > len(opening):
            return said[len(opening) : -len(closing)]
    return said


_MAX_VOTE_CHARACTERS = 200  # a longer answer is replaced by its digest


def vote(text: str, end: str | None = END_OF_THINKING) -> str | None:
    """Return the answer of a trace for majority votes, or all text after the end of thinking.

    With ``end=None`` the whole text is searched, for models without thinking. White space is
    normalised. Equal values in different notation count as different votes, so maj@n is a lower
    bound for rewards that compare values.

    Returns:
        ``None`` if thinking does not end or nothing follows.
    """
    found = extract_answer(text, end)
    if found is None:
        rest = final_answer(text, end) or ""
        found = "" if "\\boxed" in rest else rest  # an empty or incomplete box is no answer
    said = " ".join(found.split())
    if len(said) > _MAX_VOTE_CHARACTERS:
        return f"digest {hashlib.blake2b(said.encode(), digest_size=16).hexdigest()}"
    return said or None
