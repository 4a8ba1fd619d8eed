"""The options of ``delethink probe``; light, because ``--help`` of the whole command reads them."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_to(command: argparse.ArgumentParser) -> None:
    """The options of ``delethink probe``."""
    command.add_argument("-m", "--model", required=True, help="a folder, a hub id, or toy")
    what = command.add_argument_group("whose traces")
    what.add_argument(
        "--traces", type=Path, metavar="PATH", help="a file of traces, or a run directory"
    )
    what.add_argument("--task", help="sample LongCoT traces of this task, or file of problems")
    what.add_argument(
        "--task-arg", action="append", default=[], metavar="KEY=VALUE", help="of the task"
    )
    what.add_argument("--num-problems", type=int, metavar="N", help="the first N (default 64)")
    what.add_argument("--budget", default="8k", metavar="TOKENS", help="of a trace (default 8k)")
    what.add_argument("--temperature", type=float, default=0.6, help="default 0.6")
    what.add_argument("--seed", type=int, default=0, help="default 0")
    how = command.add_argument_group("where the boundaries are (k is 1,024; lists with commas)")
    how.add_argument("-C", "--context-size", default="8k", metavar="TOKENS", help="default 8k")
    how.add_argument(
        "--carryover",
        "--carryover-size",
        metavar="LIST",
        help="m; default C/8, C/4 and C/2; controls are made with the largest",
    )
    how.add_argument("--head-size", metavar="TOKENS", help="of m; default 100, m if that is less")
    more = command.add_argument_group("more")
    more.add_argument("-o", "--output", type=Path, metavar="PATH", help="default probes/…")
    more.add_argument("--trust-remote-code", action="store_true", help="run a model's own code")
    more.add_argument("--json", action="store_true", help="print JSON")
