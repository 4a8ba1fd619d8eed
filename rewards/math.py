"""Mathematical answers, compared by math-verify (Kydlicek et al., Hugging Face, 2025).

The reward of the paper (arXiv 2510.06557, appendix D.1): 1 if the final answer equals the gold one,
else 0. Two things are ours: what the final answer is (``answer.py``), and that nothing else of the
trace is shown to math-verify, which would look for numbers anywhere.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from delethink.scoring.answer import extract_answer
from delethink.scoring.reward import isolated
from delethink.types import END_OF_THINKING

_LONGEST = 1000  # characters of an answer, or ten times those of the gold answer


def _prepare() -> None:
    """Loads math-verify and has it compile its patterns and grammar."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.ERROR)
    for answer in ("\\frac{1}{2}", "x^2+1", "(1,2]", "50\\%", "\\sqrt{2}"):
        _equal(answer, answer + "+0")


@isolated("math_verify", "math", _prepare)
def math_equal(text: str, answer: str, end: str | None = END_OF_THINKING) -> float:
    """1.0 if the final answer of ``text`` equals ``answer`` as mathematics, else 0.0.

    No end of thinking, no complete box and no announced answer score 0.0, and so does an answer
    that is out of all proportion, without being parsed. Meant to run in a worker of the pool: it
    may stall, and has no time-out of its own.
    """
    said = extract_answer(text, end)
    if said is None or len(said) > max(_LONGEST, 10 * len(answer)):
        return 0.0
    gold = extract_answer(answer, None) or answer  # a gold answer may come in its box
    return float(_plain(said) == _plain(gold) or _equal(gold, said))


def _plain(answer: str) -> str:
    """As it is compared letter by letter, before anything is parsed."""
    return _SPACE.sub("", _clean(answer)).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")


def _clean(answer: str) -> str:
    """Without what math-verify stumbles over: thin spaces, other minus signs, a last full stop."""
    answer = answer.translate(_AS_ASCII)
    for thin in ("\\,", "\\!", "\\;"):
        answer = answer.replace(thin, "")
    answer = answer.strip().strip("$").strip()
    return answer if answer.endswith("..") else answer.removesuffix(".").removesuffix(",")


_SPACE = re.compile(r"\s+(?!\d)|(?<!\d)\s+")  # not between two digits: 1 2 is not 12
_AS_ASCII = {0x2212: "-", 0xB0: "^\\circ ", **{0xFF01 + i: chr(0x21 + i) for i in range(94)}}


def _equal(gold: str, said: str) -> bool:
    from math_verify import verify

    found = list(_parse(said))
    options = {"timeout_seconds": None, "allow_set_relation_comp": True}
    return bool(found) and bool(verify(list(_parse(gold)), found, **options))


@lru_cache(maxsize=1024)
def _parse(answer: str) -> tuple[Any, ...]:
    """What math-verify makes of an answer; a box tells it that nothing else is to be looked for."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    configs = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    return tuple(parse(f"\\boxed{{{_clean(answer)}}}", configs, parsing_timeout=None))
