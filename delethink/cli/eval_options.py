"""The options of ``delethink eval``; light, because ``--help`` of the whole command reads them."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_to(command: argparse.ArgumentParser) -> None:
    """The options of ``delethink eval``; a value of ``None`` is filled in by the preset."""
    _add_what(command)
    _add_how(command)
    _add_where(command)
    _add_engine(command)
    _add_read(command)


def _add_what(command: argparse.ArgumentParser) -> None:
    what = command.add_argument_group("what is measured")
    what.add_argument(
        "-m",
        "--model",
        action="append",
        required=True,
        metavar="MODEL",
        help="a folder, a Hugging Face id, or toy; several with commas or by repeating it, the "
        "base first",
    )
    what.add_argument("--task", required=True, help="a registered task, or a file of JSON lines")
    what.add_argument(
        "--task-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the task; of a file: problem_key, answer_key",
    )
    what.add_argument("--split", default="heldout", help="of a registered task (default heldout)")
    what.add_argument("--num-problems", type=int, metavar="N", help="the first N (default: all)")
    what.add_argument("--reward", help="what says right (1) or wrong (0); default: the task's own")


def _add_how(command: argparse.ArgumentParser) -> None:
    how = command.add_argument_group("how it thinks (k is 1,024; lists with commas)")
    how.add_argument("--mode", default="delethink,longcot", help="default delethink,longcot")
    how.add_argument("-C", "--context-size", metavar="LIST", help="default 8k")
    how.add_argument(
        "--carryover", "--carryover-size", metavar="LIST", help="m; default half of each C"
    )
    how.add_argument("--head-size", metavar="TOKENS", help="of m; default 100, m if that is less")
    how.add_argument("--head-outside", action="store_true", help="the head comes on top of m")
    how.add_argument(
        "--max-chunks",
        metavar="LIST",
        help="I; smaller ones are cut from the traces of the largest; one alone is spread over "
        "five budgets (default 5)",
    )
    how.add_argument(
        "--cap-longcot",
        action="store_true",
        help="end LongCoT's budgets at the model's window instead of refusing them",
    )
    how.add_argument("-n", "--samples", type=int, metavar="N", help="of a problem (default 4)")
    how.add_argument("--temperature", type=float, help="default 0.6")
    how.add_argument("--seed", type=int, default=0, help="default 0")
    how.add_argument(
        "--force-answer",
        type=int,
        default=0,
        metavar="TOKENS",
        help="where a budget is spent, end the thinking and sample an answer of so many tokens",
    )
    how.add_argument(
        "--preset",
        choices=["paper"],
        help="paper: 256 samples, avg@128 by bootstrap (its C, m, T are the defaults)",
    )


def _add_where(command: argparse.ArgumentParser) -> None:
    where = command.add_argument_group("where it is written")
    where.add_argument("-o", "--output", type=Path, metavar="PATH", help="default evaluations/…")
    where.add_argument("--resume", action="store_true", help="go on where PATH ends")
    where.add_argument("--force", action="store_true", help="with --resume: settings may change")
    where.add_argument(
        "--retry-errors", action="store_true", help="with --resume: play failed traces again"
    )
    where.add_argument("--no-tokens", action="store_true", help="keep no sampled tokens")
    where.add_argument("--no-curves", action="store_true", help="draw no picture and no page")


def _add_engine(command: argparse.ArgumentParser) -> None:
    engine = command.add_argument_group("what samples")
    engine.add_argument(
        "--engine",
        choices=["auto", "transformers", "vllm"],
        default="auto",
        help="default auto: vLLM in Ray workers where both are installed",
    )
    engine.add_argument("--num-workers", type=int, default=1, help="of vLLM")
    engine.add_argument("--gpus-per-worker", type=float, default=0.0, help="of vLLM; 0: the CPU")
    engine.add_argument("--dtype", help="default float32, bfloat16 on GPUs")
    engine.add_argument("--trust-remote-code", action="store_true", help="run a model's own code")
    engine.add_argument(
        "--in-flight",
        type=int,
        metavar="N",
        help="traces at a time (default 512; 256 with --base-url)",
    )
    engine.add_argument(
        "--batch-size",
        type=int,
        default=128,
        metavar="N",
        help="of them decoded side by side, by transformers (default 128)",
    )
    engine.add_argument(
        "--base-url", metavar="URL", help="an OpenAI-compatible server: http://127.0.0.1:8000/v1"
    )
    engine.add_argument("--served-model", metavar="NAME", help="there; default: the only one")
    engine.add_argument(
        "--api-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="the environment variable with the key (default %(default)s)",
    )
    engine.add_argument("--retries", type=int, default=5, help="of a request (default 5)")
    engine.add_argument("--timeout", type=float, default=600.0, help="seconds (default 600)")


def _add_read(command: argparse.ArgumentParser) -> None:
    read = command.add_argument_group("how it is read")
    read.add_argument(
        "--margin", type=float, default=0.02, help="a difference that matters (default 0.02)"
    )
    read.add_argument("--bootstrap", type=int, metavar="K", help="avg@K by bootstrap")
    read.add_argument("--resamples", type=int, default=5000, help="of it (default 5000)")
    read.add_argument(
        "--gpu", default="h100", help="that seconds are estimated for: see delethink cost"
    )
    read.add_argument(
        "--cost-model",
        metavar="NAME",
        help="the shape that FLOPs are estimated for (default: the model's own)",
    )
    read.add_argument("--json", action="store_true", help="print JSON; progress goes to stderr")
