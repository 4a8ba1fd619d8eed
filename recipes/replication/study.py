"""Runs the replication cell by cell, each at low priority on one thread.

    python recipes/replication/study.py list
    python recipes/replication/study.py run hitting-eval-base-s0
    python recipes/replication/study.py run hitting-eval-base-s0 --again   # compare the digits
    python recipes/replication/study.py run hitting-eval-base-s0 --again --seed 7
    python recipes/replication/study.py run --tier A --jobs 2       # or --tier B
    python recipes/replication/study.py run --reduced --jobs 2
    python recipes/replication/study.py draw

A finished cell is skipped. A stopped one goes on when it is run again. Results that were made with
other sizes, or another version of protocol or families, are refused.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from cells import (
    MAKING,
    TIERS,
    Cell,
    Place,
    cells_of_tier,
    check_results,
    find_cell,
    make_cells,
    read_result,
    read_sizes,
    write_result,
)
from locking import locked

from delethink.errors import ConfigError, UserError

CELL_TIMEOUT_S = 15 * 60
MAX_PIECES = 6  # tries of one cell in a run of a tier
NOT_FINISHED = 3  # exit code of a cell that needs another piece


def run_cell(cell: Cell, place: Place, again: bool = False, seed: int | None = None) -> int:
    """Run one cell, and return the exit code.

    Args:
        cell: the cell.
        place: folders of the study.
        again: run a finished cell once more and compare, instead of skipping it.
        seed: with ``again``, another seed of sampling.

    Raises:
        UserError: the cell cannot run.
        OSError: a file cannot be written.
    """
    with locked(place.work / f"{cell.name}.lock", f"the cell {cell.name}"):
        return _run_locked(cell, place, again, seed)


def _run_locked(cell: Cell, place: Place, again: bool, seed: int | None) -> int:
    result = read_result(cell, place)
    if result is not None and not again:
        print(f"{cell.name} is finished")
        return 0
    for need in cell.needs:
        if not place.folder(need).is_dir():
            raise ConfigError(
                f"{cell.name} needs the weights of {need}, which are not in {place.work}; run "
                f"that cell first{' (with --again)' if place.file(need).exists() else ''}"
            )
    from work import work_on  # loads torch

    started = time.monotonic()
    if result is not None:
        return _compare(cell, place, result, seed)
    values = work_on(cell, place)
    if values is None:
        print(f"{cell.name} is not finished: run it again")
        return NOT_FINISHED
    write_result(cell, place, values, time.monotonic() - started)
    print(f"{cell.name}: {place.file(cell.name)}")
    return 0


def _be_quiet() -> None:
    """Give this process the lowest priority and one thread, so that sums keep their order."""
    import torch

    os.nice(19 - os.nice(0))
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # of the trainings it starts
    torch.set_num_threads(1)


def _compare(cell: Cell, place: Place, result: Mapping[str, Any], seed: int | None) -> int:
    """Run a finished cell once more, and tell whether its values are the same.

    With another sampling ``seed``, tell whether its accuracies are within the prediction interval.
    """
    from work import work_on

    if seed is not None:
        if "ways" not in result["values"]:
            raise ConfigError(f"{cell.name} evaluates nothing: leave --seed out")
        changed = {**cell.settings, "seed": seed}
        cell = replace(cell, name=f"{cell.name}-seed{seed}", settings=changed)
    if cell.kind in MAKING and not place.folder(cell.name).is_dir():
        aside = place  # the weights were not kept: make them where other cells look for them
    else:
        aside = Place(place.results, place.work / "again")
        aside.work.mkdir(parents=True, exist_ok=True)
        for need in cell.needs:
            aside.folder(need).unlink(missing_ok=True)
            aside.folder(need).symlink_to(place.folder(need).resolve())
    values = work_on(cell, aside)
    if values is None:
        print(f"{cell.name} is not finished: run it again")
        return NOT_FINISHED
    if aside is not place:
        shutil.rmtree(aside.folder(cell.name), ignore_errors=True)
    if seed is not None:
        return _judge(values["ways"], result["values"]["ways"], seed)
    is_same = _fixed(json.loads(json.dumps(values))) == _fixed(result["values"])
    print(f"{cell.name}: {'the same values' if is_same else 'other values than the result'}")
    return 0 if is_same else 1


def _judge(ways: Mapping[str, Any], before: Mapping[str, Any], seed: int) -> int:
    """Print the accuracies with another seed; return 0 if all are as predicted."""
    from claims import as_scores
    from inference import prediction_interval

    is_inside = True
    for way, found in ways.items():
        for budget, lines in found["scores"].items():
            new = float(np.mean(as_scores(lines)))
            low, high = prediction_interval(as_scores(before[way]["scores"][budget]))
            is_inside = is_inside and low <= new <= high
            words = "inside" if low <= new <= high else "outside"
            print(f"{way}, budget {budget}, seed {seed}: {new:.3f}, {words} {low:.3f}..{high:.3f}")
    return 0 if is_inside else 1


def _fixed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return values without seconds and peaks, which differ from run to run."""
    rows = [row for row in values.get("rows", ()) if "flops" in row]
    return {**values, "rows": rows} if rows else values


