"""The options of ``delethink cost``; light, because ``--help`` of the whole command reads them."""

from __future__ import annotations

import argparse
from pathlib import Path

PAPER_MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"


def add_to(command: argparse.ArgumentParser) -> None:
    """The options of ``delethink cost``."""
    what = command.add_argument_group("what thinks")
    what.add_argument(
        "--model",
        default=PAPER_MODEL,
        help="a known model, a folder or file with its config.json, a hub name, or "
        "hidden_size=…,num_hidden_layers=… (default: the paper's, %(default)s)",
    )
    what.add_argument("--models", action="store_true", help="list the known models and end")
    how = command.add_argument_group("how it thinks (k is 1,024, M is 1,048,576)")
    how.add_argument("--thinking", metavar="LIST", help="tokens of a trace: 24k,96k,1M (default)")
    how.add_argument(
        "--lengths",
        type=Path,
        metavar="PATH",
        help="their distribution: a run directory, or lines of LENGTH or LENGTH,COUNT; with "
        "--thinking it is stretched to those means",
    )
    how.add_argument("-C", "--context-size", default="8k", metavar="TOKENS", help="default 8k")
    how.add_argument(
        "-m", "--carryover", "--carryover-size", metavar="TOKENS", help="default: half of C"
    )
    how.add_argument("--head-size", metavar="TOKENS", help="of m; default 100, m if that is less")
    how.add_argument("--head-outside", action="store_true", help="the head comes on top of m")
    how.add_argument("--query", default="256", metavar="TOKENS", help="default 256")
    where = command.add_argument_group("what on")
    where.add_argument("--gpu", default="h100", help="a100, h100, h200, b200, mi300x, l40s, … ")
    where.add_argument("--gpus", type=int, default=8, help="default 8")
    where.add_argument("--parallel", type=int, help="GPUs of an engine (default: what it needs)")
    where.add_argument("--price", type=float, help="of a GPU-hour")
    job = command.add_argument_group("what for")
    job.add_argument("--group", type=int, default=8, help="traces of a prompt (default 8)")
    job.add_argument("--prompts", type=int, default=128, help="of a step (default 128)")
    job.add_argument("--steps", type=int, default=1000, help="of the run (default 1000)")
    more = command.add_argument_group("more")
    more.add_argument("--growth", action="store_true", help="how costs grow with the length")
    more.add_argument("--best", action="store_true", help="the cheapest C and m")
    more.add_argument(
        "--accounting",
        choices=["true", "paper"],
        default="true",
        help="paper: only training FLOPs, as the paper counts them",
    )
    more.add_argument(
        "--reproduce",
        choices=["figure2c", "flops", "months", "throughput"],
        help="what the paper reports, beside what comes out here",
    )
    more.add_argument(
        "--calibrate",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="fit the efficiencies to the timed steps of runs",
    )
    more.add_argument("--efficiency", type=Path, metavar="FILE", help="use fitted efficiencies")
    more.add_argument(
        "--save-efficiency", type=Path, metavar="FILE", help="where --calibrate writes them"
    )
    more.add_argument("--seed", type=int, default=0, help="of the sampled uncertainty")
    more.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves: out.png")
    more.add_argument("--json", action="store_true", help="print JSON")
