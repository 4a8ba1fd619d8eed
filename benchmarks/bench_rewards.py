"""Speed of rewards: the verifier pool against direct calls of math-verify.

    python benchmarks/bench_rewards.py [--calls 2000] [--processes 2] [--rounds 3]

All variants use the same answers and the same number of processes. "Direct" parses and verifies
the answers in a ``multiprocessing.Pool``, without math-verify's timeouts. "Reward, plain pool"
calls the library's reward in the same pool; the verifier pool adds the cost of limits.
Answers are boxed ones of the corpus in tests/data after a paragraph of working. Starting the
processes is not counted. The next line is the delay of the event loop while rewards are computed.
The last lines are the time of an empty program, isolated and bare, and of a call of a reward that
runs in a fork inside the isolation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from delethink.rewards.math import math_equal
from delethink.rewards.reasoning_gym import gym_score
from delethink.scoring.isolation import find_isolation
from delethink.scoring.pool import VerifierPool, VerifierSettings
from delethink.scoring.programs import SandboxLimits
from delethink.scoring.reward import Reward
from delethink.scoring.scorer import Scorer
from delethink.types import Attempt, Problem, TraceStop

DATA = Path(__file__).parents[1] / "tests" / "data" / "math_answers.jsonl"
WORKING = (
    "First, note that the expression is symmetric, so we may assume that $a \\le b$. "
    "Substituting, we find $f(x) = x^2 - 3x + 2$, whose roots are $1$ and $2$. Checking both "
    "cases, the second one violates the constraint. Therefore, the value that we look for is\n\n"
)


def cases(number: int, distinct: bool) -> list[tuple[str, str]]:
    """Return (answer text, gold answer) pairs, all different with ``distinct``."""
    rows = [json.loads(line) for line in DATA.read_text("utf-8").splitlines()]
    answers = [
        (row["text"].partition("</think>")[2], row["answer"])
        for row in rows
        if "</think>\\boxed{" in row.get("text", "") and len(row["text"]) < 100
    ]
    chosen = [answers[i % len(answers)] for i in range(number)]
    if distinct:  # a different number in each, so that no cache applies
        chosen = [(a.replace("}", f"+{i}}}", 1), f"{g}+{i}") for i, (a, g) in enumerate(chosen)]
    return [(WORKING + answer, gold) for answer, gold in chosen]


def direct(case: tuple[str, str]) -> float:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    text, gold = case
    expected = parse(f"${gold}$", parsing_timeout=None)
    return float(verify(expected, parse(text, parsing_timeout=None), timeout_seconds=None))


def reward(case: tuple[str, str]) -> float:
    return math_equal(f"</think>{case[0]}", case[1])


def seconds_plain(
    function: Callable[[tuple[str, str]], float], work: list[tuple[str, str]], processes: int
) -> float:
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(function, [("\\boxed{2/4}", "1/2")] * processes * 8, chunksize=1)
        began = time.perf_counter()
        pool.map(function, work, chunksize=4)
        return time.perf_counter() - began


def seconds_pool(work: list[tuple[str, str]], processes: int) -> float:
    with VerifierPool(VerifierSettings(num_verifiers=processes)) as pool:
        warm = [pool.submit(math_equal, {"text": "</think>1", "answer": "1"}) for _ in range(16)]
        assert all(future.result().status == "ok" for future in warm)
        began = time.perf_counter()
        futures = [
            pool.submit(math_equal, {"text": f"</think>{text}", "answer": gold})
            for text, gold in work
        ]
        assert all(future.result().status == "ok" for future in futures)
        return time.perf_counter() - began


async def loop_delays(work: list[tuple[str, str]], processes: int) -> list[float]:
    """Return the delays of the event loop in ms, sorted."""
    attempts = [
        Attempt(Problem("q", gold), f"</think>{text}", TraceStop.COMPLETED, 1, 1, 1, 1)
        for text, gold in work
    ]
    with Scorer(
        [Reward("math", math_equal)], settings=VerifierSettings(num_verifiers=processes)
    ) as scorer:
        await scorer.score(attempts[:16])
        scoring = [asyncio.ensure_future(scorer.parts(attempt)) for attempt in attempts]
        turns = []
        while not all(task.done() for task in scoring):
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            turns.append(1000 * (time.perf_counter() - began) - 1)
    return sorted(turns)


def isolation_times(rounds: int) -> tuple[list[float], list[float], list[float]]:
    """Return ms of a bare empty program, of an isolated one, and of a forked reward, sorted."""
    entry = {"answer": "1", "metadata": {}}
    metadata = {"dataset": "chain_sum", "entry": entry, "config": {}}
    bare, isolated, forked = list[float](), list[float](), list[float]()
    with VerifierPool(VerifierSettings(num_verifiers=1)) as pool:
        for i in range(rounds + 3):  # interleaved; the first ones load libraries
            times = [time.perf_counter()]
            subprocess.run([sys.executable, "-I", "-c", "pass"], check=True, capture_output=True)
            times.append(time.perf_counter())
            pool.run_program("pass", "", SandboxLimits())
            times.append(time.perf_counter())
            pool.call(gym_score, text="</think><answer>1</answer>", metadata=metadata)
            times.append(time.perf_counter())
            if i >= 3:
                for found, began, ended in zip(
                    (bare, isolated, forked), times, times[1:], strict=False
                ):
                    found.append(1000 * (ended - began))
    return sorted(bare), sorted(isolated), sorted(forked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(f"{given.calls} verifications, {given.processes} processes, median of {given.rounds}\n")
    columns = ("direct", "reward, plain pool", "verifier pool", "pool / direct", "pool / plain")
    print(f"{'per second':<16}" + "".join(f"{column:>20}" for column in columns))
    for name, distinct in (("as they come", False), ("all different", True)):
        work = cases(given.calls, distinct)
        rounds = [  # interleaved, so that all variants see the same load
            (
                seconds_plain(direct, work, given.processes),
                seconds_plain(reward, work, given.processes),
                seconds_pool(work, given.processes),
            )
            for _ in range(given.rounds)
        ]
        speeds = [statistics.median(given.calls / r[i] for r in rounds) for i in range(3)]
        ratios = [statistics.median(r[i] / r[2] for r in rounds) for i in range(2)]
        shown = [f"{speed:>20.0f}" for speed in speeds] + [f"{ratio:>20.2f}" for ratio in ratios]
        print(f"{name:<16}" + "".join(shown))
    turns = asyncio.run(loop_delays(cases(given.calls, True), given.processes))
    print(
        f"\ndelay of the event loop in ms: median {statistics.median(turns):.2f}, "
        f"99 % {turns[int(0.99 * len(turns))]:.2f}, longest {turns[-1]:.2f}"
    )
    bare, isolated, forked = map(statistics.median, isolation_times(50))
    print(
        f"\nisolation {find_isolation()}, median of 50 in ms: bare Python {bare:.1f}, isolated "
        f"{isolated:.1f} ({isolated - bare:+.1f}), forked reward {forked:.1f}"
    )


if __name__ == "__main__":
    main()
