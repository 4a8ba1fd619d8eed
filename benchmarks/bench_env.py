"""Steps per second and memory of the environments, in one process on one core.

    python benchmarks/bench_env.py

The benchmark prints two tables. It steps the bare environment and the one of ``gymnasium.make``,
whose wrappers check every call. The ratio to Gymnasium's CartPole removes the speed of the machine.
Actions are created beforehand.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

import delethink.envs  # noqa: F401 - registers the ids
from delethink import Problem

REPEATS = 5
SIZES = {"context_size": 8192, "carryover_size": 4096, "max_chunks": 23, "head_size": 100}  # 96K
VOCABULARY = 32_000
EOS = VOCABULARY - 1
QUERY = 200


class Words:
    """Tokenizer with the vocabulary size of a small language model and empty texts."""

    chat_template = None
    eos_token_id = EOS

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + i % 1000 for i in range(QUERY)]}

    def decode(self, token_ids: Any, **options: Any) -> str:
        return ""

    def __len__(self) -> int:
        return VOCABULARY


class Question:
    """Task with a single problem."""

    def problem(self, split: str, index: int) -> Problem:
        return Problem("?", "42")


LARGE = {"task": Question(), "tokenizer": Words(), "max_query_tokens": 2048, **SIZES}


def run(env: Any, actions: Callable[[int], Any], steps: int) -> float:
    """Return steps per second. Episodes restart at their end."""
    env.reset(seed=0)
    began = time.perf_counter()
    for i in range(steps):
        if any(env.step(actions(i))[2:4]):
            env.reset()
    return steps / (time.perf_counter() - began)


def rates(make: Callable[[], Any], actions: Callable[[int], Any], steps: int) -> tuple[float, ...]:
    """Return the median and the minimum of several runs."""
    found = [run(make(), actions, steps) for _ in range(REPEATS)]
    return statistics.median(found), min(found)


def full_chunks() -> Callable[[int], Any]:
    """Return full chunks as arrays: C tokens, then C - m each."""
    rng = np.random.default_rng(0)
    first, later = SIZES["context_size"], SIZES["context_size"] - SIZES["carryover_size"]
    chunks = [rng.integers(0, EOS, first), *(rng.integers(0, EOS, later) for _ in range(22))]
    return lambda i: chunks[i % SIZES["max_chunks"]]


def tokens(vocabulary: int) -> Callable[[int], Any]:
    """Return random tokens other than EOS and padding."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(2, vocabulary - 1, 4096)
    return lambda i: drawn[i % 4096]


def chunk_env(wrapped: bool = False, **options: Any) -> Callable[[], Any]:
    return lambda: made("delethink/Thinking-v0", wrapped, **{**LARGE, **options})


def token_env(wrapped: bool = False, **options: Any) -> Callable[[], Any]:
    return lambda: made("delethink/TokenThinking-v0", wrapped, **options)


def made(name: str, wrapped: bool, **options: Any) -> Any:
    env = gymnasium.make(name, **options)
    return env if wrapped else env.unwrapped


def print_speed(scale: float) -> None:
    small, large = tokens(16), tokens(VOCABULARY)
    cases = {
        "CartPole-v1 (for scale)": (
            lambda: gymnasium.make("CartPole-v1").unwrapped,
            lambda i: i % 2,
            20_000,
        ),
        "token, window 128": (token_env(), small, 50_000),
        "token, window 128, gymnasium.make": (token_env(wrapped=True), small, 50_000),
        "token, 8K chunks, 4K carryover": (token_env(**LARGE), large, 50_000),
        "chunk, 8K chunks, 4K carryover": (chunk_env(), full_chunks(), 5_000),
        "chunk, the same, gymnasium.make": (chunk_env(wrapped=True), full_chunks(), 5_000),
        "chunk, the same, no trace kept": (chunk_env(keep_trace=False), full_chunks(), 5_000),
    }
    print(f"{f'steps/s, of {REPEATS} runs':<38}{'median':>10}{'lowest':>10}{'CartPole = 1':>14}")
    bare = 0.0
    for name, (make, actions, steps) in cases.items():
        median, lowest = rates(make, actions, max(100, int(steps * scale)))
        bare = bare or median
        print(f"{name:<38}{median:>10,.0f}{lowest:>10,.0f}{median / bare:>14.2f}")


def memory(keep_trace: bool, chunks: int) -> int:
    """Return the bytes held by Python and NumPy after ``chunks`` full chunks of one episode."""
    env = made(
        "delethink/Thinking-v0", False, **{**LARGE, "max_chunks": chunks + 2}, keep_trace=keep_trace
    )
    action = full_chunks()(1)
    tracemalloc.start()
    env.reset(seed=0)
    for _ in range(chunks):
        env.step(action)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return held


def print_memory() -> None:
    print(
        f"\n{'KiB held in an episode after':<38}" + "".join(f"{n:>9} ch." for n in (10, 100, 1000))
    )
    for name, keep in (("trace kept", True), ("no trace kept", False)):
        held = [memory(keep, n) / 1024 for n in (10, 100, 1000)]
        print(f"{name:<38}" + "".join(f"{kib:>13,.0f}" for kib in held))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the number of steps")
    print_speed(parser.parse_args().scale)
    print_memory()


if __name__ == "__main__":
    main()
