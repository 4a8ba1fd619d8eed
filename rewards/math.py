r"""Reward for mathematical answers, compared by math-verify (Kydlicek et al., 2025).

This is the reward of the paper (arXiv 2510.06557, appendix D.1): 1 if the final answer equals the
gold answer, else 0. The final answer is extracted here (``delethink.scoring.answer``), because
math-verify would accept numbers anywhere in the trace.

A wrong 1 is worse than a wrong 0, as a policy learns to repeat it. So a value of math-verify counts
only if both answers were read to their end, with every letter of the source, and if the values
agree in magnitude at sampled points. Cases: ``docs/reference/math_answers.md``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from delethink.rewards.gold import reads_gold
from delethink.rewards.units import are_different, split_unit
from delethink.scoring.answer import extract_answer
from delethink.scoring.reward import isolated
from delethink.types import END_OF_THINKING

_MAX_ANSWER_CHARACTERS = 1000  # or ten times the length of the gold answer
_MAX_ELEMENTS = 200  # of a set or tuple that is compared element by element
_FLOAT_TOLERANCE = 1e-5  # relative, where a side is a decimal number
_EXACT_TOLERANCE = 1e-20  # relative, of exact values at _DIGITS digits
_DIGITS = 60
_MAX_REPEATED_CHARACTERS = 40  # of a text that an answer repeats letter by letter
_MIN_WORDS = 5  # of a sentence
_PROSE = re.compile(r"(?<![A-Za-z])[A-Za-z]{3,}")
_POINTS = ("0.7310585786", "1.3862943611", "2.2360679775")  # values of the first variable


def _prepare() -> None:
    """Load math-verify, and compile its grammar."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.ERROR)
    for answer in ("\\frac{1}{2}", "x^2+1", "(1,2]", "50\\%", "\\sqrt{2}"):
        _equal(answer, answer + "+0")


def can_read_math(answer: str, _: Mapping[str, Any]) -> bool:
    """Return whether a gold answer is a formula or short, so that another answer can equal it.

    A short one can be repeated letter by letter. Sentences cannot.
    """
    gold = _clean(extract_answer(answer, None) or answer)
    if found := _TEXT.fullmatch(gold):
        gold = found[1]
    words = _PROSE.findall(_COMMAND.sub(" ", _TEXT.sub(" ", gold)))
    return bool(gold) and (len(gold) <= _MAX_REPEATED_CHARACTERS or len(words) < _MIN_WORDS)


@reads_gold(can_read_math)
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
    if _plain(final) == _plain(gold):
        return 1.0
    words = _words(gold)
    return float((bool(words) and words == _words(final)) or _equal(gold, final))


# Texts


def _plain(answer: str) -> str:
    answer = (
        _SPACE.sub("", _clean(answer)).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    )
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", answer)


def _clean(answer: str) -> str:
    """Write signs and constants as math-verify can parse them, and remove a final full stop."""
    answer = re.sub(r"\\[,!;]", "", answer.translate(_AS_ASCII)).strip().strip("$").strip()
    answer = answer if answer.endswith("..") else answer.removesuffix(".").removesuffix(",")
    answer = _UPRIGHT.sub(r" \1 ", answer).replace("\\imath", " i ")
    answer = re.sub(r"\\sqrt\s?\(([^()]*)\)|\u221a(\d+)", r"\\sqrt{\1\2}", answer)
    answer = _COUNTED.sub(r"\1\\text{\2}", answer)
    if _CONSTANT.search(answer) and not re.search("[ABCab]", answer):
        answer = answer[:-1] + "C"  # the constant of integration
    return _MIXED.sub(r"\1\\frac{\2}{\3}", answer).strip()


_SPACE = re.compile(r"\s+(?!\d)|(?<!\d)\s+")  # except between digits: 1 2 is not 12
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho _ "
    "sigma tau upsilon phi chi psi omega"
)
_SIGNS = {
    "\u2212": "-",
    "\u00b0": "^\\circ ",
    "\u00d7": "\\times ",
    "\u00b7": "\\cdot ",
    "\u00f7": "\\div ",
    "\u2264": "\\le ",
    "\u2265": "\\ge ",
    "\u2260": "\\ne ",
    "\u221e": "\\infty ",
    "\u222a": "\\cup ",
    "\u2205": "\\emptyset ",
    "\u211d": "\\mathbb{R}",
}
_AS_ASCII = (
    {ord(sign): command for sign, command in _SIGNS.items()}
    | {0x3B1 + i: f"\\{name} " for i, name in enumerate(_GREEK.split()) if name != "_"}
    | {0xFF01 + i: chr(0x21 + i) for i in range(94)}
)
_UPRIGHT = re.compile(r"\\(?:mathrm|text|textrm|operatorname|rm)\s*\{\s*([ied])\s*\}")
_COUNTED = re.compile(r"\A\\text\s*\{\s*(-?\d[\d.,/]*)((?: [A-Za-z ]+)?)\}\Z")
_CONSTANT = re.compile(r"[xt].*\+\s*c\Z", re.DOTALL)
_MIXED = re.compile(r"(?<![\d.,/^_{])(\d{1,9}) (\d{1,9})/(\d{1,9})(?![\d.,/^!])")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}")


