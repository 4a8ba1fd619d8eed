"""Task families of the replication: hitting times of an automaton, and the Game of Life.

A line of thinking depends on the line before it alone, the query does not grow with the work, and
the last line shows that it is the last. So only the length of a long solution is new:

    hitting   query    01101001101110010            life   query    002:0110100101100010
              thinking 11011001011...                      thinking 001:1111000000001111
                       010011...                                    000:...
              answer   010011...                           answer   ...

``hitting`` ends with the first state that begins with ``STOP``; ``life`` with the count zero.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from delethink.envs.automaton import automaton_step, is_held_out
from delethink.errors import ConfigError, MissingExtraError
from delethink.scoring.answer import final_answer
from delethink.scoring.reward import light
from delethink.tasks import check_split
from delethink.types import END_OF_THINKING, Problem

VERSION = 1  # of both families; part of the fingerprint of results

RULE, RING_CELLS, STOP = 45, 17, "010011"

ROWS = COLUMNS = 4
DRAWN_CELLS = 8  # living cells drawn by reasoning-gym; the same one may be drawn twice
BOARD_CELLS = ROWS * COLUMNS
MAX_COUNT = 199
_TRANSIENT_STEPS = 64  # every 4 x 4 board has entered its cycle by then
_MAX_TRIES = 10_000

Table = npt.NDArray[np.int64]


@lru_cache(maxsize=1)
def hitting_times() -> Table:
    """Return the number of steps from each ring to its first ring with ``STOP``; 0 for never.

    The rule is a bijection, so the table is filled backwards from the rings with ``STOP``.
    """
    rings = np.arange(1 << RING_CELLS)
    following = np.zeros_like(rings)
    for bit in range(RING_CELLS):  # bit 0 is the last cell, so the left neighbour is a bit higher
        left, own, right = (
            rings >> ((bit + shift) % RING_CELLS) & 1 for shift in (1, 0, RING_CELLS - 1)
        )
        following |= (RULE >> (4 * left + 2 * own + right) & 1) << bit
    before = np.empty_like(rings)
    before[following] = rings
    is_stop = rings >> (RING_CELLS - len(STOP)) == int(STOP, 2)
    times, steps, front = np.zeros_like(rings), 1, before[is_stop]
    while len(front):
        times[front] = steps
        front = before[front[~is_stop[front]]]
        steps += 1
    return times


@lru_cache(maxsize=1)
def life_table() -> Table:
    """Return the next board of each 4 x 4 board on a torus, as numbers, first cell highest."""
    boards = np.arange(1 << BOARD_CELLS)
    places = np.arange(BOARD_CELLS - 1, -1, -1)
    cells = (boards[:, None] >> places & 1).reshape(-1, ROWS, COLUMNS)
    offsets = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    alive = sum(np.roll(cells, offset, (1, 2)) for offset in offsets)
    born = (alive == 3) | ((cells == 1) & (alive == 2))
    following: Table = (born.reshape(-1, BOARD_CELLS) << places).sum(1)
    return following


@lru_cache(maxsize=1)
def restless_boards() -> npt.NDArray[np.bool_]:
    """Return for each board whether it goes on changing for ever."""
    table, boards = life_table(), np.arange(1 << BOARD_CELLS)
    for _ in range(_TRANSIENT_STEPS):
        boards = table[boards]
    restless: npt.NDArray[np.bool_] = table[boards] != boards
    return restless


def ring_text(ring: int) -> str:
    """Return the cells of a ring."""
    return format(ring, f"0{RING_CELLS}b")


def board_text(board: int) -> str:
    """Return the cells of a board, row by row."""
    return format(board, f"0{BOARD_CELLS}b")


def flip_cell(rng: random.Random, state: str) -> str:
    """Return a state with one cell changed."""
    i = rng.randrange(len(state))
    return state[:i] + "10"[int(state[i])] + state[i + 1 :]


@lru_cache(maxsize=64)
def _starts(split: str, min_steps: int, max_steps: int, seed: int) -> tuple[str, ...]:
    """Return the rings of a split with a hitting time in a range, in an order of the seed."""
    times = hitting_times()
    chosen = [ring_text(i) for i in np.flatnonzero((times >= min_steps) & (times <= max_steps))]
    chosen = [ring for ring in chosen if is_held_out(ring) == (split == "heldout")]
    random.Random(f"{seed}/{split}").shuffle(chosen)
    return tuple(chosen)


@dataclass(frozen=True)
class HittingTask:
    """Rings with a hitting time in a range, split by ring. Training problems repeat by epochs."""

    rewards: ClassVar[dict[str, float]] = {"exact": 1.0}
    line_tokens: ClassVar[int] = RING_CELLS + 1

    min_steps: int
    max_steps: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check_steps(self.min_steps, self.max_steps, int(hitting_times().max()))
        if not all(self.size(split) for split in ("train", "heldout")):
            raise ConfigError(
                f"no ring of a split stops after {self.min_steps} to {self.max_steps} steps; "
                "widen the range"
            )

    def size(self, split: str) -> int:
        """Return the number of different problems of a split."""
        check_split(split)
        return len(_starts(split, self.min_steps, self.max_steps, self.seed))

    def problem(self, split: str, index: int) -> Problem:
        """Return problem ``index`` of ``split`` (``"train"`` or ``"heldout"``)."""
        check_split(split)
        starts = _starts(split, self.min_steps, self.max_steps, self.seed)
        if split == "heldout" and not 0 <= index < len(starts):
            raise ConfigError(f"there are {len(starts)} held-out problems, got index {index}")
        ring = starts[index % len(starts)]
        *lines, last = self.lines(ring)
        return Problem(ring, last, {"steps": len(lines) + 1, "state": ring})

    @staticmethod
    def lines(ring: str) -> Iterator[str]:
        """Yield the lines of the right solution."""
        while True:
            ring = automaton_step(ring, RULE)
            yield ring
            if ring.startswith(STOP):
                return

    def demonstrations(self, problem: Problem) -> tuple[str, str]:
        """Return a right solution, and one with a wrong last cell."""
        return _demonstrate("\n".join(self.lines(problem.prompt)), problem.answer)

    @staticmethod
    def write_trace(rng: random.Random, num_lines: int, slip: float) -> tuple[str, str, bool]:
        """Return the query, at most ``num_lines`` lines as somebody who slips writes, and the end.

        Half of the traces would end with the last line if nothing slipped. The third value tells
        whether the trace ended; a cut one ends with a line break.
        """
        if rng.random() < 0.5:
            ring = rng.choice(_starts("train", num_lines, num_lines, 0))
        else:
            ring = ring_text(rng.getrandbits(RING_CELLS))
            while is_held_out(ring):
                ring = ring_text(rng.getrandbits(RING_CELLS))
        query = ring
        lines: list[str] = []
        while len(lines) < num_lines and not (lines and ring.startswith(STOP)):
            ring = automaton_step(ring, RULE)
            ring = flip_cell(rng, ring) if rng.random() < slip else ring
            lines.append(ring)
        return _written(query, lines, ring, ring.startswith(STOP))


@lru_cache(maxsize=4096)
def life_entry(seed: int, steps: int) -> dict[str, Any]:
    """Return reasoning-gym's problem of a seed: question, answer and metadata."""
    entry: dict[str, Any] = _life_dataset(seed, steps)[0]
    return entry


