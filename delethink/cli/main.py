"""The ``delethink`` command.

Exit codes: 0 on success only, 1 for a run that failed, 2 for a user's mistake, 130 for an
interrupt.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from delethink import __version__
from delethink.cli.cost_options import add_cost_options
from delethink.cli.eval_options import add_eval_options, add_probe_options
from delethink.errors import DelethinkError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = _parse(argv)
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, _interrupt)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        return _fail("interrupted; everything written so far is complete", 130)
    except UserError as error:
        return _fail(str(error), 2)
    except DelethinkError as error:
        return _fail(str(error), 1)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments; ``key=value`` may also follow options, unlike in plain argparse."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    late = [text for text in rest if "=" in text and not text.startswith("-")]
    values = getattr(arguments, "values", None)
    if values is None or len(late) < len(rest):
        unknown = [text for text in rest if values is None or text not in late]
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        return arguments
    values.extend(late)
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="delethink",
        description="Reasoning whose context is reset every chunk: linear compute, bounded memory.",
    )
    parser.add_argument("--version", action="version", version=f"delethink {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_eval(commands)
    _add_probe(commands)
    _add_cost(commands)
    _add_tasks(commands)
    _add_doctor(commands)
    return parser


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "train",
        help="train a model with reinforcement learning",
        description="Train a model with reinforcement learning in the thinking environment.",
        epilog="E.g.: delethink train recipes/quickstart/recipe.yaml seed=1 training.max_steps=9",
    )
    command.add_argument(
        "recipe", help="YAML file (see recipes/), or the directory of a run to resume"
    )
    command.add_argument(
        "values",
        nargs="*",
        metavar="key=value",
        help="override of a recipe key, such as training.max_steps=9 or engine=vllm",
    )
    command.set_defaults(run=_train)


def _add_eval(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "eval",
        help="measure how far thinking scales, Delethink against LongCoT",
        description="Sample each problem many times at the largest budget, cut the traces to every "
        "smaller one, and report accuracies with intervals: docs/guide/evaluation.md",
        epilog="E.g.: delethink eval -m toy --task automaton --task-arg min_steps=16 --task-arg "
        "max_steps=24 -C 90 --carryover-size 45 --head-size 0 --max-chunks 9 -n 4 -o out",
    )
    add_eval_options(command)
    command.set_defaults(run=_evaluate)


def _add_probe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "probe",
        help="measure how Markovian a model already is: the log-loss a reset costs",
        description="Score the tokens after each boundary twice, after the whole history and after "
        "what a reset leaves, and report what is lost: docs/guide/probing.md",
        epilog="E.g.: delethink probe -m toy --task automaton --task-arg min_steps=16 --task-arg "
        "max_steps=24 -C 90 --carryover-size 15,30,45 --head-size 0 --budget 450",
    )
    add_probe_options(command)
    command.set_defaults(run=_probe)


def _add_cost(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "cost",
        help="estimate FLOPs, memory, time and money, LongCoT against Delethink",
        description="Estimate FLOPs, memory, time and money of LongCoT and Delethink, by "
        "arithmetic alone. The formulas and their fit to measured times: docs/guide/cost.md",
        epilog="E.g.: delethink cost -m Qwen/Qwen2.5-1.5B --thinking 24k,96k,1M -C 8k "
        "--carryover-size 4k --gpu h100 --gpus 8",
    )
    add_cost_options(command)
    command.set_defaults(run=_cost)


def _add_tasks(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "tasks",
        help="list tasks and rewards, or show a task's problems and check its grader",
        description="List tasks and rewards, or print the problems of a task and check its grader: "
        "gold answers must be accepted and wrong ones rejected, otherwise the exit code is 1.",
        epilog="E.g.: delethink tasks dataset --dataset my.jsonl --answer-key solution -n 3",
    )
    command.add_argument(
        "name", nargs="?", help="task to show; left out, all tasks and rewards are listed"
    )
    command.add_argument(
        "values", nargs="*", metavar="key=value", help="argument of the task, as in task.args"
    )
    command.add_argument("--dataset", help="file, folder or Hugging Face data set to read")
    command.add_argument("--split", help="split of the data set")
    command.add_argument("--problem-key", help="column of the problem")
    command.add_argument("--answer-key", help="column of the gold answer")
    command.add_argument(
        "--of", choices=("train", "heldout"), help="problems to show: training or held-out"
    )
    command.add_argument(
        "-n", "--number", type=_count, default=1, help="number of problems to show (default 1)"
    )
    command.add_argument(
        "--check", type=_count, default=8, help="number of problems to grade (default 8)"
    )
    command.add_argument("--model", help="render prompts with this model's chat template")
    command.add_argument("--seed", type=int, default=0, help="seed of the task (default 0)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_tasks)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number from 0, got {text!r}")
    return int(text)


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "doctor",
        help="check the installation, or whether a recipe can run here",
        description="Check the installation, or whether a recipe can run on this machine: names, "
        "tokenizer, context window, memory, disk and rewards. The exit code is 1 if a check fails.",
        epilog="E.g.: delethink doctor recipes/quickstart/recipe.yaml training.max_steps=9",
    )
    command.add_argument("recipe", nargs="?", help="recipe, or the directory of a run")
    command.add_argument("values", nargs="*", metavar="key=value", help="override of a recipe key")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_doctor)


def _train(arguments: argparse.Namespace) -> int:
    from delethink.cli.train import run

    return run(arguments.recipe, arguments.values)


def _tasks(arguments: argparse.Namespace) -> int:
    from delethink.cli.tasks import run

    keys = ("dataset", "split", "problem_key", "answer_key")
    return run(
        arguments.name,
        arguments.values,
        {key: getattr(arguments, key) for key in keys},
        number=arguments.number,
        checks=arguments.check,
        split=arguments.of,
        model=arguments.model,
        seed=arguments.seed,
        as_json=arguments.json,
    )


def _evaluate(arguments: argparse.Namespace) -> int:
    from delethink.cli.evaluate import run

    return run(arguments)


def _probe(arguments: argparse.Namespace) -> int:
    from delethink.cli.probe import run

    return run(arguments)


def _cost(arguments: argparse.Namespace) -> int:
    from delethink.cli.cost import run

    return run(arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from delethink.cli.doctor import run

    return run(arguments.recipe, arguments.values, as_json=arguments.json)


def _interrupt(*_: object) -> None:
    """Raise KeyboardInterrupt at once, on Ctrl-C and on SIGTERM (sent by clusters to end a job).

    asyncio's own handler would wait for the current round of sampling.
    """
    raise KeyboardInterrupt


def _fail(text: str, code: int) -> int:
    print(f"delethink: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