def _words(answer: str) -> str:
    """Return an answer of words without markup and case; empty for anything else."""
    said = " ".join(_TEXT.sub(r"\1", answer).strip(" $.").split()).casefold()
    return said if re.fullmatch(r"[^\W\d_]{2,}(?:[ '-][^\W\d_]+)*", said) else ""


_BASE = re.compile(r"([0-9A-Za-z]+)_\{?(\d{1,2})\}?\Z")


def _same_numeral(gold: str, final: str) -> bool | None:
    """Compare numerals of a base; ``None`` without a base. A base may be missing on one side."""
    one, other = _BASE.match(gold), _BASE.match(final)
    if not (one or other) or not re.match(r"\d", gold + final):
        return None
    numerals = [found[1] if found else said for found, said in ((one, gold), (other, final))]
    bases = {found[2] for found in (one, other) if found}
    return len(bases) == 1 and numerals[0].lstrip("0") == numerals[1].lstrip("0")


# Comparison


def _equal(gold: str, final: str) -> bool:
    """Return whether two answers are equal, with what is left out of one of them taken off."""
    gold, final = _clean(gold), _clean(final)
    numeral = _same_numeral(gold, final)
    if numeral is not None:
        return numeral
    infinite, other_text = (gold, final) if "\\infty" in gold else (final, gold)
    if "\\infty" in infinite and re.fullmatch(r"[-+]?[\d.]+", other_text):
        return False
    one, other = split_unit(gold), split_unit(final)
    if are_different(one.unit, other.unit):
        return False
    if one.unit and not one.is_certain and one.unit != other.unit:
        one = one._replace(body=gold, unit="")
    if not other.is_certain and not one.unit and _letters(gold):
        other = other._replace(body=final, unit="")
    return _same_source(one.body, other.body)


def _same_source(gold: str, final: str) -> bool:
    if _bracket(gold) != _bracket(final) and "" not in (_bracket(gold), _bracket(final)):
        return False
    wanted, found = _parse(gold), _parse(final)
    if wanted is None or found is None:
        return False
    if _repeats(gold, wanted) != _repeats(final, found):
        return False
    return _same(wanted, found)


def _same(gold: Any, final: Any) -> bool:
    """Return whether math-verify finds two expressions equal, and they pass the checks here."""
    import sympy
    from math_verify import verify
    from math_verify.grader import is_equation

    infinite = (sympy.oo, -sympy.oo, sympy.zoo, sympy.nan)
    are_values = isinstance(gold, sympy.Expr) and isinstance(final, sympy.Expr)
    if are_values and gold.has(*infinite) != final.has(*infinite):  # sympy may cancel oo/1
        return False
    if is_equation(final) and not is_equation(gold):
        final = _value_of(final)
        if final is None:
            return False
    if is_equation(gold) and is_equation(final) and _lhs(gold) == _lhs(final):
        gold, final = _rhs(gold), _rhs(final)
    elif is_equation(gold) and not is_equation(final):
        gold = _rhs(gold) if _is_name(_lhs(gold)) else gold
    pairs = _pairs(gold, final)
    if pairs is not None:
        return all(_same(one, other) for one, other in pairs)
    if isinstance(gold, sympy.FiniteSet) and isinstance(final, sympy.FiniteSet):
        return _same_elements(list(gold.args), list(final.args))
    options = {"timeout_seconds": None, "allow_set_relation_comp": True}
    return bool(verify([gold], [final], **options)) and _agree(gold, final)


