"""The ``delethink`` command.

Exit codes: 0 on success only, 1 for a run that failed, 2 for a user's mistake, 130 for an
interrupt.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from delethink import __version__
from delethink.cli import options
from delethink.errors import DelethinkError, UserError
from delethink.output import echo, guard_process, safe_text

# Arguments of the task ``dataset``, which are options of ``delethink tasks`` alone.
_DATA_SET_ARGUMENTS = ("problem_key", "answer_key", "template", "system", "dataset")


class _Command(NamedTuple):
    name: str
    module: str  # holds run(arguments), and is imported after the arguments are parsed
    add_options: Callable[[argparse.ArgumentParser], None]
    help: str
    description: str
    example: str


_COMMANDS = (
    _Command(
        "train",
        "delethink.cli.train",
        options.add_train_options,
        "train a model with reinforcement learning",
        "Train a model with reinforcement learning in the thinking environment.",
        "delethink train recipes/quickstart/recipe.yaml seed=1 training.max_steps=9",
    ),
    _Command(
        "eval",
        "delethink.cli.evaluate",
        options.add_eval_options,
        "measure how far thinking scales, Delethink against LongCoT",
        "Sample each problem many times at the largest budget, cut the traces to every smaller "
        "one, and report accuracies with intervals. `delethink eval FOLDER` continues an "
        "evaluation, `delethink eval compare FOLDER FOLDER` puts several in one table: "
        "docs/guide/evaluation.md",
        "delethink eval -m toy --task automaton --task-arg min_steps=16 --task-arg "
        "max_steps=24 -C 90 --carryover-size 45 --head-size 0 --max-chunks 9 -n 4 -o out",
    ),
    _Command(
        "probe",
        "delethink.cli.probe",
        options.add_probe_options,
        "measure how Markovian a model already is: the log-loss a reset costs",
        "Score the tokens after each boundary twice, after the whole history and after what a "
        "reset leaves, and report what is lost: docs/guide/probing.md",
        "delethink probe -m toy --task automaton --task-arg min_steps=16 --task-arg "
        "max_steps=24 -C 90 --carryover-size 15,30,45 --head-size 0 --budget 450",
    ),
    _Command(
        "cost",
        "delethink.cli.cost",
        options.add_cost_options,
        "estimate FLOPs, memory, time and money, LongCoT against Delethink",
        "Estimate FLOPs, memory, time and money of LongCoT and Delethink, by arithmetic alone. "
        "The formulas and their fit to measured times: docs/guide/cost.md",
        "delethink cost -m Qwen/Qwen2.5-1.5B --thinking 24k,96k,1M -C 8k --carryover-size 4k "
        "--gpu h100 --gpus 8",
    ),
    _Command(
        "tasks",
        "delethink.cli.tasks",
        options.add_tasks_options,
        "list tasks and rewards, or show a task's problems and check its grader",
        "List tasks and rewards, or print the problems of a task and check its grader: gold "
        "answers must be accepted and wrong ones rejected, otherwise the exit code is 1.",
        "delethink tasks dataset --dataset my.jsonl --answer-key solution -n 3",
    ),
    _Command(
        "view",
        "delethink.cli.view",
        options.add_view_options,
        "look at traces: in a browser, in the terminal, or as a file to send",
        "Show the traces of a run, an evaluation or a file: which tokens each context carried over "
        "its boundary, what was dropped, and where the answer is: docs/guide/view.md",
        "delethink view runs/quickstart",
    ),
    _Command(
        "serve",
        "delethink.cli.serve",
        options.add_serve_options,
        "serve a model whose thinking goes past its window, for any OpenAI client",
        "Serve the API of OpenAI with chunked thinking, over own engines or in front of a server "
        "that is already there: docs/guide/serve.md",
        "delethink serve -m toy -C 90 --carryover-size 45 --max-chunks 9 --answer-tokens 16",
    ),
    _Command(
        "doctor",
        "delethink.cli.doctor",
        options.add_doctor_options,
        "check the installation, or whether a recipe can run here",
        "Check the installation, or whether a recipe can run on this machine: names, tokenizer, "
        "context window, memory, disk and rewards. The exit code is 1 if a check fails.",
        "delethink doctor recipes/quickstart/recipe.yaml training.max_steps=9",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    guard_process()
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, _interrupt)
        return int(importlib.import_module(arguments.module).run(arguments))
    except KeyboardInterrupt as error:
        advice = f"; {error}" if str(error) else ""
        return _fail(f"interrupted; everything written so far is complete{advice}", 130)
    except UserError as error:
        return _fail(str(error), 2)
    except DelethinkError as error:
        return _fail(str(error), 1)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments; ``key=value`` may also follow options, unlike in plain argparse.

    The result has the arguments themselves as ``argv``, without the name of the command.
    """
    parser = _parser()
    arguments, late = parser.parse_known_args(argv)
    arguments.argv = list(argv[1:])
    values = getattr(arguments, "values", None)
    if unknown := [x for x in late if values is None or "=" not in x or x.startswith("-")]:
        parser.error(_unknown_arguments(unknown, arguments.actions))
    if values is not None:
        values.extend(late)
    return arguments


def _unknown_arguments(unknown: Sequence[str], actions: Sequence[argparse.Action]) -> str:
    """Return a sentence about arguments that a command does not take, with the nearest option."""
    known = {name: action for action in actions for name in action.option_strings}
    advice = ""
    if (name := unknown[0].partition("=")[0]).startswith("--"):
        key = name.removeprefix("--").replace("-", "_")
        if "--task-arg" in known and key in _DATA_SET_ARGUMENTS:
            advice = f" Write --task-arg {key}=…"
        elif name in ("--budget", "--budgets"):
            advice = " Budgets follow from -C, --carryover-size and --max-chunks."
        elif near := difflib.get_close_matches(name, known, n=1):
            advice = f" Did you mean {near[0]}?"
    return f"unknown arguments: {' '.join(unknown)}.{advice}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(safe_text(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="delethink",
        description="Reasoning whose context is reset every chunk: linear compute, bounded memory.",
    )
    parser.add_argument("--version", action="version", version=f"delethink {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        added = commands.add_parser(
            command.name,
            help=command.help,
            description=command.description,
            epilog=f"E.g.: {command.example}",
        )
        command.add_options(added)
        added.set_defaults(module=command.module, actions=tuple(added._actions))
    return parser


def _interrupt(*_: object) -> None:
    """Raise KeyboardInterrupt at once, on Ctrl-C and on SIGTERM (sent by clusters to end a job).

    asyncio's own handler would wait for the current round of sampling. Curves, reports and engines
    may take seconds to close, so a line comes first; a print could meet another one half done.
    """
    # An event loop that the interrupt leaves half made raises while it is destroyed.
    sys.unraisablehook = _ignore
    with contextlib.suppress(OSError):
        os.write(2, b"\ninterrupted: closing files and engines\n")
    raise KeyboardInterrupt


def _ignore(_: object) -> None:
    """Print nothing about an exception that cannot be raised."""


def _fail(text: str, code: int) -> int:
    echo(f"delethink: {text}", stderr=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
