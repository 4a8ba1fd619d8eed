"""Options of ``delethink eval`` and ``delethink probe``, without heavy imports.

``delethink --help`` loads this module.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_OLD_ENGINE_OPTIONS = {
    "--engine": "engine",
    "--num-workers": "engine.num_engines",
    "--gpus-per-worker": "engine.gpus_per_engine",
    "--dtype": "engine.dtype",
    "--batch-size": "engine.max_batch_size",
}


class _OldOption(argparse.Action):
    """Stores a sentence about the new name of an option; the command then refuses the option."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        namespace.old_option = f"{option_string} {values} is now written {self.const}={values}"


def add_eval_options(command: argparse.ArgumentParser) -> None:
    """Add the options of ``delethink eval``. The preset fills in a value of ``None``."""
    _add_problems(command)
    _add_thinking(command)
    _add_sampling(command)
    _add_engine(command)
    _add_server(command)
    _add_analysis(command)
    _add_output(command)


def add_probe_options(command: argparse.ArgumentParser) -> None:
    """Add the options of ``delethink probe``."""
    command.add_argument(
        "-m", "--model", required=True, help="folder, Hugging Face id, or toy for the shipped model"
    )
    traces = command.add_argument_group("traces: from a file, or sampled as LongCoT")
    traces.add_argument(
        "--traces", type=Path, metavar="PATH", help="file of traces, or run directory"
    )
    traces.add_argument("--task", help="sample traces of this task or file of problems")
    traces.add_argument(
        "--task-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of the task (repeatable)",
    )
    traces.add_argument(
        "--num-problems", type=int, metavar="N", help="use the first N problems (default 64)"
    )
    traces.add_argument(
        "--budget", default="8k", metavar="TOKENS", help="maximum length of a trace (default 8k)"
    )
    traces.add_argument(
        "--temperature", type=float, default=0.6, help="sampling temperature (default 0.6)"
    )
    traces.add_argument("--seed", type=int, default=0, help="seed of problems and traces (0)")
    _add_engine_values(traces)
    boundaries = command.add_argument_group("boundaries (k is 1,024; lists with commas)")
    boundaries.add_argument(
        "-C", "--context-size", default="8k", metavar="TOKENS", help="context size C (default 8k)"
    )
    boundaries.add_argument(
        "--carryover-size",
        metavar="LIST",
        help="carryover sizes m (default C/8, C/4 and C/2); controls use the largest",
    )
    _add_carryover(boundaries)
    output = command.add_argument_group("output")
    output.add_argument(
        "-o", "--output", type=Path, metavar="PATH", help="new folder (default probes/…)"
    )
    output.add_argument("--json", action="store_true", help="print JSON; progress goes to stderr")


def _add_problems(command: argparse.ArgumentParser) -> None:
    problems = command.add_argument_group("model and problems")
    problems.add_argument(
        "-m",
        "--model",
        action="append",
        required=True,
        metavar="MODEL",
        help="folder, Hugging Face id, or toy for the shipped model; for several, use commas or "
        "repeat the option, baseline first",
    )
    problems.add_argument(
        "--task", required=True, help="registered task, or file (JSON lines, JSON, Parquet, CSV)"
    )
    problems.add_argument(
        "--task-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of the task (repeatable); for a file: problem_key, answer_key",
    )
    problems.add_argument(
        "--split", default="heldout", help="split of a registered task (default heldout)"
    )
    problems.add_argument(
        "--num-problems", type=int, metavar="N", help="use the first N problems (default: all)"
    )
    problems.add_argument(
        "--reward", help="reward that grades answers as 1 or 0 (default: the task's first)"
    )


def _add_thinking(command: argparse.ArgumentParser) -> None:
    thinking = command.add_argument_group("thinking (k is 1,024; lists with commas)")
    thinking.add_argument(
        "--mode",
        default="delethink,longcot",
        metavar="LIST",
        help="delethink, longcot, or both (default)",
    )
    thinking.add_argument(
        "-C", "--context-size", metavar="LIST", help="context sizes C (default 8k)"
    )
    thinking.add_argument(
        "--carryover-size", metavar="LIST", help="carryover sizes m (default: half of each C)"
    )
    _add_carryover(thinking)
    thinking.add_argument("--head-outside", action="store_true", help="carry the head on top of m")
    thinking.add_argument(
        "--max-chunks",
        metavar="LIST",
        help="numbers of chunks I; traces of the largest are cut to the smaller ones; a single "
        "number is spread over five budgets (default 5)",
    )
    thinking.add_argument(
        "--cap-longcot",
        action="store_true",
        help="limit LongCoT's budgets to the model's window instead of refusing longer ones",
    )


