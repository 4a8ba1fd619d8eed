"""Benchmark time and peak memory of a training step against thinking length n.

    python benchmarks/bench_training.py                 # two cores: C=512, m=256, n from C to 32 C
    python benchmarks/bench_training.py --device cuda   # Qwen2.5-1.5B's shape, C=8192, n to 96K

Delethink and LongCoT use the same trainer; a LongCoT trace has one chunk. Weights and tokens are
random, because time does not depend on their values. Every round runs all settings, and the
shortest time of each is reported. "predicted" is the ratio of FLOPs (delethink.cost). The last line
times an unmodified GRPOTrainer on the traces of n = C.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from delethink.cli.process import set_up_process

set_up_process()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from transformers import (  # noqa: E402
    PreTrainedModel,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from trl import GRPOTrainer  # noqa: E402

from delethink.chunking import ChunkSpec, start  # noqa: E402
from delethink.cost.flops import (  # noqa: E402
    LONGCOT,
    Cut,
    cut_traces,
    training_flops,
)
from delethink.cost.models import shape_of_config  # noqa: E402
from delethink.cost.shape import ModelShape  # noqa: E402
from delethink.engines.loading import load_tokenizer  # noqa: E402
from delethink.training.batching import RolloutBatch  # noqa: E402
from delethink.training.grpo import DelethinkTrainer  # noqa: E402
from delethink.training.grpo_config import DelethinkConfig  # noqa: E402
from delethink.training.run_directory import describe_environment  # noqa: E402
from delethink.types import Chunk, StopReason, Trace, TraceStop  # noqa: E402

QUERY = 16
VOCABULARY = 16  # token ids of traces are below


@dataclass(frozen=True)
class Bench:
    """Sizes of a benchmark."""

    model: dict[str, Any]
    context_size: int
    multiples: tuple[int, ...]  # lengths n, in multiples of C
    traces: int
    rounds: int
    dtype: str


CPU = Bench(
    model={  # wide and shallow, for large matrix products on two cores
        "hidden_size": 512,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "vocab_size": 32,
    },
    context_size=512,
    multiples=(1, 2, 4, 8, 16, 32),
    traces=2,
    rounds=3,
    dtype="float32",
)
GPU = Bench(
    model={  # Qwen2.5-1.5B
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
    context_size=8192,
    multiples=(1, 2, 4, 8, 12),
    traces=2,
    rounds=2,
    dtype="bfloat16",
)


@dataclass(frozen=True)
class Setting:
    """A method and a length n, in multiples of C."""

    method: str
    multiple: int

    def spec(self, context_size: int) -> ChunkSpec:
        if self.method == "LongCoT":
            return ChunkSpec.longcot(self.multiple * context_size)
        return ChunkSpec(context_size, context_size // 2, 2 * self.multiple - 1, head_size=0)


@dataclass
class Figures:
    """Shortest step, and peak memory of a step beyond the memory between steps."""

    seconds: float = float("inf")
    peak: float = float("nan")  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--most", type=int, help="the longest n, in multiples of C")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    bench = GPU if arguments.device == "cuda" else CPU
    model = make_model(bench, arguments.device)
    multiples = [m for m in bench.multiples if m <= (arguments.most or max(bench.multiples))]
    settings = [Setting(m, n) for n in multiples for m in ("Delethink", "LongCoT")]
    figures = {setting: Figures() for setting in [*settings, Setting("GRPOTrainer", 1)]}
    rng = random.Random(arguments.seed)
    for round_ in range(arguments.rounds or bench.rounds):
        started = time.perf_counter()
        for setting, found in figures.items():
            measure(model, bench, setting, found, rng, with_memory=round_ == 0)
        print(f"# round {round_}: {time.perf_counter() - started:.0f} s", flush=True)
    report(model, bench, multiples, figures, arguments)


def make_model(bench: Bench, device: str) -> PreTrainedModel:
    """Return a model of random weights that takes the longest sequence."""
    longest = QUERY + bench.context_size * max(bench.multiples) + 1
    config = Qwen2Config(**bench.model, max_position_embeddings=longest, tie_word_embeddings=False)
    return Qwen2ForCausalLM(config).to(device)


def random_traces(bench: Bench, setting: Setting, rng: random.Random) -> list[Trace]:
    """Return random traces of the whole budget."""
    traces = []
    for _ in range(bench.traces):
        state = start(setting.spec(bench.context_size), (3,) * QUERY)
        chunks = []
        while state.stop is None:
            output = tuple(rng.randrange(3, VOCABULARY) for _ in range(state.max_new_tokens))
            chunks.append(Chunk(state.prompt_ids, output, (-2.5,) * len(output), StopReason.LENGTH))
            state = state.advance(output, StopReason.LENGTH)
        traces.append(Trace(state.query_ids, tuple(chunks), TraceStop.BUDGET))
    return traces


def measure(
    model: PreTrainedModel,
    bench: Bench,
    setting: Setting,
    found: Figures,
    rng: random.Random,
    with_memory: bool,
) -> None:
    """Time two steps; in the first round, measure the memory of a third one."""
    longcot = Setting("LongCoT", setting.multiple)
    traces = random_traces(bench, longcot if setting.method == "GRPOTrainer" else setting, rng)
    steps = Steps(3 if with_memory else None, next(model.parameters()).device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "model": model,
            "processing_class": load_tokenizer("toy", False),
            "args": trl_config(bench, folder, 3 if with_memory else 2, setting),
            "train_dataset": Dataset.from_list([{"prompt": "00:00000000001"}] * 3),
            "reward_funcs": [lambda prompts, **_: [float(i % 2) for i in range(len(traces))]],
            "callbacks": [steps],
        }
        trainer = make_trainer(bench, setting, traces, arguments)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    found.seconds = min(found.seconds, *steps.seconds)
    found.peak = steps.peak if with_memory else found.peak
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_trainer(
    bench: Bench, setting: Setting, traces: list[Trace], arguments: dict[str, Any]
) -> GRPOTrainer:
    if setting.method == "GRPOTrainer":
        return GRPOTrainer(
            rollout_func=lambda prompts, trainer: {
                "prompt_ids": [list(trace.query_ids) for trace in traces],
                "completion_ids": [list(trace.output_ids) for trace in traces],
                "logprobs": [[-2.5] * trace.length for trace in traces],
            },
            **arguments,
        )
    return DelethinkTrainer(
        run_rollouts=lambda examples: RolloutBatch(examples, traces),
        on_sampled=lambda sampled: None,
        **arguments,
    )


def trl_config(bench: Bench, folder: str, steps: int, setting: Setting) -> DelethinkConfig:
    return DelethinkConfig(
        output_dir=folder,
        per_device_train_batch_size=bench.traces,
        num_generations=bench.traces,
        max_completion_length=setting.multiple * bench.context_size,
        max_steps=steps,
        learning_rate=1e-6,
        loss_type="grpo",
        vllm_importance_sampling_correction=False,
        forward_tokens=bench.traces * (QUERY + bench.context_size),
        beta=0.0,
        bf16=bench.dtype == "bfloat16",
        gradient_checkpointing=bench.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1000,
    )


class Steps(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Measure the time of each step, and the memory of one of them instead.

    Args:
        profiled: the step to measure the memory of, from 1; ``None`` for none.
        device: device of the model.
    """

    def __init__(self, profiled: int | None, device: torch.device) -> None:
        self.seconds: list[float] = []
        self.peak = float("nan")
        self._profiled, self._device = profiled, device
        self._meter: Any = None
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        if state.global_step + 1 == self._profiled:
            self._meter = meter(self._device)
            self._read = self._meter.__enter__()
        self._wait()
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self._wait()
        if self._meter is None:
            self.seconds.append(time.perf_counter() - self._started)
            return
        self._meter.__exit__(None, None, None)
        self.peak, self._meter = self._read(), None

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