def _life_dataset(seed: int, steps: int) -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise MissingExtraError("reasoning-gym", "tasks") from None
    return reasoning_gym.create_dataset(
        "game_of_life",
        grid_size_x=ROWS,
        grid_size_y=COLUMNS,
        filled_cells=DRAWN_CELLS,
        simulation_steps=steps,
        seed=seed,
        size=1,
    )


@lru_cache(maxsize=1)
def _scorer() -> Any:
    return _life_dataset(0, 1)


def compact_board(answer: str) -> str:
    """Return reasoning-gym's board, a JSON array of rows, as cells row by row."""
    return "".join(str(cell) for row in json.loads(answer) for cell in row)


def full_board(cells: str) -> str:
    """Return cells row by row as reasoning-gym's JSON array of rows."""
    rows = [cells[i : i + COLUMNS] for i in range(0, BOARD_CELLS, COLUMNS)]
    return json.dumps([list(map(int, row)) for row in rows], separators=(",", ":"))


@light
def board_score(text: str, metadata: Mapping[str, Any], end: str | None = END_OF_THINKING) -> float:
    """Return 1.0 if reasoning-gym's scorer gives all points to the board, else 0.0.

    An answer of any other form than 16 cells scores 0.0, so the scorer reads plain boards only.
    """
    final = final_answer(text, end)
    if final is None or not re.fullmatch(f"[01]{{{BOARD_CELLS}}}", final):
        return 0.0
    points = _scorer().score_answer(answer=full_board(final), entry=metadata["entry"])
    return float(points >= 1.0)


