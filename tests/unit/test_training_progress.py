"""Output of a training run: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console
from rich.text import Text

from delethink import output
from delethink.training import progress as module
from delethink.training.progress import TrainingProgress


def shown(*, is_terminal: bool) -> tuple[TrainingProgress, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=100)
    return TrainingProgress(console), file


def test_an_evaluation_has_a_bar_beside_that_of_the_steps() -> None:
    progress, file = shown(is_terminal=True)
    progress.start_steps(4)
    with progress.evaluating("held-out", 3) as on_end:
        for _ in range(3):
            on_end()
    progress.step({"step": 1}, 4)
    progress.stop_steps()
    with progress.evaluating("after RL", 2) as on_end:
        on_end()
    assert "evaluating held-out" in file.getvalue()
    assert "evaluating after RL" in file.getvalue()
    assert "0:00:00 left" in Text.from_ansi(file.getvalue()).plain, "the time of a long step moves"


def test_a_long_evaluation_says_how_long_it_takes_and_how_to_skip_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    progress, file = shown(is_terminal=False)
    with progress.evaluating("base, LongCoT", 8) as on_end:
        for _ in range(8):
            now += 6.0
            on_end()
    lines = file.getvalue().splitlines()
    assert lines[0] == (
        "evaluating base, LongCoT: 2/8, about 36 s left (evaluation.num_problems=0 trains without)"
    )
    assert [line.split(": ")[1][:3] for line in lines] == ["2/8", "4/8", "6/8"]


def test_every_step_of_a_short_run_has_a_line() -> None:
    for total, lines in ((4, [1, 2, 3, 4]), (30, [1, 5, 10, 15, 20, 25, 30])):
        progress, file = shown(is_terminal=False)
        for step in range(1, total + 1):
            progress.step({"step": step}, total)
        numbers = [int(line.split()[1].split("/")[0]) for line in file.getvalue().splitlines()]
        assert numbers == lines


def test_a_wait_on_a_terminal_shows_its_purpose_and_its_seconds() -> None:
    progress, file = shown(is_terminal=True)
    progress.wait("reading model")
    wait_for(file, "0:00:01")  # it moves while nothing else happens
    progress.wait("loading libraries")
    assert "loading libraries" in file.getvalue()
    with progress.evaluating("base", 1) as on_end:  # two displays at once would be refused
        on_end()
    assert progress._waiting is None
    progress.end_wait()


def test_a_long_wait_elsewhere_has_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_LINE_INTERVAL_S", 0.01)
    progress, file = shown(is_terminal=False)
    progress.wait("reading model")
    wait_for(file, "reading model: 0 s so far")
    progress.wait("loading libraries")
    wait_for(file, "loading libraries: 0 s so far")
    waiting = progress._waiting
    progress.end_wait()
    assert waiting is not None
    waiting.thread.join(60)
    count = file.getvalue().count("\n")
    progress.log("next")
    assert file.getvalue().count("\n") == count + 1, "no line follows the end"


def test_a_short_wait_elsewhere_prints_nothing() -> None:
    progress, file = shown(is_terminal=False)
    progress.wait("reading model")
    progress.start_steps(3)
    assert not file.getvalue()


def wait_for(file: io.StringIO, text: str) -> None:
    end = time.monotonic() + 60
    while text not in Text.from_ansi(file.getvalue()).plain:
        assert time.monotonic() < end, file.getvalue()
        time.sleep(0.01)