def _add_carryover(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--head-size",
        metavar="TOKENS",
        help="carried tokens from the start of the thinking (default min(100, m/4))",
    )
    group.add_argument(
        "--carryover",
        metavar="NAME[:KEY=VALUE,...]",
        help="carryover policy, e.g. tail or sink_window:num_sinks=8 (default head_tail)",
    )


def _add_sampling(command: argparse.ArgumentParser) -> None:
    sampling = command.add_argument_group("sampling")
    sampling.add_argument(
        "-n", "--samples", type=int, metavar="N", help="samples per problem (default 4)"
    )
    sampling.add_argument("--temperature", type=float, help="sampling temperature (default 0.6)")
    sampling.add_argument("--seed", type=int, default=0, help="seed of problems and samples (0)")
    sampling.add_argument(
        "--force-answer",
        type=int,
        default=0,
        metavar="TOKENS",
        help="when a budget is spent, close the thinking and sample an answer of up to TOKENS "
        "tokens (default 0: none)",
    )
    sampling.add_argument(
        "--preset",
        choices=["paper"],
        help="paper: 256 samples and avg@128 by bootstrap; the paper's C, m and temperature are "
        "the defaults",
    )
    sampling.add_argument(
        "--in-flight",
        type=int,
        metavar="N",
        help="maximum traces sampled at the same time (default 512; 256 with --base-url)",
    )


def _add_engine_values(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "values",
        nargs="*",
        metavar="engine.key=value",
        help="engine settings as in a recipe, e.g. engine=vllm engine.num_engines=2",
    )
    for option, new_name in _OLD_ENGINE_OPTIONS.items():
        group.add_argument(
            option,
            action=_OldOption,
            const=new_name,
            dest="old_option",
            help=argparse.SUPPRESS,
        )
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run code from the model's repository"
    )


def _add_engine(command: argparse.ArgumentParser) -> None:
    _add_engine_values(command.add_argument_group("engine"))


def _add_server(command: argparse.ArgumentParser) -> None:
    server = command.add_argument_group("server instead of an engine")
    server.add_argument(
        "--base-url",
        metavar="URL",
        help="OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1; -m names the tokenizer",
    )
    server.add_argument(
        "--served-model",
        metavar="NAME",
        help="name of the model on the server (default: the only one served)",
    )
    server.add_argument(
        "--api-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable that holds the API key (default %(default)s)",
    )
    server.add_argument(
        "--retries",
        type=int,
        default=8,
        metavar="N",
        help="retries of a failed request, with growing waits, 40 s in all (default %(default)s)",
    )
    server.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="limit for the response to a request (default 600)",
    )


def _add_analysis(command: argparse.ArgumentParser) -> None:
    analysis = command.add_argument_group("analysis")
    analysis.add_argument(
        "--margin",
        type=float,
        default=0.02,
        help="smallest difference in accuracy of interest (default 0.02)",
    )
    analysis.add_argument("--bootstrap", type=int, metavar="K", help="report avg@K by bootstrap")
    analysis.add_argument(
        "--resamples",
        type=int,
        default=5000,
        metavar="N",
        help="resamples of the bootstrap (default 5000)",
    )
    analysis.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME",
        help="device assumed for time estimates, see `delethink cost` (default h100)",
    )
    analysis.add_argument(
        "--cost-model",
        metavar="NAME",
        help="model whose shape the cost estimates use (default: the evaluated model)",
    )


def _add_output(command: argparse.ArgumentParser) -> None:
    output = command.add_argument_group("output")
    output.add_argument(
        "-o", "--output", type=Path, metavar="PATH", help="new folder (default evaluations/…)"
    )
    output.add_argument(
        "--resume", action="store_true", help="continue the evaluation in the folder of -o"
    )
    output.add_argument(
        "--force", action="store_true", help="resume with other settings than before"
    )
    output.add_argument(
        "--retry-errors", action="store_true", help="with --resume: sample failed traces again"
    )
    output.add_argument("--no-tokens", action="store_true", help="do not store sampled tokens")
    output.add_argument("--no-curves", action="store_true", help="do not write scaling curves")
    output.add_argument("--json", action="store_true", help="print JSON; progress goes to stderr")
