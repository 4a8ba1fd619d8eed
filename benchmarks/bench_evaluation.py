"""How much of an engine's throughput an evaluation keeps, as a ratio within one run.

    python benchmarks/bench_evaluation.py                    # the toy reasoner, transformers
    python benchmarks/bench_evaluation.py --engine vllm

The evaluation plays its traces with a bounded number in flight; then the same engine gets the very
same requests (prompt, limit, seed) all at once, which no evaluation could send, because a chunk
starts from the one before. Printed are the seconds of both and their ratio, in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

from delethink.engines.factory import make_evaluation_engine
from delethink.engines.loading import load_tokenizer
from delethink.evaluation.run import Evaluation, OpenModel, evaluate, load_problems
from delethink.evaluation.settings import Asked, make_settings


class Recorder:
    """Passes requests on to an engine and keeps them."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.requests: list[Any] = []

    async def generate(self, *request: Any) -> Any:
        """As the engine does."""
        self.requests.append(request)
        return await self.engine.generate(*request)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--problems", type=int, default=128)
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--in-flight", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    tokenizer = load_tokenizer("toy")
    problems = load_problems("automaton", {"min_steps": 16, "max_steps": 24}, asked.problems)
    settings = make_settings(["toy"], ["delethink", "longcot"], [90], [45], [9], head_size=0)
    engine = make_evaluation_engine(asked.engine, "toy", tokenizer, max_batch_size=asked.batch_size)
    with contextlib.closing(engine):
        print(f"{'mode':10} {'round':>5} {'requests':>9} {'evaluation':>11} {'at once':>8} ratio")
        for setting in settings:
            for turn in range(asked.rounds + 1):
                recorder = Recorder(engine)
                evaluation = Evaluation(
                    problems, [setting], Asked(asked.samples), in_flight=asked.in_flight
                )
                own, at_once = _seconds(evaluation, recorder, tokenizer, engine.max_model_tokens)
                if turn:  # the first warms up
                    print(
                        f"{setting.mode:10} {turn:5} {len(recorder.requests):9} {own:9.1f} s "
                        f"{at_once:6.1f} s {at_once / own:.2f}",
                        flush=True,
                    )


def _seconds(
    evaluation: Evaluation, recorder: Recorder, tokenizer: Any, window: int
) -> tuple[float, float]:
    @contextlib.contextmanager
    def open_model(name: str) -> Any:
        yield OpenModel(recorder, tokenizer, window)

    with tempfile.TemporaryDirectory() as folder:
        results = evaluate(evaluation, open_model, Path(folder) / "out")
    (timing,) = results.timing.values()

    async def all_at_once() -> None:
        await asyncio.gather(*(recorder.engine.generate(*r) for r in recorder.requests))

    started = time.perf_counter()
    asyncio.run(all_at_once())
    return timing["seconds"], time.perf_counter() - started


if __name__ == "__main__":
    main()
