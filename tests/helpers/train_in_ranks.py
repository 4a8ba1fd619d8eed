"""Train on traces of random tokens on one or several ranks, and return the results."""

from __future__ import annotations

import math
import os
import random
import socket
import tempfile
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import make_qwen2
from tiny_training import GROUP, VOCABULARY, make_config, make_tokenizer

from delethink.types import Chunk, StopReason, Trace, TraceStop

LEARNING_RATE, COLLECTIVE_TIMEOUT_S = 0.5, 120


@dataclass(frozen=True)
class Case:
    """Numbers of chunks of the traces, negative if out of budget, and settings."""

    chunks: tuple[int, ...]
    loss: dict[str, Any] = field(default_factory=dict)
    micro_batch: int = 8  # traces, over all ranks
    cost_is_equal: bool = False  # traces stay in the given order
    settings: dict[str, Any] = field(default_factory=dict)
    placement: Literal["separate", "colocated"] = "separate"


@dataclass
class Outcome:
    """Results of the main rank."""

    parameters: dict[str, torch.Tensor]
    losses: list[float]
    statistics: Any
    work: Any
    metrics: dict[str, Any]
    assignment: list[list[int]]
    trained: list[list[list[int]]]  # by rank, trace indices of each micro-batch
    events: list[list[str]]  # by rank
    gathered: dict[str, torch.Tensor] | None = None  # weights for an engine
    shared: list[dict[str, torch.Tensor]] | None = None  # by rank, with an engine beside it
    saved: dict[str, torch.Tensor] | None = None


def random_traces(chunks: tuple[int, ...]) -> list[Trace]:
    rng = random.Random(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(2, VOCABULARY) for _ in range(n))

    traces = []
    for i, number in enumerate(chunks):
        query, parts = ((5, 6, 7), (8, 9))[i // GROUP % 2], []
        for k in range(abs(number)):
            prompt = query + tokens(rng.randint(1, 6)) if k else query
            ends = number > 0 and k == number - 1
            output = tokens(rng.randint(1, 7)) + ((1,) if ends else ())
            logprobs = tuple(rng.uniform(-4, -1) for _ in output)
            stop = StopReason.EOS if ends else StopReason.LENGTH
            parts.append(Chunk(prompt, output, logprobs, stop))
        stop_of_trace = TraceStop.COMPLETED if number > 0 else TraceStop.BUDGET
        traces.append(Trace(query, tuple(parts), stop_of_trace))
    return traces


def make_model() -> Any:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32}
    return make_qwen2(3, scale=4, **sizes, tie_word_embeddings=False).double()


def train(case: Case, strategy: str, folder: str) -> Outcome | None:
    """Train on this rank; only the main rank returns an outcome."""
    from accelerate.state import AcceleratorState
    from datasets import Dataset
    from safetensors.torch import load_file

    from delethink.config import EngineConfig, TrainerConfig
    from delethink.engines.weight_sync import read
    from delethink.training.batching import RolloutBatch
    from delethink.training.data_parallel import RankGroup
    from delethink.training.grpo import DelethinkTrainer
    from delethink.training.grpo_config import rank_settings
    from delethink.training.weights import RankWeights

    AcceleratorState._reset_state(reset_partial_state=True)
    ranks = RankGroup()
    traces = random_traces(case.chunks)
    rng = random.Random(1)
    rewards = [1.0, 0.0] + [rng.choice([0.0, 1.0, 0.25]) for _ in traces[2:]]
    micro_batches = len(traces) // case.micro_batch
    accumulated = case.settings.get("gradient_accumulation_steps", micro_batches)
    step = case.micro_batch * accumulated
    whole = math.lcm(ranks.size, GROUP)
    rows = step if step % ranks.size == 0 else -(-step // whole) * whole
    settings: dict[str, Any] = {
        "per_device_train_batch_size": rows // ranks.size // accumulated,
        "gradient_accumulation_steps": micro_batches,
        "steps_per_generation": micro_batches,
        "filler_rows": rows - step,
        "learning_rate": LEARNING_RATE,
        "max_steps": 1,
        "temperature": 0.7,
        "max_completion_length": 100,
        "max_grad_norm": 1e9,
        "optim": "sgd",
        "max_failed_share": 0.5,
    }
    if ranks.size > 1:
        settings |= rank_settings(TrainerConfig(num_ranks=ranks.size, strategy=strategy))

    trained: list[list[int]] = []
    events: list[str] = []

    def run_rollouts(examples: list[Any]) -> RolloutBatch:
        events.append("sample")
        return RolloutBatch(examples[: len(traces)], traces)

    class Spy(DelethinkTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            trained.append([t.index for t in inputs.traces])
            return super().compute_loss(model, inputs, *args, **kwargs)

    model = make_model()
    if "beta" in case.settings:  # TRL loads the reference weights from where the model is from
        model.config._name_or_path = f"{folder}/first"
        ranks.broadcast(lambda: model.save_pretrained(f"{folder}/first"))
    weights = RankWeights(model, EngineConfig(placement=case.placement), ranks)
    weights.collect()
    trainer = Spy(
        model=model,
        processing_class=make_tokenizer(),
        args=make_config(folder, **(settings | case.loss | case.settings)),
        train_dataset=Dataset.from_list(
            [{"prompt": f"t{i}"} for i in range(len(traces) // step * rows // GROUP)]
        ),
        reward_funcs=[lambda trace, **_: [rewards[traces.index(t)] for t in trace]],
        run_rollouts=run_rollouts,
        on_sampled=lambda sampled: None,
        ranks=ranks,
        before_rollouts=lambda: (events.append("collect"), weights.collect()),
        after_rollouts=lambda: (events.append("release"), weights.release()),
        **({"cost": lambda trace: 1.0} if case.cost_is_equal else {}),
    )
    weights.trainer = trainer
    trainer.train()
    weights.collect()
    statistics, work = trainer.pop_statistics(), trainer.pop_forward_counts()
    all_trained, ranks_events = ranks.gather(trained), ranks.gather(events)
    trainer.save_model(folder)
    parameters = {n: _whole(p) for n, p in trainer.model.named_parameters()}
    shared = None
    if weights.handles:
        shared = [
            {name: tensor.clone() for name, tensor in read(handle.place, handle.slots).items()}
            for handle in weights.handles
        ]
    weights.close()
    if not ranks.is_main:
        return None
    return Outcome(
        parameters,
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        statistics,
        work,
        trainer.shards.metrics(),
        trainer.shards.assignment,
        all_trained,
        ranks_events,
        dict(weights.weights) if weights.weights else None,
        shared,
        load_file(Path(folder) / "model.safetensors"),
    )


def train_on_ranks(cases: dict[str, Case], strategy: str, num_ranks: int = 2) -> Any:
    """Return the outcomes of several ranks, by name of the case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (num_ranks, port, cases, strategy, folder)
        mp.spawn(_run_rank, args=arguments, nprocs=num_ranks)
        return torch.load(Path(folder) / "outcomes", weights_only=False)


def _run_rank(
    rank: int, size: int, port: int, cases: dict[str, Case], strategy: str, folder: str
) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    try:
        outcomes = {name: train(case, strategy, f"{folder}/{name}") for name, case in cases.items()}
        if rank == 0:
            torch.save(outcomes, Path(folder) / "outcomes")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    whole: Any = parameter.detach()
    tensor: torch.Tensor = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
    return tensor.clone()