class Driver:
    """Runs unfinished cells, each in a process of its own, some at a time."""

    def __init__(self, place: Place, extra: Sequence[str] = ()) -> None:
        self.place = place
        self.extra = tuple(extra)  # options of the command that runs a cell
        self.failed: list[str] = []
        self._running: set[subprocess.Popen[bytes]] = set()
        self._is_stopped = False

    def run(self, cells: Mapping[str, Cell], jobs: int, tier: str | None = None) -> int:
        """Run every unfinished cell, ``jobs`` at a time, and return the exit code.

        Args:
            cells: all cells of the study.
            jobs: number of cells at a time.
            tier: run the cells of this tier only, and those they need.

        Raises:
            ConfigError: a result was made with other sizes, or another driver runs here.
        """
        with locked(self.place.work / "driver.lock", f"the study in {self.place.work}"):
            finished = check_results(cells, self.place)
            return self._run(cells_of_tier(cells, tier) if tier else cells, finished, jobs)

    def _run(self, cells: Mapping[str, Cell], finished: Mapping[str, Any], jobs: int) -> int:
        for _, group in groupby(cells.values(), key=lambda cell: cell.kind):
            ready = [cell for cell in group if cell.name not in finished]
            with ThreadPoolExecutor(jobs) as pool:
                try:
                    list(pool.map(self._run_cell, ready))
                except BaseException:  # an interrupt: no cell may outlive the driver
                    self._stop()
                    raise
        if self.failed:
            names = ", ".join(self.failed)
            print(f"{len(self.failed)} of {len(cells)} cells are not finished: {names}")
            return 1
        print(f"all {len(cells)} cells are finished: {self.place.results}")
        return 0

    def command(self, cell: Cell) -> list[str]:
        """Return the command that runs a cell."""
        return [sys.executable, str(Path(__file__).resolve()), "run", cell.name, *self.extra]

    def _run_cell(self, cell: Cell) -> None:
        if set(cell.needs) & set(self.failed):
            self.failed.append(cell.name)
            return
        for _ in range(MAX_PIECES):
            if self._is_stopped or self._run_piece(cell) != NOT_FINISHED:
                break
        if not self.place.file(cell.name).exists():
            self.failed.append(cell.name)

    def _run_piece(self, cell: Cell) -> int:
        """Run a cell for at most 15 minutes, and return the exit code."""
        print(f"{time.strftime('%H:%M:%S')} {cell.name}", flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        # A group of its own, so that the training that a cell starts is stopped with it.
        process = subprocess.Popen(self.command(cell), env=environment, start_new_session=True)
        self._running.add(process)
        try:
            return process.wait(CELL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            print(f"{cell.name} is stopped after 15 minutes", flush=True)
            return NOT_FINISHED
        finally:
            _kill(process)
            self._running.discard(process)

    def _stop(self) -> None:
        self._is_stopped = True
        for process in list(self._running):
            _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all it started, unless it has ended."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def show(cells: Mapping[str, Cell], place: Place) -> None:
    """Print all cells, and which are finished."""
    finished = check_results(cells, place)
    for name in cells:
        seconds = f"{finished[name]['seconds']:6.0f} s" if name in finished else "       -"
        print(f"{seconds}  {name}")
    print(f"{len(finished)} of {len(cells)} cells are finished")


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {"list": "list all cells", "draw": "redraw tables and figures from the results"}
    for name, text in texts.items():
        commands.add_parser(name, help=text)
    run = commands.add_parser("run", help="run one cell, or all of a tier")
    run.add_argument("cell", nargs="?", help="name of a cell")
    run.add_argument("--tier", choices=TIERS, help="run all cells of a tier")
    run.add_argument("--jobs", type=int, default=1, help="cells at a time (default 1)")
    run.add_argument("--again", action="store_true", help="rerun a finished cell and compare")
    run.add_argument("--seed", type=int, help="with --again: another seed of sampling")
    for command in commands.choices.values():
        command.add_argument("--reduced", action="store_true", help="the smaller study")
    arguments = parser.parse_args(argv)
    if arguments.command == "run":
        is_whole = arguments.tier is not None or (arguments.reduced and arguments.cell is None)
        if (arguments.cell is None) != is_whole or (arguments.again and is_whole):
            parser.error("run takes the name of a cell, or --tier, or --reduced alone")
        if arguments.seed is not None and not arguments.again:
            parser.error("--seed needs --again: a result has the seed of its cell")
        if arguments.jobs < 1:
            parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    arguments = read_arguments(argv)
    place = Place.of(arguments.reduced)
    extra = ["--reduced"] if arguments.reduced else []
    try:
        cells = make_cells(read_sizes(arguments.reduced))
        if arguments.command == "list":
            show(cells, place)
        elif arguments.command == "draw":
            from page import PAGE, draw

            results = check_results(cells, place)
            draw(cells, results, place.results, None if arguments.reduced else PAGE)
        elif arguments.cell is None:
            signal.signal(signal.SIGTERM, _interrupt)
            return Driver(place, extra).run(cells, arguments.jobs, arguments.tier or "A")
        else:
            find_cell(cells, arguments.cell)
            _be_quiet()
            return run_cell(
                find_cell(cells, arguments.cell), place, arguments.again, arguments.seed
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    except OSError as error:
        reason = error.strerror or error
        print(f"error: cannot write {error.filename or place.results}: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
