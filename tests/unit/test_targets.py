"""Named results of the paper: their settings, the interval, and when they are not compared."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

import pytest

from delethink.cli.arguments import sizes
from delethink.cli.main import main
from delethink.cli.options import add_eval_options
from delethink.cli.presets import apply_preset, changed_options, compared, comparison_lines
from delethink.errors import ConfigError
from delethink.evaluation.metrics import Estimate
from delethink.evaluation.settings import make_settings
from delethink.evaluation.targets import TARGETS, compare
from delethink.registry import names


@dataclass
class Row:
    mode: str
    budget: int
    accuracy: float
    problems: int = 30
    samples: int = 30 * 256

    @property
    def avg(self) -> Estimate:
        return Estimate(self.accuracy, 0.0, 1.0)


def parsed(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_eval_options(parser)
    arguments = parser.parse_args(list(given))
    apply_preset(arguments)
    return arguments


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_an_evaluation_with_the_published_budgets(name: str) -> None:
    arguments, target = parsed("--preset", name), TARGETS[name]
    assert arguments.task in names("delethink.tasks")
    settings = make_settings(
        arguments.model,
        arguments.mode.split(","),
        sizes(arguments.context_size, "-C"),
        sizes(arguments.carryover_size, "-m"),
        sizes(arguments.max_chunks, "-I"),
        longcot_cap=131_072 - 300 if arguments.cap_longcot else None,
    )
    measured = {(setting.mode, budget) for setting in settings for budget in setting.budgets}
    assert {(one.mode, one.budget) for one in target.expected} <= measured
    for setting in settings:
        assert setting.mode == "longcot" or setting.spec.head_size == 100
    assert list(changed_options(arguments)) == []


def test_the_headline_of_the_paper() -> None:
    arguments = parsed("--preset", "delethink-24k")
    assert (arguments.model, arguments.task) == (["McGill-NLP/delethink-24k-1.5b"], "aime_2025")
    assert (arguments.samples, arguments.bootstrap) == (256, 128)
    rows = [Row("delethink", 24_576, 0.2), Row("delethink", 131_072, 0.34)]
    below, inside = compared(arguments, rows)
    assert (below.verdict, inside.verdict) == ("below", "inside")
    assert (round(inside.low, 3), inside.published, round(inside.high, 3)) == (0.33, 0.347, 0.364)
    assert comparison_lines(arguments, rows)[1] == (
        "delethink-24k: delethink at 131,072 tokens: 0.340, inside; published 0.347, expected "
        "0.330 to 0.364 (figure 4)"
    )
    (above,) = [replace(inside, measured=0.5)]
    assert above.verdict == "above"


def test_fewer_samples_have_a_wider_interval() -> None:
    target = TARGETS["delethink-96k"]
    few = [replace_samples(4), replace_samples(256)]
    widths = [compare(target, [row], 256)[0] for row in few]
    assert widths[0].high - widths[0].low > 3 * (widths[1].high - widths[1].low)
    (_, absent) = compare(target, [replace_samples(256)], 256)
    assert (absent.measured, absent.verdict) == (None, "not measured")


def replace_samples(samples: int) -> Row:
    return Row("delethink", 98_304, 0.49, samples=30 * samples)


def test_options_given_win_over_the_preset() -> None:
    given = ["--preset", "delethink-24k", "-m", "folder", "-n", "8", "--task-arg", "dataset=x"]
    arguments = parsed(*given, "--max-chunks", "5")
    assert (arguments.model, arguments.samples) == (["folder"], 8)
    assert list(changed_options(arguments)) == []
    assert compared(arguments, [])[1].verdict == "not measured"
    assert parsed("-m", "a", "--task", "b", "-n", "0").samples == 0  # refused later


@pytest.mark.parametrize(
    ("given", "option"),
    [
        (["-C", "4k"], "--context-size"),
        (["-C", "8k,4k"], "--context-size"),
        (["--carryover-size", "1k"], "--carryover-size"),
        (["--task", "aime_2024"], "--task"),
        (["--task-arg", "template={problem}"], "--task-arg"),
        (["--temperature", "1"], "--temperature"),
        (["--num-problems", "3"], "--num-problems"),
        (["--head-size", "0"], "--head-size"),
        (["--head-outside"], "--head-outside"),
        (["--carryover", "tail"], "--carryover"),
        (["--force-answer", "9"], "--force-answer"),
        (["--reward", "exact"], "--reward"),
        (["-m", "a,b"], "--model"),
    ],
)
def test_other_settings_are_not_compared(given: list[str], option: str) -> None:
    arguments = parsed("--preset", "delethink-24k", *given)
    assert comparison_lines(arguments, []) == [
        f"delethink-24k: not compared with the paper, because of {option}"
    ]
    assert compared(arguments, []) == []


def test_the_same_sizes_in_other_words_are_compared() -> None:
    arguments = parsed("--preset", "longcot-24k", "-C", "8192", "--carryover-size", "4096")
    assert len(compared(arguments, [])) == 1


def test_without_a_target_there_is_nothing_to_compare(capsys: Any) -> None:
    for preset in ([], ["--preset", "paper"]):
        arguments = parsed("-m", "toy", "--task", "automaton", *preset)
        assert (comparison_lines(arguments, []), compared(arguments, [])) == ([], [])
        assert (arguments.mode, arguments.max_chunks) == ("delethink,longcot", "5")
    assert (arguments.samples, arguments.bootstrap) == (256, 128)
    with pytest.raises(ConfigError, match="--task is needed"):
        parsed("-m", "toy")
    assert main(["eval"]) == 2
    assert "--model is needed" in capsys.readouterr().err
