"""Predicted against measured seconds of sampling and training on this machine.

    python benchmarks/bench_cost.py [--rounds 3] [--traces 16] [--threads 1] [--seed 0]

A model in the shape of the toy reasoner, with random weights, thinks for a fixed number of tokens,
as LongCoT and with Delethink. The in-process engine samples, and the trainer trains. Efficiencies
are fitted to two of six lengths, as in ``delethink cost --calibrate``. The table compares
prediction and measurement at all six. Each figure is the minimum over rounds that alternate between
the settings, because other load can only add time.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from delethink.cli.process import set_up_process

set_up_process()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import PreTrainedModel, TrainerCallback  # noqa: E402

from delethink.chunking import ChunkSpec  # noqa: E402
from delethink.cost.calibrate import Measurement, fit  # noqa: E402
from delethink.cost.estimate import Lengths, Workload, estimate  # noqa: E402
from delethink.cost.flops import Cut  # noqa: E402
from delethink.cost.hardware import Efficiency, accelerator  # noqa: E402
from delethink.cost.models import model_shape  # noqa: E402
from delethink.engines.loading import load_model, load_tokenizer  # noqa: E402
from delethink.engines.transformers import TransformersEngine  # noqa: E402
from delethink.policy import Sampling  # noqa: E402
from delethink.rollout import run_rollouts  # noqa: E402
from delethink.training.batching import RolloutBatch  # noqa: E402
from delethink.training.grpo import DelethinkTrainer  # noqa: E402
from delethink.training.grpo_config import DelethinkConfig  # noqa: E402
from delethink.types import Trace  # noqa: E402

QUERY, CONTEXT, CARRYOVER = 16, 128, 64
LENGTHS = (256, 384, 512, 768, 1024, 1536)  # 128 + k x 64: every chunk is full
FITTED = (384, 1024)
FORWARD_TOKENS = 4096


class Setting(NamedTuple):
    """A method at one thinking length."""

    method: str
    tokens: int

    @property
    def spec(self) -> ChunkSpec:
        """Chunk spec with this budget."""
        if self.method == "LongCoT":
            return ChunkSpec.longcot(self.tokens)
        chunks = 1 + (self.tokens - CONTEXT) // (CONTEXT - CARRYOVER)
        return ChunkSpec(CONTEXT, CARRYOVER, chunks, head_size=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--traces", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    flops, bandwidth = peaks()
    print(f"products of float32 matrices: {flops / 1e9:.0f} GFLOP/s")
    print(f"copying: {bandwidth / 1e9:.1f} GB/s, read and written")
    print(f"estimates of 10,000 settings: {best(sweep):.3f} s", flush=True)
    model = make_model()
    settings = [Setting(m, n) for m in ("LongCoT", "Delethink") for n in LENGTHS]
    sampling = dict.fromkeys(settings, np.inf)
    training = dict.fromkeys(settings, np.inf)
    for round_ in range(arguments.rounds):
        started = time.perf_counter()
        for setting in settings:
            seconds, traces = sample(model, setting, arguments.traces)
            sampling[setting] = min(sampling[setting], seconds)
            training[setting] = min(training[setting], train(model, traces))
        print(f"# round {round_}: {time.perf_counter() - started:.0f} s", flush=True)
    report(sampling, training, arguments.traces)


def make_model() -> PreTrainedModel:
    """Return the toy reasoner with random weights and a window for the longest context."""
    model = load_model("toy", "float32", False)
    config = type(model.config).from_dict(
        model.config.to_dict() | {"max_position_embeddings": QUERY + max(LENGTHS) + 1}
    )
    return type(model)(config)


def sample(model: PreTrainedModel, setting: Setting, count: int) -> tuple[float, list[Trace]]:
    """Sample traces of the full budget and return the seconds and the traces."""
    engine = TransformersEngine(model, eos_ids=[model.config.vocab_size], pad_id=0)
    queries = [tuple(range(3, 12)) * 2 for _ in range(count)]
    queries = [query[:QUERY] for query in queries]
    samplings = [Sampling(1.0, seed) for seed in range(count)]
    started = time.perf_counter()
    traces = asyncio.run(run_rollouts(engine, setting.spec, queries, samplings))
    seconds = time.perf_counter() - started
    assert {trace.length for trace in traces} == {setting.tokens}
    return seconds, traces


def train(model: PreTrainedModel, traces: list[Trace], steps: int = 3) -> float:
    """Return the seconds of the fastest of a few optimizer steps on the traces."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = DelethinkTrainer(
            model=model,
            processing_class=load_tokenizer("toy", False),
            args=DelethinkConfig(
                output_dir=folder,
                per_device_train_batch_size=len(traces),
                num_generations=len(traces),
                max_steps=steps,
                learning_rate=0.0,
                loss_type="grpo",
                forward_tokens=FORWARD_TOKENS,
                beta=0.0,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                disable_tqdm=True,
                save_strategy="no",
                use_cpu=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": "00:00000000001"}] * steps),
            reward_funcs=[lambda prompts, **_: [float(i % 2) for i in range(len(traces))]],
            run_rollouts=lambda examples: RolloutBatch(examples, traces),
            on_sampled=lambda sampled: None,
            callbacks=[clock],
        )
        trainer.train()
    return min(clock.seconds)