@contextmanager
def meter(device: torch.device) -> Iterator[Any]:
    """Yield a function that returns the peak bytes of tensors, beyond those before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield lambda: torch.cuda.max_memory_allocated() - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield lambda: _peak(profiler)


def _peak(profiler: Any) -> int:
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    ordered = sorted(events, key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in ordered))


def report(
    model: PreTrainedModel,
    bench: Bench,
    multiples: Sequence[int],
    figures: dict[Setting, Figures],
    arguments: argparse.Namespace,
) -> None:
    """Print the table, the exponents, and the comparison with GRPOTrainer."""
    host = describe_environment()
    shape = shape_of_config(model.config.to_dict(), "benchmark")
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else host["processor"]
    sizes = f"C={bench.context_size} m={bench.context_size // 2}, {bench.traces} traces a step"
    width, layers = bench.model["hidden_size"], bench.model["num_hidden_layers"]
    sizes += f"; Qwen2 of {layers} layers, width {width}"
    print(f"\n{device}, {arguments.threads} threads, torch {torch.__version__}, {bench.dtype}")
    print(f"commit {host['git_commit']}, seed {arguments.seed}, {sizes}\n")
    print("| n | chunks | Delethink s | s a chunk | MiB | LongCoT s | MiB | speed-up | predicted |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for n in multiples:
        ours, theirs = figures[Setting("Delethink", n)], figures[Setting("LongCoT", n)]
        chunks = bench.traces * (2 * n - 1)
        predicted = flops(shape, bench, "LongCoT", n) / flops(shape, bench, "Delethink", n)
        cells = [f"{n} C = {n * bench.context_size:,}", f"{chunks}", f"{ours.seconds:.2f}"]
        cells += [f"{ours.seconds / chunks:.4f}", f"{ours.peak / 2**20:.1f}"]
        cells += [f"{theirs.seconds:.2f}", f"{theirs.peak / 2**20:.1f}"]
        cells += [f"{theirs.seconds / ours.seconds:.2f}", f"{predicted:.2f}"]
        print("| " + " | ".join(cells) + " |", flush=True)
    for method in ("Delethink", "LongCoT"):
        print(f"\n{method}: " + exponents(bench, multiples, figures, method), end="")
    plain, own = figures[Setting("GRPOTrainer", 1)], figures[Setting("Delethink", 1)]
    print(f"\n\nn = C: {own.seconds:.3f} s, an unmodified GRPOTrainer {plain.seconds:.3f} s")


def flops(shape: ModelShape, bench: Bench, method: str, n: int) -> float:
    """Return the FLOPs of training on one trace."""
    context = bench.context_size
    cut = Cut(context, context // 2) if method == "Delethink" else LONGCOT
    return float(training_flops(shape, cut_traces(n * context, QUERY, cut)))


def exponents(
    bench: Bench, multiples: Sequence[int], figures: dict[Setting, Figures], method: str
) -> str:
    """Return the exponents of time and memory in n, by least squares in logarithms."""
    if len(multiples) < 2:
        return "one length has no exponent"
    found = [figures[Setting(method, n)] for n in multiples]
    lengths = np.log(multiples)
    times = np.polyfit(lengths, np.log([f.seconds for f in found]), 1)[0]
    peaks = np.polyfit(lengths, np.log([f.peak for f in found]), 1)[0]
    return f"seconds grow as n^{times:.2f}, memory as n^{peaks:.2f}"


if __name__ == "__main__":
    main()