def _pairs(gold: Any, final: Any) -> list[tuple[Any, Any]] | None:
    """Return the parts of two tuples, intervals or matrices of one shape, else ``None``."""
    import sympy

    if isinstance(gold, sympy.MatrixBase) and isinstance(final, sympy.MatrixBase):
        same = gold.shape == final.shape
        return list(zip(gold.flat(), final.flat(), strict=True)) if same else None
    if isinstance(gold, sympy.Interval) and isinstance(final, sympy.Interval):
        if (gold.left_open, gold.right_open) != (final.left_open, final.right_open):
            return None
        return [(gold.start, final.start), (gold.end, final.end)]
    if isinstance(gold, sympy.Tuple) and isinstance(final, sympy.Tuple):
        return list(zip(gold, final, strict=True)) if len(gold) == len(final) else None
    return None


def _same_elements(gold: list[Any], final: list[Any]) -> bool:
    """Return whether each element of one set equals another element of the other."""
    if len(gold) != len(final) or len(gold) > _MAX_ELEMENTS:
        return False
    for one in gold:
        match = next((i for i, other in enumerate(final) if _same(one, other)), None)
        if match is None:
            return False
        del final[match]
    return True


def _value_of(equation: Any) -> Any:
    """Return the last side of an equation or a chain, if it names a value; else ``None``."""
    sides = _sides(equation)
    if _is_name(sides[0]):
        sides = sides[1:]
    value = sides[-1]
    return value if all(_same(side, value) for side in sides[:-1]) else None


def _sides(equation: Any) -> list[Any]:
    parts = equation._unsorted_args if hasattr(equation, "_unsorted_args") else [equation]
    return [parts[0].lhs, *(part.rhs for part in parts)]


def _lhs(equation: Any) -> Any:
    return _sides(equation)[0]


def _rhs(equation: Any) -> Any:
    return _sides(equation)[-1]


def _is_name(side: Any) -> bool:
    """Return whether a side of an equation names something: ``x``, ``m+n``, ``f(2)``, ``|S|``."""
    import sympy
    from sympy.core.function import AppliedUndef

    if isinstance(side, sympy.Abs):
        return _is_name(side.args[0])
    if isinstance(side, (sympy.Symbol, AppliedUndef)):
        return True
    if isinstance(side, (sympy.Add, sympy.Mul, sympy.Tuple, sympy.FiniteSet, sympy.Interval)):
        args = side.args[:2] if isinstance(side, sympy.Interval) else side.args
        return all(map(_is_name, args)) and bool(args)
    return isinstance(side, sympy.Pow) and side.exp == -1 and _is_name(side.base)


def _agree(gold: Any, final: Any) -> bool:
    """Return whether two expressions have the same letters and magnitude at sampled points."""
    import sympy

    if isinstance(gold, sympy.core.relational.Relational) and type(gold) is type(final):
        return _agree_as_relations(gold.lhs - gold.rhs, final.lhs - final.rhs)
    if not isinstance(gold, sympy.Expr) or not isinstance(final, sympy.Expr):
        return True
    values = [_expand_percent(side) for side in (gold, final)]
    return any(_agree_as(one, other) for one in values[0] for other in values[1])


def _expand_percent(side: Any) -> list[Any]:
    """Return the values of an expression; of a percentage, the number and the share."""
    import sympy

    hundredth = sympy.UnevaluatedExpr(sympy.Rational(1, 100))
    if not side.has(hundredth):
        return [side]
    return [
        side.xreplace({hundredth: sympy.Integer(1)}),
        side.xreplace({hundredth: hundredth.args[0]}),
    ]


def _agree_as(gold: Any, final: Any) -> bool:
    import sympy

    tolerance = _EXACT_TOLERANCE
    if gold.has(sympy.Float) or final.has(sympy.Float):
        tolerance = _FLOAT_TOLERANCE
    return all(
        abs(one - other) <= tolerance * max(abs(one), abs(other))
        for one, other in _values(gold, final)
    )


def _agree_as_relations(gold: Any, final: Any) -> bool:
    """Return whether the sides of two relations differ by a factor, or clearly in their form.

    A factor that varies a little, as for ``x > 1e-20`` and ``x > 1e-21``, is another magnitude.
    """
    ratios = [one / other for one, other in _values(gold, final) if other != 0]
    if len(ratios) < 2:
        return True
    spread = max(abs(ratio - ratios[0]) for ratio in ratios) / abs(ratios[0] or 1)
    return bool(spread <= _EXACT_TOLERANCE * _EXACT_TOLERANCE or spread > _FLOAT_TOLERANCE)