class Clock(TrainerCallback):
    """Measure the seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self._started)


def report(sampling: dict[Setting, float], training: dict[Setting, float], count: int) -> None:
    """Fit the efficiencies to two lengths and print the table."""
    shape, device = model_shape("toy"), accelerator("cpu")
    measured = {s: measurement(s, count, sampling[s], training[s]) for s in sampling}
    chosen = [m for s, m in measured.items() if s.tokens in FITTED]
    found = fit(chosen, shape, device, Efficiency(), "two lengths")
    values = {name: float(f"{getattr(found.efficiency, name):.3g}") for name in found.fitted}
    print(f"fitted to {FITTED[0]} and {FITTED[1]} tokens: {values}\n")
    print(
        "| method | tokens | sampling: measured, s | predicted | error "
        "| training: measured, s | predicted | error | |"
    )
    print("| --- " * 9 + "|")
    worst = 0.0
    for setting, m in measured.items():
        cost = estimate(shape, m.lengths, m.cut, device, found.efficiency, m.workload)
        cells, errors = [], []
        for actual, predicted in (
            (sampling[setting], float(cost.sampling_seconds)),
            (training[setting], float(cost.training_seconds)),
        ):
            errors.append(predicted / actual - 1)
            cells += [f"{actual:.2f}", f"{predicted:.2f}", f"{errors[-1]:+.1%}"]
        note = "fitted" if setting.tokens in FITTED else ""
        worst = worst if note else max(worst, *map(abs, errors))
        print("| " + " | ".join([setting.method, f"{setting.tokens:,}", *cells, note]) + " |")
    print(f"\nThe largest error at the lengths that were not fitted is {worst:.1%}.")


def measurement(setting: Setting, count: int, sampling: float, training: float) -> Measurement:
    """Return the timed step of one device."""
    workload = Workload(QUERY, count, 1, 1, 1, extra_passes=0.0, prefix_cache=False)
    lengths = Lengths.constant(setting.tokens)
    return Measurement(lengths, Cut.of(setting.spec), workload, sampling, training)


def sweep() -> None:
    """Estimate 10,000 combinations of length, C and m in one call."""
    rng = np.random.default_rng(0)
    context = rng.uniform(4096, 65_536, 10_000).round()
    cut = Cut(context, (context * rng.uniform(0.1, 0.9, 10_000)).round())
    lengths = Lengths.constant(context * rng.uniform(1, 50, 10_000).round())
    estimate(model_shape("Qwen/Qwen2.5-1.5B"), lengths, cut, accelerator("h100"))


def peaks() -> tuple[float, float]:
    """Return FLOPs per second of a large matrix product, and bytes per second of a copy."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    big, to = torch.randn(2**26), torch.empty(2**26)
    return 2 * 2048**3 / best(lambda: a @ b), 2 * big.nbytes / best(lambda: to.copy_(big))


def best(call: Callable[[], object]) -> float:
    """Return the seconds of the fastest of a few calls."""
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
