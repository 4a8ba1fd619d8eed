"""Options of the commands, without heavy imports because ``delethink --help`` loads them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from delethink.errors import ConfigError
from delethink.evaluation.targets import TARGETS

_OLD_ENGINE_OPTIONS = {
    "--engine": "engine",
    "--num-workers": "engine.num_engines",
    "--gpus-per-worker": "engine.gpus_per_engine",
    "--dtype": "engine.dtype",
    "--batch-size": "engine.max_batch_size",
}


class _OldOption(argparse.Action):
    """Refuses an option of an earlier release."""

    def __call__(
        self, parser: object, namespace: object, values: object, option_string: str | None = None
    ) -> None:
        raise ConfigError(f"{option_string} {values} is now written {self.const}={values}")


def add_eval_options(command: argparse.ArgumentParser) -> None:
    """Add the options of ``delethink eval``; the preset sets ``None`` values."""
    add = command.add_argument_group("model and problems").add_argument
    add(
        "-m",
        "--model",
        action="append",
        help="folder, Hugging Face id, training run, or toy for the shipped model; for several, "
        "use commas or repeat the option, baseline first",
    )
    add("--task", help="registered task, or file (JSON lines, JSON, Parquet, CSV)")
    _add_task_arguments(add)
    add("--split", default="heldout", help="split of a registered task (default heldout)")
    add("--num-problems", type=int, metavar="N", help="use the first N problems (default: all)")
    add("--reward", help="reward that grades answers as 1 or 0 (default: the task's first)")
    add(
        "--reward-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="setting of the reward, e.g. end=null to grade the whole output (repeatable)",
    )
    _add_unsafe_code(add)
    _add_thinking(command)
    _add_sampling(command)
    _add_engine(command.add_argument_group("engine").add_argument)
    _add_server(command)
    _add_analysis(command)
    add = command.add_argument_group("output").add_argument
    _add_output(add, "evaluations")
    add("--resume", action="store_true", help="continue the evaluation in the folder of -o")
    add("--force", action="store_true", help="resume with other settings than before")
    add("--retry-errors", action="store_true", help="with --resume: sample failed traces again")
    add("--no-tokens", action="store_true", help="do not store sampled tokens")
    add("--no-curves", action="store_true", help="do not write scaling curves")


def add_view_options(command: argparse.ArgumentParser) -> None:
    """Add the options of ``delethink view``."""
    add = command.add_argument
    add("path", metavar="PATH", help="run, evaluation, or file of traces (.jsonl, .parquet)")
    add("--text", action="store_true", help="print traces in the terminal")
    add(
        "--export",
        metavar="FILE",
        help="write traces to FILE: .html is one page that works offline, .eval a log for "
        "`inspect view`",
    )
    add(
        "--trace",
        action="append",
        metavar="NAME",
        help="trace for --text or --export, FILE:LINE as in the list; may be repeated (default: "
        "the first, for .eval all)",
    )
    add(
        "--tokenizer",
        metavar="NAME",
        help="folder or Hugging Face id (default: the model of the folder)",
    )
    add("--port", type=int, default=0, help="port on loopback (default: the system chooses)")
    add("--no-browser", dest="browser", action="store_false", help="do not open a browser")


def add_probe_options(command: argparse.ArgumentParser) -> None:
    """Add the options of ``delethink probe``."""
    help_text = "folder, Hugging Face id, or toy for the shipped model"
    command.add_argument("-m", "--model", required=True, help=help_text)
    add = command.add_argument_group("traces: from a file, or sampled as LongCoT").add_argument
    kinds = "file of traces, or folder of a run or an evaluation"
    add("--traces", type=Path, metavar="PATH", help=kinds)
    add("--task", help="sample traces of this task or file of problems")
    _add_task_arguments(add)
    add("--num-problems", type=int, metavar="N", help="use the first N problems (default 64)")
    add("--budget", metavar="TOKENS", help="maximum length of a trace (default: twice -C)")
    add("--temperature", type=float, default=0.6, help="sampling temperature (default 0.6)")
    add("--seed", type=int, default=0, help="seed of problems and traces (default 0)")
    _add_engine(add)
    _add_server(command)
    add = command.add_argument_group("boundaries (k is 1,024; lists with commas)").add_argument
    add("-C", "--context-size", default="8k", metavar="TOKENS", help="context size C (8k)")
    default = "default C/8, C/4 and C/2; controls use the largest"
    add("--carryover-size", metavar="LIST", help=f"carryover sizes m ({default})")
    _add_carryover(add)
    _add_output(command.add_argument_group("output").add_argument, "probes")


def _add_task_arguments(add: Any) -> None:
    add(
        "--task-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of the task (repeatable); for a file: problem_key, answer_key",
    )


def _add_unsafe_code(add: Any) -> None:
    """Add the option to run code of the model without isolation."""
    add(
        "--allow-unsafe-code",
        action="store_true",
        help="run code of the model with the rights of your user where the machine has no "
        "isolation (see delethink doctor)",
    )


def _add_thinking(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("thinking (k is 1,024; lists with commas)").add_argument
    add("--mode", metavar="LIST", help="delethink, longcot, or both (default)")
    add("-C", "--context-size", metavar="LIST", help="context sizes C (default 8k)")
    add("--carryover-size", metavar="LIST", help="carryover sizes m (default: half of each C)")
    _add_carryover(add)
    _add_boundary(add)
    add("--head-outside", action="store_true", help="carry the head on top of m")
    add(
        "--max-chunks",
        metavar="LIST",
        help="numbers of chunks I; traces of the largest are cut to the smaller ones; a single "
        "number is spread over five budgets (default 5)",
    )
    add(
        "--cap-longcot",
        action="store_true",
        help="limit LongCoT's budgets to the model's window instead of refusing longer ones",
    )


def _add_carryover(add: Any) -> None:
    add(
        "--head-size",
        metavar="TOKENS",
        help="carried tokens from the start of the thinking (default min(100, m/4))",
    )
    add(
        "--carryover",
        metavar="NAME[:KEY=VALUE,...]",
        help="carryover policy, e.g. tail or sink_window:num_sinks=8 (default head_tail)",
    )


def _add_boundary(add: Any) -> None:
    add(
        "--boundary",
        metavar="NAME[:KEY=VALUE,...]",
        help="boundary policy that ends chunks early, e.g. line_break (default: none)",
    )


def _add_sampling(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("sampling").add_argument
    add("-n", "--samples", type=int, metavar="N", help="samples per problem (default 4)")
    add("--temperature", type=float, default=0.6, help="sampling temperature (default 0.6)")
    add("--top-p", type=float, default=1.0, metavar="P", help="most probable tokens of mass P")
    add("--top-k", type=int, default=0, metavar="K", help="K most probable tokens (default all)")
    lowest = "drop tokens below P times the highest probability (default 0)"
    add("--min-p", type=float, default=0.0, metavar="P", help=lowest)
    add("--seed", type=int, default=0, help="seed of problems and samples (default 0)")
    add(
        "--force-answer",
        type=int,
        default=0,
        metavar="TOKENS",
        help="when a budget is spent, close the thinking and sample an answer of up to TOKENS "
        "tokens (default 0: none)",
    )
    add(
        "--preset",
        choices=["paper", *TARGETS],
        help="paper: 256 samples and avg@128 by bootstrap; the paper's C, m and temperature are "
        "the defaults. The others also set model, task and budgets of a result of the paper, and "
        "compare with it",
    )
    default = "default 512; 256 with --base-url"
    add("--in-flight", type=int, metavar="N", help=f"maximum traces sampled at once ({default})")


def _add_engine(add: Any) -> None:
    add(
        "values",
        nargs="*",
        metavar="engine.key=value",
        help="engine settings as in a recipe, e.g. engine=vllm engine.num_engines=2",
    )
    for option, new in _OLD_ENGINE_OPTIONS.items():
        add(option, action=_OldOption, const=new, help=argparse.SUPPRESS)
    _add_chat_template_kwargs(add)
    _add_end_of_thinking(add)
    add("--trust-remote-code", action="store_true", help="run code from the model's repository")


def _add_chat_template_kwargs(add: Any) -> None:
    add(
        "--chat-template-kwargs",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="variable of the model's chat template, e.g. enable_thinking=true (repeatable)",
    )


def _add_end_of_thinking(add: Any) -> None:
    add(
        "--end-of-thinking",
        default="auto",
        metavar="MARK",
        help="mark between thinking and answer, e.g. '[/THINK]'; null: none, the whole output is "
        "the answer; auto: as chat template and tokens show it (default)",
    )


def _add_server(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("server instead of an engine").add_argument
    add(
        "--base-url",
        metavar="URL",
        help="OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1; -m names the tokenizer",
    )
    _add_served_name(add)
    add(
        "--retries",
        type=int,
        default=8,
        metavar="N",
        help="retries of a failed request, with growing waits of 40 s in all (default 8)",
    )
    limit = "limit for the response to a request"
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help=f"{limit} (default 600)")


def _add_served_name(add: Any) -> None:
    default = "default: the only one served"
    add("--served-model", metavar="NAME", help=f"name of the model on the server ({default})")
    add(
        "--api-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable with the API key (default %(default)s)",
    )


def _add_analysis(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("analysis").add_argument
    smallest = "smallest difference in accuracy of interest"
    add("--margin", type=float, default=0.02, help=f"{smallest} (default 0.02)")
    add("--bootstrap", type=int, metavar="K", help="report avg@K by bootstrap")
    add("--resamples", type=int, default=5000, metavar="N", help="bootstrap resamples (5000)")
    add(
        "--gpu",
        default="h100",
        metavar="NAME",
        help="device assumed for time estimates, see `delethink cost` (default h100)",
    )
    add(
        "--cost-model",
        metavar="NAME",
        help="model with the shape for cost estimates (default: the evaluated model)",
    )


def _add_output(add: Any, parent: str) -> None:
    add("-o", "--output", type=Path, metavar="PATH", help=f"new folder (default {parent}/…)")
    add("--json", action="store_true", help="print JSON; progress goes to stderr")


def add_serve_options(command: argparse.ArgumentParser) -> None:
    """Add the options of ``delethink serve``."""
    add = command.add_argument_group("model").add_argument
    text = "folder, Hugging Face id, or toy for the shipped model; with --base-url, the tokenizer"
    add("-m", "--model", help=f"{text} (default: the served model's)")
    add(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="chat template (Jinja) for a model that has none, or instead of its own",
    )
    _add_engine(add)
    add = command.add_argument_group("thinking (k is 1,024)").add_argument
    add("-C", "--context-size", default="8k", metavar="TOKENS", help="context size C (default 8k)")
    add("--carryover-size", metavar="TOKENS", help="carryover size m (default: half of C)")
    _add_carryover(add)
    add("--head-outside", action="store_true", help="carry the head on top of m")
    add("--max-chunks", default="5", metavar="N", help="chunks I of a trace (default 5)")
    add(
        "--answer-tokens",
        default="2k",
        metavar="TOKENS",
        help="room kept back for the answer in every context (default 2k)",
    )
    add(
        "--query-tokens",
        default="4k",
        metavar="TOKENS",
        help="longest query for which an engine makes room (default 4k)",
    )
    add(
        "--effort",
        action="append",
        default=[],
        metavar="NAME=TOKENS",
        help="thinking tokens of a reasoning_effort, e.g. low=2k (repeatable; default: a sixteenth "
        "of the budget for minimal, a quarter for low, half for medium, all for high)",
    )
    add(
        "--on-loop",
        choices=("end", "nudge"),
        help="where the thinking repeats itself: end it and answer, or end the chunk and go on "
        "from a carryover without the repeats (default: nothing)",
    )
    add(
        "--nudge",
        metavar="TEXT",
        help="text carried past a loop; empty for none (default: a sentence)",
    )
    add = command.add_argument_group("sampling, where a request names no value").add_argument
    add("--temperature", type=float, default=0.6, help="sampling temperature (default 0.6)")
    add("--top-p", type=float, default=1.0, metavar="P", help="most probable tokens of mass P")
    add("--top-k", type=int, default=0, metavar="K", help="K most probable tokens (default all)")
    lowest = "drop tokens below P times the highest probability (default 0)"
    add("--min-p", type=float, default=0.0, metavar="P", help=lowest)
    _add_server(command)
    _add_listening(command.add_argument_group("listening and limits").add_argument)


def _add_listening(add: Any) -> None:
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    add("--port", type=int, default=8100, help="port; 0 for a free one (default 8100)")
    add("--name", help="name of the model for clients (default: that of -m)")
    add("--keys-file", type=Path, metavar="FILE", help="keys that clients must send, one a line")
    add(
        "--keys-env",
        default="DELETHINK_SERVE_KEYS",
        metavar="NAME",
        help="environment variable with keys, separated by commas (default %(default)s)",
    )
    add("--no-keys", action="store_true", help="serve other machines without keys")
    add(
        "--max-traces",
        type=int,
        default=64,
        metavar="N",
        help="traces sampled at once (default 64)",
    )
    add("--max-queue", type=int, default=256, metavar="N", help="traces that wait (default 256)")
    add("--max-body", default="4M", metavar="BYTES", help="longest body of a request (default 4M)")
    add(
        "--thinking-time",
        type=float,
        metavar="SECONDS",
        help="end the thinking of a trace after this time, and answer (default: no limit)",
    )
    add(
        "--keepalive",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="time between comments in a silent stream (default 5)",
    )
    add(
        "--reasoning-field",
        choices=("both", "reasoning", "reasoning_content"),
        default="both",
        help="field of the thinking in responses (default both)",
    )
    add(
        "--log-requests",
        action="store_true",
        help="print a line for each request, without its texts",
    )
    add("--debug", action="store_true", help="log the lines of code of a failure too")


def add_cost_options(command: argparse.ArgumentParser) -> None:
    """Add the options of ``delethink cost``."""
    add = command.add_argument_group("model").add_argument
    add(
        "-m",
        "--model",
        help="known model, folder or file with a config.json, Hugging Face id, or figures as "
        "hidden_size=…,num_hidden_layers=… (default: the paper's DeepSeek-R1-Distill-Qwen-1.5B)",
    )
    add("--models", action="store_true", help="list the known models and exit")
    add = command.add_argument_group("thinking (k is 1,024, M is 1,048,576)").add_argument
    add("--thinking", metavar="LIST", help="thinking tokens per trace (default 24k,96k,1M)")
    add(
        "--lengths",
        type=Path,
        metavar="PATH",
        help="distribution of the lengths: folder of a run or an evaluation, or lines of LENGTH or "
        "LENGTH,COUNT; with --thinking, scaled to those means",
    )
    add("-C", "--context-size", default="8k", metavar="TOKENS", help="context size C (default 8k)")
    add("--carryover-size", metavar="TOKENS", help="carryover size m (default: half of C)")
    _add_carryover(add)
    add("--head-outside", action="store_true", help="carry the head on top of m")
    add("--query", default="256", metavar="TOKENS", help="query length (default 256)")
    _add_hardware(command)
    add = command.add_argument_group("workload").add_argument
    for name, default, text in (
        ("--group", 8, "traces per query"),
        ("--prompts", 128, "queries per step"),
        ("--steps", 1000, "training steps"),
    ):
        add(name, type=int, default=default, metavar="N", help=f"{text} (default {default})")
    add = command.add_argument_group("output").add_argument
    add(
        "--accounting",
        choices=["true", "paper"],
        default="true",
        help="paper: only training FLOPs, counted as in the paper (default true)",
    )
    add(
        "--reproduce",
        choices=["figure2c", "flops", "months", "throughput"],
        help="print the paper's figures next to this estimate's and exit",
    )
    add(
        "--calibrate",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="fit the efficiencies to the timed steps of runs and exit",
    )
    add("--save-efficiency", type=Path, metavar="FILE", help="file for the fit of --calibrate")
    add("--seed", type=int, default=0, help="seed of the 5 %% to 95 %% range (default 0)")
    add("--plot", type=Path, metavar="FILE", help="plot costs over the length, e.g. cost.png")
    add("--json", action="store_true", help="print JSON")


def _add_hardware(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("hardware").add_argument
    add(
        "--gpu",
        default="h100",
        help="a100, h100, h200, b200, mi300x, l40s, rtx4090 or cpu (default h100)",
    )
    add("--gpus", type=int, default=8, metavar="N", help="number of GPUs (default 8)")
    add("--parallel", type=int, metavar="N", help="GPUs per engine (default: as few as possible)")
    add("--price", type=float, metavar="PRICE", help="price per GPU-hour")
    add(
        "--efficiency",
        type=Path,
        metavar="FILE",
        help="efficiencies from --save-efficiency (default: fitted to the paper's times)",
    )


def add_train_options(command: argparse.ArgumentParser) -> None:
    """Add the options of ``delethink train``."""
    add = command.add_argument
    add("recipe", help="YAML file (see recipes/), or the directory of a run to resume")
    text = "override of a recipe key, such as training.max_steps=9 or engine=vllm"
    add("values", nargs="*", metavar="key=value", help=text)


def add_doctor_options(command: argparse.ArgumentParser) -> None:
    """Add the options of ``delethink doctor``."""
    add = command.add_argument
    add("recipe", nargs="?", help="recipe, or the directory of a run")
    add("values", nargs="*", metavar="key=value", help="override of a recipe key")
    add("-m", "--model", help="check tokenizer and chat template of a model, without a recipe")
    _add_chat_template_kwargs(add)
    _add_end_of_thinking(add)
    add(
        "--base-url",
        metavar="URL",
        help="OpenAI-compatible server of the model of -m: how it is asked, and what it ignores",
    )
    _add_served_name(add)
    _add_planned_hardware(command)
    add("--json", action="store_true", help="print JSON")


def _add_planned_hardware(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("hardware that is not here")
    group.add_argument(
        "--gpu",
        metavar="NAME",
        help="predict memory, time and disk of the recipe on these GPUs, named as in `delethink "
        "cost` (default: check this machine)",
    )
    group.add_argument("--gpus", type=int, metavar="N", help="number of them (default 8)")
    group.add_argument(
        "--thinking",
        metavar="TOKENS",
        help="mean thinking tokens of a trace (default: 35 %% of the budget, as in the paper)",
    )


def add_tasks_options(command: argparse.ArgumentParser) -> None:
    """Add the options of ``delethink tasks``."""
    add = command.add_argument
    add("name", nargs="?", help="task to show; left out, all tasks and rewards are listed")
    add("values", nargs="*", metavar="key=value", help="argument of the task, as in task.args")
    add("--dataset", help="file, folder or Hugging Face data set to read")
    add("--split", help="split of the data set")
    add("--problem-key", help="column of the problem")
    add("--answer-key", help="column of the gold answer")
    add("--of", choices=("train", "heldout"), help="problems to show: training or held-out")
    add("-n", "--number", type=_count, default=1, help="number of problems to show (default 1)")
    add("--check", type=_count, default=8, help="number of problems to grade (default 8)")
    add("--model", help="render prompts with this model's chat template")
    _add_chat_template_kwargs(add)
    _add_end_of_thinking(add)
    add("--seed", type=int, default=0, help="seed of the task (default 0)")
    _add_unsafe_code(add)
    add("--json", action="store_true", help="print JSON")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number from 0, got {text!r}")
    return int(text)
