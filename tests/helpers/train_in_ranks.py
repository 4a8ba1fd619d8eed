"""Trains on traces of random tokens in one or several processes, and says what came of it."""

from __future__ import annotations

import os
import random
import socket
import tempfile
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import make_qwen2

from delethink.types import Chunk, StopReason, Trace, TraceStop

VOCABULARY, GROUP, LEARNING_RATE, HANGS_AFTER_S = 12, 4, 0.5, 120


@dataclass(frozen=True)
class Case:
    """Traces by their numbers of chunks, negative where they ran out of budget, and settings."""

    chunks: tuple[int, ...]
    loss: dict[str, Any] = field(default_factory=dict)
    micro_batch: int = 8  # traces, over all processes
    cost_is_equal: bool = False  # so that traces stay in the order given
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """What the first process knows afterwards."""

    parameters: dict[str, torch.Tensor]
    losses: list[float]
    statistics: Any
    work: Any
    metrics: dict[str, Any]
    order: list[list[int]]
    trained: list[list[list[int]]]  # by process, places of each micro-batch
    gathered: dict[str, torch.Tensor] | None = None  # weights for an engine
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


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t2"))
    own.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="t0", eos_token="t1")


def train(case: Case, strategy: str, folder: str) -> Outcome | None:
    """In each process; only the first one has an outcome."""
    from accelerate.state import AcceleratorState
    from datasets import Dataset
    from safetensors.torch import load_file

    from delethink.config import TrainerConfig
    from delethink.training.batching import RolloutBatch
    from delethink.training.data_parallel import RankGroup
    from delethink.training.grpo import DelethinkTrainer
    from delethink.training.grpo_config import DelethinkConfig, rank_settings
    from delethink.training.weights import GatherWeights

    AcceleratorState._reset_state(reset_partial_state=True)
    ranks = RankGroup()
    traces = random_traces(case.chunks)
    rng = random.Random(1)
    rewards = [1.0, 0.0] + [rng.choice([0.0, 1.0, 0.25]) for _ in traces[2:]]
    micro = case.micro_batch // ranks.size
    micro_batches = len(traces) // case.micro_batch
    settings: dict[str, Any] = {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": micro_batches,
        "steps_per_generation": micro_batches,
        "num_generations": GROUP,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "temperature": 0.7,
        "max_completion_length": 100,
        "max_grad_norm": 1e9,
        "optim": "sgd",
        "bf16": False,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "beta": 0.0,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "max_failed_share": 0.5,
    }
    if ranks.size > 1:
        settings |= rank_settings(TrainerConfig(num_ranks=ranks.size, strategy=strategy))

    trained: list[list[int]] = []

    class Spy(DelethinkTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            trained.append([t.index for t in inputs.traces])
            return super().compute_loss(model, inputs, *args, **kwargs)

    model = make_model()
    if "beta" in case.settings:  # TRL loads the reference weights from where the model is from
        model.config._name_or_path = f"{folder}/first"
        ranks.broadcast(lambda: model.save_pretrained(f"{folder}/first"))
    gathered = GatherWeights()
    trainer = Spy(
        model=model,
        processing_class=make_tokenizer(),
        args=DelethinkConfig(output_dir=folder, **(settings | case.loss | case.settings)),
        train_dataset=Dataset.from_list([{"prompt": f"t{i}"} for i in range(len(traces) // GROUP)]),
        reward_funcs=[lambda trace, **_: [rewards[traces.index(t)] for t in trace]],
        run_rollouts=lambda examples: RolloutBatch(examples, traces),
        on_sampled=lambda sampled: None,
        ranks=ranks,
        callbacks=[gathered],
        **({"cost": lambda trace: 1.0} if case.cost_is_equal else {}),
    )
    gathered.trainer = trainer
    trainer.train()
    statistics, work = trainer.pop_statistics(), trainer.pop_forward_counts()
    all_trained = ranks.gather(trained)
    trainer.save_model(folder)
    parameters = {n: _whole(p) for n, p in trainer.model.named_parameters()}
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
        dict(gathered.weights) if gathered.weights else None,
        load_file(Path(folder) / "model.safetensors"),
    )


def train_together(cases: dict[str, Case], strategy: str, num_processes: int = 2) -> Any:
    """The outcomes of several processes, by name of the case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (num_processes, port, cases, strategy, folder)
        mp.spawn(_process, args=arguments, nprocs=num_processes)
        return torch.load(Path(folder) / "outcomes", weights_only=False)


def _process(
    rank: int, size: int, port: int, cases: dict[str, Case], strategy: str, folder: str
) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=HANGS_AFTER_S))
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
