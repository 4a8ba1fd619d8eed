"""Throughput of an evaluation relative to the bare engine.

    python benchmarks/bench_evaluation.py                    # toy reasoner, transformers
    python benchmarks/bench_evaluation.py engine=vllm

The evaluation samples its traces with a bounded number in flight. Then the same engine gets the
same requests (prompt, limit, seed) all at once, which an evaluation cannot do because a chunk
depends on the one before. The output has the seconds of both and their ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

from delethink.config import parse_engine
from delethink.evaluation.models import LoadedModel, local_models
from delethink.evaluation.run import Evaluation, evaluate, load_problems
from delethink.evaluation.settings import SamplingPlan, make_settings


class RequestLog:
    """Policy that forwards requests to another policy and stores them."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.requests: list[Any] = []

    async def generate(self, *request: Any) -> Any:
        """See ``Policy``."""
        self.requests.append(request)
        return await self.policy.generate(*request)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("values", nargs="*", metavar="engine.key=value")
    parser.add_argument("--problems", type=int, default=128)
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--in-flight", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    engine = parse_engine(["engine=transformers", *arguments.values])
    problems = load_problems("automaton", {"min_steps": 16, "max_steps": 24}, arguments.problems)
    settings = make_settings(["toy"], ["delethink", "longcot"], [90], [45], [9], head_size=0)
    with local_models(engine)("toy") as loaded:
        print(f"{'mode':10} {'round':>5} {'requests':>9} {'evaluation':>11} {'at once':>8} ratio")
        for setting in settings:
            for turn in range(arguments.rounds + 1):
                log = RequestLog(loaded.policy)
                plan = SamplingPlan(arguments.samples)
                evaluation = Evaluation(problems, [setting], plan, in_flight=arguments.in_flight)
                own, at_once = _seconds(evaluation, log, loaded)
                if turn:  # round 0 is a warm-up
                    print(
                        f"{setting.mode:10} {turn:5} {len(log.requests):9} {own:9.1f} s "
                        f"{at_once:6.1f} s {at_once / own:.2f}",
                        flush=True,
                    )


def _seconds(evaluation: Evaluation, log: RequestLog, loaded: LoadedModel) -> tuple[float, float]:
    @contextlib.contextmanager
    def open_model(name: str) -> Any:
        yield loaded._replace(policy=log)

    with tempfile.TemporaryDirectory() as folder:
        results = evaluate(evaluation, open_model, Path(folder) / "out")
    (timing,) = results.timing.values()

    async def all_at_once() -> None:
        await asyncio.gather(*(log.policy.generate(*request) for request in log.requests))

    started = time.perf_counter()
    asyncio.run(all_at_once())
    return timing["seconds"], time.perf_counter() - started


if __name__ == "__main__":
    main()
