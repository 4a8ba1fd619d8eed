"""Toy tasks: run a cellular automaton for a given number of steps.

A problem is an initial state (a ring of ``width`` cells) and a number of steps. The solution has
one line per step, and each line depends on the previous line only:

    query     03:01101001101
    thinking  02:11011001011        (a countdown, and the next state)
              01:00110001110
              00:10100101000
    answer    10100101000

The task tests thinking across context resets. The query does not grow with the work, and a line
depends on one line only. The end is local: the countdown reads zero. Guessing fails, because rule
45 on a ring of odd width is a bijection. Over all initial states every final state is equally
likely (probability ``2 ** -width``).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from delethink.errors import ConfigError
from delethink.tasks import check_split
from delethink.types import END_OF_THINKING, Problem

MAX_STEPS = 99  # the countdown has two digits
HELD_OUT_ONE_IN = 5  # one initial state in five is held out


def automaton_step(state: str, rule: int) -> str:
    """Return the next state of an elementary cellular automaton on a ring (Wolfram's rules)."""
    width = len(state)
    return "".join(
        str(rule >> int(state[i - 1] + state[i] + state[(i + 1) % width], 2) & 1)
        for i in range(width)
    )


def solution_lines(state: str, steps: int, rule: int) -> Iterator[str]:
    """Yield the ``steps`` lines of a correct solution."""
    for left in range(steps - 1, -1, -1):
        state = automaton_step(state, rule)
        yield solution_line(left, state)


def solution_line(left: int, state: str) -> str:
    """Return a line: a countdown of two digits, and the state."""
    return f"{left:02d}:{state}"


@dataclass(frozen=True)
class AutomatonTask:
    """Unlimited problems, split by initial state.

    An initial state belongs to one split for every number of steps, so no training problem starts
    from a held-out state.

    Attributes:
        min_steps: fewest steps of a problem, from 1.
        max_steps: most steps of a problem, up to 99.
        width: cells of a state, from 3 to 63.
        rule: Wolfram's number of the automaton, from 0 to 255.
        seed: seed of the problems.
    """

    rewards: ClassVar[dict[str, float]] = {"exact": 1.0}

    min_steps: int
    max_steps: int
    width: int = 11
    rule: int = 45
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = self.min_steps, self.max_steps, self.width, self.rule
        if not all(isinstance(size, int) for size in sizes):
            raise ConfigError(
                f"min_steps, max_steps, width and rule must be whole numbers, got {sizes}"
            )
        if not 1 <= self.min_steps <= self.max_steps <= MAX_STEPS:
            raise ConfigError(
                f"steps must satisfy 1 <= min_steps <= max_steps <= {MAX_STEPS}, "
                f"got min_steps={self.min_steps} and max_steps={self.max_steps}"
            )
        if not 3 <= self.width <= 63 or not 0 <= self.rule <= 255:
            raise ConfigError(
                f"width must be in 3..63 and rule in 0..255, got {self.width} and {self.rule}"
            )

    def problem(self, split: str, index: int) -> Problem:
        """Return problem ``index`` of ``split`` (``"train"`` or ``"heldout"``)."""
        check_split(split)
        rng = random.Random(f"{self.seed}/{split}/{index}")
        steps = rng.randint(self.min_steps, self.max_steps)
        while True:
            state = format(rng.getrandbits(self.width), f"0{self.width}b")
            if is_held_out(state) == (split == "heldout"):
                break
        *_, last = solution_lines(state, steps, self.rule)
        return Problem(
            prompt=f"{steps:02d}:{state}",
            answer=last.partition(":")[2],
            metadata={"steps": steps, "state": state, "rule": self.rule},
        )

    def demonstrations(self, problem: Problem) -> tuple[str, str]:
        """Return a correct solution, and one with a wrong last cell."""
        state, steps = problem.metadata["state"], problem.metadata["steps"]
        thinking = "\n".join(solution_lines(state, steps, self.rule)) + END_OF_THINKING
        wrong = problem.answer[:-1] + ("1" if problem.answer[-1] == "0" else "0")
        return thinking + problem.answer, thinking + wrong


def is_held_out(state: str) -> bool:
    """Return whether an initial state belongs to the held-out split."""
    return random.Random(f"held out? {state}").randrange(HELD_OUT_ONE_IN) == 0