def _values(gold: Any, final: Any) -> Iterable[tuple[Any, Any]]:
    """Yield the values of two expressions at sampled points, where both have one."""
    import sympy

    symbols = sorted(gold.free_symbols | final.free_symbols, key=str)
    for number, point in enumerate(_POINTS if symbols else _POINTS[:1]):
        at = {
            symbol: sympy.Rational(point) + sympy.Rational(i + number, 7)
            for i, symbol in enumerate(symbols)
        }
        try:
            values = [side.xreplace(at).doit().evalf(_DIGITS) for side in (gold, final)]
        except (TypeError, ValueError, ArithmeticError, AttributeError, RecursionError):
            continue  # has no number there, so only math-verify can judge
        if all(value.is_number and value.is_finite for value in values):
            yield values[0], values[1]


# Parsing


def _bracket(answer: str) -> str:
    r"""Return ``(`` or ``{`` if one pair of such brackets holds the whole answer and a comma."""
    answer = re.sub(r"\\(?:left|right|bigl?|bigr)\b", "", answer).replace("\\{", "{").strip()
    answer = answer.replace("\\}", "}")
    pairs = {"(": ")", "{": "}"}
    if not answer or answer[0] not in pairs or answer[-1] != pairs[answer[0]] or "," not in answer:
        return ""
    depth = 0
    for i, character in enumerate(answer):
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(character, 0)
        if depth == 0:
            return answer[0] if i == len(answer) - 1 else ""
    return ""


_SEPARATOR = re.compile(r",?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)")


def _repeats(source: str, parsed: Any) -> int:
    """Return the number of elements of a list that a set has lost, as in ``1, 1, 2``."""
    import sympy

    if not isinstance(parsed, sympy.FiniteSet) or _bracket(source) == "{" or "\\pm" in source:
        return 0
    depth = commas = 0
    for character in _SEPARATOR.sub(",", source).replace("{,}", ""):
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(character, 0)
        commas += character == "," and depth == 0
    return max(0, commas + 1 - len(parsed))


_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-z*]*\}|\\mathbb\s*\{[A-Z]\}|\\[A-Za-z]+|\\.")


def _letters(answer: str) -> set[str]:
    """Return the letters that stand for themselves."""
    return set(re.findall(r"[^\W\d_]", _COMMAND.sub(" ", _TEXT.sub(" ", answer))))


@lru_cache(maxsize=1024)
def _parse(answer: str) -> Any:
    """Parse a whole answer to a sympy object; ``None`` if a part of it cannot be read."""
    for source in _sources(answer):
        parsed = _parse_latex(source)
        if parsed is not None:
            return parsed
    return None


_UNREADABLE_NAME = re.compile(r"[^=<>\d,;]*[A-Za-z][^=<>\d,;]*=(?P<value>[^=<>]+)\Z")
_LOGIC = re.compile(r"\\(?:forall|exists|neg?|not|neq|le|ge|leq|geq|approx|in|notin|equiv|sim)\b")


def _sources(answer: str) -> Iterable[str]:
    """Return an answer, and its value if only the name before it cannot be read."""
    yield answer
    found = _UNREADABLE_NAME.match(answer)
    if found and not _LOGIC.search(answer):
        yield found["value"].strip()


def _parse_latex(answer: str) -> Any:
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
    from math_verify.grader import should_treat_as_complex

    config = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    try:
        latex = normalize_latex(answer, config)
        if not _is_read_whole(latex):
            return None
        parsed = latex2sympy(
            latex,
            is_real=not should_treat_as_complex(latex),
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except Exception:  # the parser raises plain exceptions, and sympy anything
        return None
    return parsed if _has_letters(parsed, latex) else None


def _is_read_whole(latex: str) -> bool:
    """Return whether the grammar covers all of a text. The parser ignores what follows."""
    from antlr4 import CommonTokenStream, InputStream
    from latex2sympy2_extended.antlr_parser import PSLexer, PSParser

    lexer = PSLexer(InputStream(latex))
    lexer.removeErrorListeners()
    tokens = CommonTokenStream(lexer)
    parser = PSParser(tokens)
    parser.removeErrorListeners()
    parser.buildParseTrees = False
    parser.math()
    return bool(tokens.LA(1) == -1)


def _has_letters(parsed: Any, latex: str) -> bool:
    """Return whether no letter of the source went missing."""
    import sympy

    if not isinstance(parsed, (sympy.Basic, sympy.MatrixBase)):
        return False
    names = "".join(
        str(symbol) for symbol in parsed.atoms(sympy.Symbol, sympy.core.function.AppliedUndef)
    )
    kept = set(names) | set("ied")
    return _letters(latex) <= kept or "\\approx" in latex
