"""Measures the CPU time of rank 0 between sampling and training: checks, texts and trace files.

    python benchmarks/bench_recording.py

Traces are made up, with the chunk sizes and the mean length of the paper's 24K run, and ids of a
vocabulary of 151,936. Each is replayed through the environment, decoded and written, as in a run.
Prints the CPU time for a token; ``delethink.cost.batch_time`` uses the sum.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from delethink.cli.process import set_up_process

set_up_process()

from delethink.chunking import ChunkSpec, start  # noqa: E402
from delethink.engines.loading import load_tokenizer  # noqa: E402
from delethink.registry import make_task, resolve  # noqa: E402
from delethink.rollout import replay_trace  # noqa: E402
from delethink.tokenization import query_ids  # noqa: E402
from delethink.tokens import logprob_array, token_array  # noqa: E402
from delethink.trace_io import TraceRecord  # noqa: E402
from delethink.training.run_directory import RunDirectory, describe_environment  # noqa: E402
from delethink.types import Chunk, StopReason, Trace, TraceStop  # noqa: E402

SPEC = ChunkSpec(8192, 4096, 5, 100)
LENGTH, VOCABULARY, END = 8633, 151_936, 1


def made_up_trace(rng: random.Random, query: Any) -> Trace:
    """Return a trace of the usual length that ends by itself."""
    state, chunks, left = start(SPEC, query), [], LENGTH
    while state.stop is None:
        size = min(left, state.max_new_tokens)
        left -= size
        ids = [rng.randrange(16, VOCABULARY) for _ in range(size)]
        stop = StopReason.LENGTH
        if not left:
            ids[-1], stop = END, StopReason.EOS
        output = token_array(ids)
        logprobs = logprob_array([-rng.random() for _ in ids])
        chunks.append(Chunk(state.prompt_ids, output, logprobs, stop))
        state = state.advance(output, stop)
    return Trace(state.query_ids, tuple(chunks), TraceStop.COMPLETED)


def main() -> None:
    """Time each part over all traces, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=int, default=32)
    arguments = parser.parse_args()
    tokenizer, rng = load_tokenizer("toy", False), random.Random(0)
    task = make_task("automaton", {"min_steps": 16, "max_steps": 24}, 0)
    problem = task.problem("train", 0)
    query = query_ids(tokenizer, problem)
    traces = [made_up_trace(rng, query) for _ in range(arguments.traces)]
    environment = resolve("delethink.envs", "thinking")(
        task=task,
        reward=lambda text, answer: 0.0,
        tokenizer=tokenizer,
        chunk_spec=SPEC,
        eos_ids=(END,),
        vocabulary=VOCABULARY,
    )

    def record(trace: Trace) -> dict[str, Any]:
        text = tokenizer.decode(list(trace.output_ids))
        return TraceRecord(
            problem=problem,
            trace=trace,
            reward=1.0,
            rewards={"exact": 1.0},
            reward_errors={},
            advantage=0.5,
            text=text,
        ).to_json()

    with tempfile.TemporaryDirectory() as folder:
        directory, records = RunDirectory(Path(folder)), list[dict[str, Any]]()
        (directory.path / "traces").mkdir()
        parts: dict[str, Callable[[], Any]] = {
            "replay": lambda: [replay_trace(environment, problem, trace) for trace in traces],
            "decode": lambda: records.extend(map(record, traces)),
            "write": lambda: directory.add_traces(1, records),
        }
        total, tokens = 0.0, sum(trace.length for trace in traces)
        print("| part | µs a token |\n| --- | --- |")
        for name, part in parts.items():
            began = time.process_time()
            part()
            microseconds = 1e6 * (time.process_time() - began) / tokens
            total += microseconds
            print(f"| {name} | {microseconds:.2f} |")
    print(f"| all | {total:.2f} |")
    print(f"\n{len(traces)} traces of {LENGTH} tokens; {describe_environment()}")


if __name__ == "__main__":
    main()
