"""The ``delethink`` command.

Exit codes: 0 only on success, 1 for a run that broke, 2 for something the user can mend, 130 for an
interrupt.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from delethink import __version__
from delethink.cli import cost_options, eval_options
from delethink.errors import DelethinkError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    arguments = _parser().parse_args(argv)
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, _interrupt)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        return _fail("interrupted; what was written before is whole", 130)
    except UserError as problem:
        return _fail(str(problem), 2)
    except DelethinkError as problem:
        return _fail(str(problem), 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="delethink",
        description="Reasoning whose context is reset every chunk: linear compute, bounded memory.",
    )
    parser.add_argument("--version", action="version", version=f"delethink {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_eval(commands)
    _add_cost(commands)
    _add_doctor(commands)
    return parser


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "train",
        help="train a model with reinforcement learning",
        description="Train a model with reinforcement learning in the thinking environment.",
        epilog="E.g.: delethink train recipes/quickstart/recipe.yaml seed=1 training.max_steps=9",
    )
    command.add_argument("recipe", help="a YAML file; see recipes/")
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="dotted.key=value, over the recipe's value",
    )
    command.set_defaults(run=_train)


def _add_eval(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "eval",
        help="measure how far thinking scales, Delethink against LongCoT",
        description="Sample each problem many times at the largest budget, cut the traces to every "
        "smaller one, and report accuracies with intervals: docs/evaluation.md",
        epilog="E.g.: delethink eval -m toy --task automaton --task-arg min_steps=16 --task-arg "
        "max_steps=24 -C 90 --carryover 45 --head-size 0 --max-chunks 9 -n 4 -o out",
    )
    eval_options.add_to(command)
    command.set_defaults(run=_evaluate)


def _add_cost(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "cost",
        help="estimate FLOPs, memory, time and money, LongCoT against Delethink",
        description="Estimate FLOPs, memory, time and money of LongCoT and Delethink, by "
        "arithmetic alone. What is counted, and how well it fits what was measured: docs/cost.md",
        epilog="E.g.: delethink cost --model Qwen/Qwen2.5-1.5B --thinking 24k,96k,1M -C 8k -m 4k "
        "--gpu h100 --gpus 8",
    )
    cost_options.add_to(command)
    command.set_defaults(run=_cost)


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "doctor",
        help="say what is installed and what works here",
        description="Say what is installed, what it can do on this machine, and what is missing.",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_doctor)


def _train(arguments: argparse.Namespace) -> int:
    from delethink.cli.train import run

    return run(arguments.recipe, arguments.overrides)


def _evaluate(arguments: argparse.Namespace) -> int:
    from delethink.cli.evaluate import run

    return run(arguments)


def _cost(arguments: argparse.Namespace) -> int:
    from delethink.cli.cost import run

    return run(arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from delethink.cli.doctor import run

    return run(as_json=arguments.json)


def _interrupt(*_: object) -> None:
    """At once, engines closed, for Ctrl-C and for SIGTERM, with which a cluster stops a job.

    Left to asyncio, Ctrl-C would wait for a whole round of sampling.
    """
    raise KeyboardInterrupt


def _fail(text: str, code: int) -> int:
    print(f"delethink: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
