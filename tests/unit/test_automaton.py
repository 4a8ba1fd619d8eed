"""The toy family: the rule it runs, its splits, and what guessing would earn."""

from collections import Counter

import pytest

from delethink.envs.automaton import (
    AutomatonTask,
    automaton_step,
    is_held_out,
    solution_lines,
)
from delethink.errors import ConfigError
from delethink.rewards.match import exact_match, final_answer


def test_rule_30_as_published() -> None:
    # Wolfram, A New Kind of Science (2002), page 27: the first rows from one black cell.
    rows = ["0001000", "0011100", "0110010"]
    assert automaton_step(rows[0], 30) == rows[1]
    assert automaton_step(rows[1], 30) == rows[2]


def test_the_ring_is_closed() -> None:
    assert automaton_step("1000", 30) == "1101"


def test_rule_45_is_a_bijection_on_a_ring_of_11_so_guessing_earns_2_to_the_minus_11() -> None:
    states = [format(i, "011b") for i in range(2**11)]
    assert len({automaton_step(state, 45) for state in states}) == 2**11


def test_lines_count_down_to_zero() -> None:
    lines = list(solution_lines("01101001101", 12, 45))
    assert [line[:3] for line in lines] == [f"{i:02d}:" for i in range(11, -1, -1)]
    assert lines[0] == "11:" + automaton_step("01101001101", 45)


def test_the_example_in_the_documentation() -> None:
    lines = list(solution_lines("01101001101", 3, 45))
    assert lines == ["02:11011001011", "01:00110001110", "00:10100101000"]


def test_no_first_state_is_in_both_splits() -> None:
    task = AutomatonTask(1, 9)
    train = {task.problem("train", i).metadata["state"] for i in range(2000)}
    held_out = {task.problem("heldout", i).metadata["state"] for i in range(2000)}
    assert not train & held_out
    share = sum(is_held_out(format(i, "011b")) for i in range(2**11)) / 2**11
    assert 0.15 < share < 0.25


def test_problems_are_fixed_by_seed_split_and_index() -> None:
    first, again, other = (AutomatonTask(5, 9, seed=s) for s in (0, 0, 1))
    assert first.problem("train", 3) == again.problem("train", 3)
    assert first.problem("train", 3) != other.problem("train", 3)
    steps = Counter(first.problem("train", i).metadata["steps"] for i in range(500))
    assert set(steps) == {5, 6, 7, 8, 9}


def test_the_grader_takes_its_own_gold_and_nothing_else() -> None:
    task = AutomatonTask(3, 6)
    for i in range(50):
        problem = task.problem("heldout", i)
        state, steps = problem.metadata["state"], problem.metadata["steps"]
        text = "\n".join(solution_lines(state, steps, 45)) + "</think>" + problem.answer
        assert exact_match(text, problem.answer) == 1.0
        assert exact_match(text[:-1], problem.answer) == 0.0
        assert exact_match(text.replace("</think>", ""), problem.answer) == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [("a</think> 42 ", "42"), ("a", None), ("</think>", ""), ("a</think>1</think>2", "1</think>2")],
)
def test_the_answer_follows_the_first_end_of_thinking(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize("args", [(0, 3), (4, 3), (1, 100)])
def test_impossible_steps_are_refused(args: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="steps must satisfy"):
        AutomatonTask(*args)
