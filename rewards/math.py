"""Reward for mathematical answers, compared by math-verify (Kydlicek et al., 2025).

This is the reward of the paper (arXiv 2510.06557, appendix D.1): 1 if the final answer equals the
gold answer, else 0. The final answer is extracted here (``delethink.scoring.answer``), because
math-verify would accept numbers anywhere in the trace.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from delethink.scoring.answer import extract_answer
from delethink.scoring.reward import isolated
from delethink.types import END_OF_THINKING

_MAX_ANSWER_CHARACTERS = 1000  # or ten times the length of the gold answer


def _prepare() -> None:
    """Load math-verify, and compile its patterns and grammar."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.ERROR)
    for answer in ("\\frac{1}{2}", "x^2+1", "(1,2]", "50\\%", "\\sqrt{2}"):
        _equal(answer, answer + "+0")


@isolated("math_verify", "math", _prepare)
def math_equal(text: str, answer: str, end: str | None = END_OF_THINKING) -> float:
    """Return 1.0 if the final answer of ``text`` equals ``answer`` as mathematics, else 0.0.

    A trace without a final answer scores 0.0. So does an overlong answer, without being parsed. The
    function may stall and has no timeout, so run it in a verifier process.
    """
    final = extract_answer(text, end)
    if final is None or len(final) > max(_MAX_ANSWER_CHARACTERS, 10 * len(answer)):
        return 0.0
    gold = extract_answer(answer, None) or answer  # the gold answer may be boxed
    return float(_plain(final) == _plain(gold) or _equal(gold, final))


def _plain(answer: str) -> str:
    return _SPACE.sub("", _clean(answer)).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")


def _clean(answer: str) -> str:
    """Replace thin spaces, Unicode signs and a final full stop, which math-verify cannot parse."""
    answer = re.sub(r"\\[,!;]", "", answer.translate(_AS_ASCII)).strip().strip("$").strip()
    return answer if answer.endswith("..") else answer.removesuffix(".").removesuffix(",")


_SPACE = re.compile(r"\s+(?!\d)|(?<!\d)\s+")  # except between digits: 1 2 is not 12
_AS_ASCII = {0x2212: "-", 0xB0: "^\\circ ", **{0xFF01 + i: chr(0x21 + i) for i in range(94)}}


def _equal(gold: str, final: str) -> bool:
    from math_verify import verify

    found = list(_parse(final))
    options = {"timeout_seconds": None, "allow_set_relation_comp": True}
    return bool(found) and bool(verify(list(_parse(gold)), found, **options))


@lru_cache(maxsize=1024)
def _parse(answer: str) -> tuple[Any, ...]:
    """Parse an answer with math-verify. The box stops its search for other answers."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    configs = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    return tuple(parse(f"\\boxed{{{_clean(answer)}}}", configs, parsing_timeout=None))
