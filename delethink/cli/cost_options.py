"""Options of ``delethink cost``, without heavy imports because ``delethink --help`` loads them."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_cost_options(command: argparse.ArgumentParser) -> None:
    """Add the options of ``delethink cost``."""
    _add_model(command)
    _add_thinking(command)
    _add_hardware(command)
    _add_workload(command)
    _add_output(command)


def _add_model(command: argparse.ArgumentParser) -> None:
    model = command.add_argument_group("model")
    model.add_argument(
        "-m",
        "--model",
        help="known model, folder or file with a config.json, Hugging Face id, or figures as "
        "hidden_size=…,num_hidden_layers=… (default: the paper's DeepSeek-R1-Distill-Qwen-1.5B)",
    )
    model.add_argument("--models", action="store_true", help="list the known models and exit")


def _add_thinking(command: argparse.ArgumentParser) -> None:
    thinking = command.add_argument_group("thinking (k is 1,024, M is 1,048,576)")
    thinking.add_argument(
        "--thinking", metavar="LIST", help="thinking tokens per trace (default 24k,96k,1M)"
    )
    thinking.add_argument(
        "--lengths",
        type=Path,
        metavar="PATH",
        help="distribution of the lengths: a run directory, or lines of LENGTH or LENGTH,COUNT; "
        "with --thinking, scaled to those means",
    )
    thinking.add_argument(
        "-C", "--context-size", default="8k", metavar="TOKENS", help="context size C (default 8k)"
    )
    thinking.add_argument(
        "--carryover-size", metavar="TOKENS", help="carryover size m (default: half of C)"
    )
    thinking.add_argument(
        "--carryover",
        metavar="NAME[:KEY=VALUE,...]",
        help="carryover policy, e.g. tail or sink_window:num_sinks=8 (default head_tail)",
    )
    thinking.add_argument(
        "--head-size",
        metavar="TOKENS",
        help="carried tokens from the start of the trace (default: 100, at most a quarter of m)",
    )
    thinking.add_argument("--head-outside", action="store_true", help="add the head on top of m")
    thinking.add_argument(
        "--query", default="256", metavar="TOKENS", help="query length (default 256)"
    )


def _add_hardware(command: argparse.ArgumentParser) -> None:
    hardware = command.add_argument_group("hardware")
    hardware.add_argument(
        "--gpu",
        default="h100",
        help="a100, h100, h200, b200, mi300x, l40s, rtx4090 or cpu (default h100)",
    )
    hardware.add_argument(
        "--gpus", type=int, default=8, metavar="N", help="number of GPUs (default 8)"
    )
    hardware.add_argument(
        "--parallel", type=int, metavar="N", help="GPUs per engine (default: as few as possible)"
    )
    hardware.add_argument("--price", type=float, metavar="PRICE", help="price per GPU-hour")
    hardware.add_argument(
        "--efficiency",
        type=Path,
        metavar="FILE",
        help="efficiencies from --save-efficiency (default: fitted to the paper's times)",
    )


def _add_workload(command: argparse.ArgumentParser) -> None:
    workload = command.add_argument_group("workload")
    for name, default, text in (
        ("--group", 8, "traces per query"),
        ("--prompts", 128, "queries per step"),
        ("--steps", 1000, "training steps"),
    ):
        workload.add_argument(
            name, type=int, default=default, metavar="N", help=f"{text} (default {default})"
        )


def _add_output(command: argparse.ArgumentParser) -> None:
    output = command.add_argument_group("output")
    output.add_argument(
        "--accounting",
        choices=["true", "paper"],
        default="true",
        help="paper: only training FLOPs, counted as in the paper (default true)",
    )
    output.add_argument(
        "--reproduce",
        choices=["figure2c", "flops", "months", "throughput"],
        help="print the paper's figures next to this estimate's and exit",
    )
    output.add_argument(
        "--calibrate",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="fit the efficiencies to the timed steps of runs and exit",
    )
    output.add_argument(
        "--save-efficiency", type=Path, metavar="FILE", help="file for the fit of --calibrate"
    )
    output.add_argument(
        "--seed", type=int, default=0, help="seed of the 5 %% to 95 %% range (default 0)"
    )
    output.add_argument(
        "--plot", type=Path, metavar="FILE", help="plot costs over the length, e.g. cost.png"
    )
    output.add_argument("--json", action="store_true", help="print JSON")