@dataclass(frozen=True)
class LifeTask:
    """reasoning-gym's ``game_of_life`` on a torus of 4 x 4, split by board.

    Boards that come to rest are left out: their last board could be guessed.
    """

    rewards: ClassVar[dict[str, float]] = {"families:board_score": 1.0}
    line_tokens: ClassVar[int] = BOARD_CELLS + 5

    min_steps: int
    max_steps: int  # at most 199
    seed: int = 0

    def __post_init__(self) -> None:
        _check_steps(self.min_steps, self.max_steps, MAX_COUNT)

    def problem(self, split: str, index: int) -> Problem:
        """Return problem ``index`` of ``split`` (``"train"`` or ``"heldout"``)."""
        check_split(split)
        rng = random.Random(f"{self.seed}/{split}/{index}")
        steps = rng.randint(self.min_steps, self.max_steps)
        for _ in range(_MAX_TRIES):
            seed = rng.getrandbits(30)
            board = compact_board(life_entry(seed, 0)["answer"])
            if restless_boards()[int(board, 2)] and is_held_out(board) == (split == "heldout"):
                entry = life_entry(seed, steps)
                values = {"steps": steps, "state": board, "entry": entry}
                return Problem(f"{steps:03d}:{board}", compact_board(entry["answer"]), values)
        raise ConfigError(f"no board of the split {split!r} found in {_MAX_TRIES} tries")

    @staticmethod
    def lines(board: str, steps: int) -> Iterator[str]:
        """Yield the ``steps`` lines of the right solution."""
        number = int(board, 2)
        for left in range(steps - 1, -1, -1):
            number = int(life_table()[number])
            yield f"{left:03d}:{board_text(number)}"

    def demonstrations(self, problem: Problem) -> tuple[str, str]:
        """Return a right solution, and one with a wrong last cell."""
        state, steps = problem.metadata["state"], problem.metadata["steps"]
        return _demonstrate("\n".join(self.lines(state, steps)), problem.answer)

    @staticmethod
    def write_trace(rng: random.Random, num_lines: int, slip: float) -> tuple[str, str, bool]:
        """Return the query, ``num_lines`` lines as somebody who slips writes, and the end.

        Half of the traces are the beginning of a longer one, so that every count occurs. The third
        value tells whether the trace ended; a cut one ends with a line break.
        """
        whole = rng.random() < 0.5 or num_lines >= MAX_COUNT
        steps = num_lines if whole else rng.randint(num_lines + 1, MAX_COUNT)
        board = ""
        while not board or is_held_out(board) or not restless_boards()[int(board, 2)]:
            board = board_text(rng.getrandbits(BOARD_CELLS))
        query, lines = f"{steps:03d}:{board}", []
        for left in range(steps - 1, steps - 1 - num_lines, -1):
            board = board_text(int(life_table()[int(board, 2)]))
            board = flip_cell(rng, board) if rng.random() < slip else board
            lines.append(f"{left:03d}:{board}")
        return _written(query, lines, board, whole)


FAMILIES: dict[str, type[HittingTask] | type[LifeTask]] = {
    "hitting": HittingTask,
    "life": LifeTask,
}


def _written(query: str, lines: list[str], last: str, ended: bool) -> tuple[str, str, bool]:
    text = "\n".join(lines)
    return query, f"{text}{END_OF_THINKING}{last}" if ended else f"{text}\n", ended


def _demonstrate(thinking: str, answer: str) -> tuple[str, str]:
    wrong = answer[:-1] + ("1" if answer[-1] == "0" else "0")
    return f"{thinking}{END_OF_THINKING}{answer}", f"{thinking}{END_OF_THINKING}{wrong}"


def _check_steps(min_steps: int, max_steps: int, allowed: int) -> None:
    if not all(isinstance(steps, int) for steps in (min_steps, max_steps)):
        raise ConfigError(f"steps must be whole numbers, got {min_steps!r} and {max_steps!r}")
    if not 1 <= min_steps <= max_steps <= allowed:
        raise ConfigError(
            f"steps must satisfy 1 <= min_steps <= max_steps <= {allowed}, "
            f"got min_steps={min_steps} and max_steps={max_steps}"
        )
