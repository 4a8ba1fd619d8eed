"""Rewards that need nothing but Python: what each accepts, against hand-checked answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delethink.errors import ConfigError
from delethink.registry import names, resolve
from delethink.rewards.code import extract_code, same_output
from delethink.rewards.format import closes_thinking, language, well_formed
from delethink.rewards.gold import can_read
from delethink.rewards.length import chunks, cosine, overlong, ternary
from delethink.rewards.match import crossword
from delethink.rewards.numeric import parse_number
from delethink.scoring.reward import INPUTS, traits_of
from delethink.types import TraceStop

ANSWERS = Path(__file__).parents[1] / "data" / "other_answers.jsonl"
CASES = [json.loads(line) for line in ANSWERS.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['reward']} {c['text'][8:40]}")
def test_a_hand_checked_answer_has_its_score(case: dict[str, Any]) -> None:
    reward = resolve("delethink.rewards", case["reward"])
    extra = {"metadata": case["metadata"]} if "metadata" in case else {}
    assert reward(text=case["text"], answer=case["answer"], **extra) == case["score"]


@pytest.mark.parametrize("name", names("delethink.rewards"))
def test_every_reward_is_registered_with_parameters_that_are_known(name: str) -> None:
    function = resolve("delethink.rewards", name)
    assert traits_of(function).kind in ("light", "isolated", "thread")
    assert "Args:" in function.__doc__ or len(function.__doc__.splitlines()[0]) > 20
    import inspect

    needed = [p.name for p in inspect.signature(function).parameters.values()]
    assert set(needed) & set(INPUTS)


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e15, max_value=1e15))
def test_a_number_is_read_as_python_writes_it(value: float) -> None:
    assert parse_number(repr(value)) == pytest.approx(value, rel=1e-9, abs=1e-300)


@given(st.text(max_size=300))
def test_whatever_is_read_as_a_number_is_finite(text: str) -> None:
    value = parse_number(text)
    assert value is None or math.isfinite(value)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("so</think>\\boxed{1}", 1.0),
        ("<think>so</think>\\boxed{1}", 1.0),
        (" <think>so</think>\\boxed{1}", 1.0),
        ("so <think>so</think>\\boxed{1}", 0.0),
        ("<think><think></think>\\boxed{1}", 0.0),
        ("so</think>\\boxed{1}</think>", 0.0),
        ("so</think>\\boxed{1} \\boxed{2}", 0.0),
        ("\\boxed{2} so</think>\\boxed{1}", 1.0),
        ("so</think>1", 0.0),
        ("so</think>\\boxed{}", 0.0),
        ("so</think>\\boxed{1", 0.0),
        ("so \\boxed{1}", 0.0),
    ],
)
def test_the_form_of_a_trace(text: str, score: float) -> None:
    assert well_formed(text) == score


def test_thinking_is_closed_where_something_follows() -> None:
    assert closes_thinking("a</think>b") == 1.0
    assert closes_thinking("a</think> ") == closes_thinking("a") == 0.0


def test_language_is_a_share_of_letters() -> None:
    assert language("Let x be 3.") == 1.0
    assert language("Let 我们 see") == pytest.approx(6 / 8)
    assert language("да", script="cyrillic") == 1.0
    assert language("1 + 1") is None
    with pytest.raises(ConfigError, match="Did you mean 'latin'"):
        language("x", script="latn")


def test_cosine_goes_from_its_first_value_to_its_second() -> None:
    assert cosine(0, 100, 1.0) == pytest.approx(1.0)
    assert cosine(100, 100, 1.0) == pytest.approx(0.5)
    assert cosine(50, 100, 1.0) == pytest.approx(0.75)
    assert cosine(0, 100, 0.0) == pytest.approx(-1.0)
    assert cosine(100, 100, 0.0) == pytest.approx(-0.5)
    assert cosine(10, 100, None) is None


def test_overlong_is_equation_13_of_dapo() -> None:
    values = [overlong(length, 100, 20) for length in (0, 80, 90, 95, 100, 101)]
    assert values == [0.0, 0.0, -0.5, -0.75, -1.0, -1.0]
    with pytest.raises(ConfigError, match="0 < cache <= 100"):
        overlong(1, 100, 0)


def test_overlong_is_what_trl_computes() -> None:
    rewards = pytest.importorskip("trl.rewards")
    theirs = rewards.get_soft_overlong_punishment(100, 20)
    lengths = range(1, 120)
    expected = theirs(completion_ids=[[0] * length for length in lengths])
    assert [overlong(length, 100, 20) for length in lengths] == pytest.approx(expected)


def test_chunks_are_encouraged_where_they_led_somewhere() -> None:
    assert [chunks(n, 5, 1.0) for n in (1, 3, 5)] == [0.0, 0.5, 1.0]
    assert chunks(5, 5, 0.0) == 0.0
    assert chunks(5, 5, None) is None
    assert chunks(5, 5, 0.0, only_right=False) == 1.0
    assert chunks(1, 1, 1.0) == 0.0


def test_ternary_tells_wrong_from_out_of_budget() -> None:
    assert ternary(1.0, TraceStop.BUDGET) == 1.0
    assert ternary(0.0, TraceStop.BUDGET) == -1.0
    assert ternary(0.0, TraceStop.COMPLETED) == 0.0
    assert ternary(None, TraceStop.COMPLETED) is None


KEY = json.dumps({"across 1": "cat", "down 2": "tea"})


@pytest.mark.parametrize(
    ("said", "whole", "share"),
    [
        ("Across 1: CAT\nDown 2: TEA", 1.0, 1.0),
        ("**Across 1**: cat, **Down 2** - tea", 1.0, 1.0),
        ("Across 1: CAT", 0.0, 0.5),
        ("Across 1: DOG\nAcross 1: CAT\nDown 2: TEA", 1.0, 1.0),
        ("Across 1: CATS\nDown 2: TEA", 0.0, 0.5),
        ("cat tea", 0.0, 0.0),
    ],
)
def test_a_crossword_is_read_word_by_word(said: str, whole: float, share: float) -> None:
    assert crossword("so</think>" + said, KEY) == whole
    assert crossword("so</think>" + said, KEY, partial=True) == share
    assert crossword(said, KEY) == 0.0


def test_the_last_block_of_code_after_thinking_counts() -> None:
    text = "```python\nold\n```</think>\n```python\none\n```\nor\n```python\ntwo\n```"
    assert extract_code(text) == "two\n"
    assert extract_code("```python\none\n```") is None
    assert extract_code("</think>print(1)") is None


@pytest.mark.parametrize(
    ("said", "expected", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1  2 \n3", "1 2\n3", True),
        ("1.0", "1", True),
        ("1e0", "1", True),
        ("1\n2", "1 2", False),
        ("yes", "YES", False),
        ("nan", "1", False),
        ("", "1", False),
    ],
)
def test_outputs_are_compared_line_by_line(said: str, expected: str, same: bool) -> None:
    assert same_output(said, expected) is same


# Gold answers that cannot be read


@pytest.mark.parametrize(
    ("name", "gold", "is_read"),
    [
        ("numeric", "1 1/2", True),
        ("numeric", "10^{-3}", True),
        ("numeric", "2x", False),
        ("numeric", "a lot", False),
        ("multiple_choice", "(B)", True),
        ("multiple_choice", "B) Paris", True),
        ("multiple_choice", "Paris", False),
        ("multiple_choice", "", False),
        ("crossword", KEY, True),
        ("crossword", "cat", False),
        ("crossword", "[1]", False),
        ("math", "42", True),
        ("math", "-1,234.5", True),
        ("math", "\\text{even}", True),
        ("math", "", False),
        ("math", "\\frac{1}{2} \\text{ for all } x > 0", True),
        ("math", "Draw the circle with diameter AB and see where it meets the line.", False),
        ("multiple_choice", "E", True),
        ("exact", "", True),
    ],
)
def test_a_gold_answer_is_read_or_not(name: str, gold: str, is_read: bool) -> None:
    assert can_read(resolve("delethink.rewards", name), gold, {}) is is_read


@pytest.mark.parametrize(
    ("test", "function", "is_read"),
    [
        ({"input": "1", "output": "1"}, None, True),
        ({"input": "1"}, None, False),
        ({"input": "1", "output": "1", "type": "functional"}, "add", True),
        ({"input": "1", "output": "1", "type": "functional"}, None, False),
        ({"input": "1", "output": "1", "type": "funtional"}, "add", False),
        ({"input": "assert add(1) == 2", "type": "assertion"}, None, True),
        ({"input": "assert candidate(1) == 2", "type": "assertion"}, "add", True),
        ({"input": "assert candidate(1) == 2", "type": "assertion"}, None, False),
        ({"input": "assert (", "type": "assertion"}, "add", False),
    ],
)
def test_the_tests_of_a_program_are_complete_or_not(
    test: dict[str, Any], function: str | None, is_read: bool
) -> None:
    metadata = {"tests": [test], "function": function}
    assert can_read(resolve("delethink.rewards", "code"), "", metadata) is is_read


# Which block is the program


PROGRAM = "def f(x):\n    return x\n"
MARKED = f"```python\n{PROGRAM}```"


@pytest.mark.parametrize(
    "said",
    [
        MARKED,
        f"{MARKED}\nIt prints:\n```\n3\n```",
        f"{MARKED}\n```text\n3\n```",
        f"{MARKED}\n```bash\npython main.py\n```",
        f"{MARKED}\n```json\n[1]\n```",
        f"```cpp\nint main() {{}}\n```\nor in Python\n{MARKED}",
        f"```cpp\nint main() {{}}\n```\nsome words\n\n```\n{PROGRAM}```\nand more words",
        f"{MARKED}\n```java\nclass A {{}}\n```\nNo code here.",
        f"```\n{PROGRAM}```\nSample output:\n```\n3\n```",
        f"```\n{PROGRAM}```\n```\nYes\nNo\n```",
        f"```\n{PROGRAM}```\n```\n1 2\n[3, 4]\n```",
        f"```Python3\n{PROGRAM}```",
        f"```py\n{PROGRAM}```",
        f"```python3.11\n{PROGRAM}```",
        f"```{{.python}}\n{PROGRAM}```",
        f'```python title="a.py"\n{PROGRAM}```',
        f"~~~python\n{PROGRAM}~~~",
        f"````python\n{PROGRAM}````",
        f"Here it is: ```python\n{PROGRAM}```",
        f"```python\n{PROGRAM.rstrip()}```",
        "1. The program:\n   ```python\n   def f(x):\n       return x\n   ```",
        f"```python\r\n{PROGRAM}```".replace("\r\n", "\n").replace("\n", "\r\n"),
        f"```python\nold\n```\n{MARKED}",
        f"{MARKED}\n```python\nnever closed",
    ],
)
def test_the_program_is_the_last_python_block(said: str) -> None:
    assert extract_code("so</think>" + said) == PROGRAM


@pytest.mark.parametrize(
    "said",
    ["", "print(3)", "```cpp\nint main() {}\n```", "```python\nnever closed", "```text\n3\n```"],
)
def test_without_a_python_block_there_is_no_program(said: str) -> None:
    assert extract_code("so</think>" + said) is None
