"""The processes that train together, and what they tell each other.

The first one owns the outside world: engine, rewards, run directory and progress. What it knows
travels over a group of its own on the CPU, whose patience does not end: sampling takes as long as
it takes, and a collective of the GPUs that waited for it would be taken for dead after minutes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from delethink.config import TrainerConfig, TrainingConfig
from delethink.cost.flops import forward_flops
from delethink.cost.models import shape_of_config
from delethink.errors import ModelError
from delethink.types import Trace

T = TypeVar("T")

_PATIENCE = timedelta(days=365)


class Processes:
    """The processes of ``torch.distributed``, or this one alone where it is not initialised.

    All of them make one at the same point, and all call each of its methods at the same point.

    Attributes:
        rank: of this process; the first has 0.
        size: how many there are.
    """

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if several else 0
        self.size: int = dist.get_world_size() if several else 1
        self._group: Any = None
        if self.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that owns the outside world."""
        return self.rank == 0

    def lead(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the first process, everywhere.

        Raises:
            Exception: what ``make`` raised there, everywhere too: nobody waits for a process that
                has failed.
        """
        if self.size == 1:
            return make()
        told: list[Any] = [(None, None)]
        failure: Exception | None = None
        if self.is_first:
            try:
                told = [(make(), None)]
            except Exception as error:  # whatever it is, it is everybody's
                failure = error
                told = [(None, _portable(error))]
        dist.broadcast_object_list(told, 0, self._group)
        made, everybodys = told[0]
        if failure or everybodys:
            raise failure or everybodys
        value: T = made
        return value

    def deal_out(self, make: Callable[[], Sequence[T]]) -> T:
        """For each process its own of the values that ``make`` returns in the first one.

        Raises:
            Exception: as in ``lead``.
        """
        values: list[T] = []
        self.lead(lambda: values.extend(make()))
        if self.size == 1:
            return values[0]
        own: list[Any] = [None]
        dist.scatter_object_list(own, values if self.is_first else None, 0, self._group)
        mine: T = own[0]
        return mine

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, everywhere."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self._group)
        return values

    def agree_on_batches(self, number: int) -> int:
        """How many forward batches every process runs in the micro-batch at hand: the most of any.

        A pass through sharded weights is a collective, so a process with fewer batches runs empty
        ones, which weigh nothing; one at least, through which gradients are exchanged.
        """
        if self.size == 1:
            return number
        most = torch.tensor(max(1, number))
        dist.all_reduce(most, dist.ReduceOp.MAX, self._group)
        return int(most)


def _portable(problem: Exception) -> Exception:
    """An error that other processes can read."""
    try:
        pickle.loads(pickle.dumps(problem))
    except Exception:  # whatever its own code raises
        return RuntimeError(f"{type(problem).__name__}: {problem}")
    return problem


Order = list[list[int]]  # places of each process's traces in the batch


def deal(costs: Sequence[float], num_processes: int) -> Order:
    """Deals the traces of an optimizer step out to processes.

    Args:
        costs: of each trace of the step, in any unit.
        num_processes: a divisor of the number of traces.

    Returns:
        For each process the places of its traces in ``costs``, the costliest first. Each place is
        there once, every process has as many, and the highest cost of a process is not above that
        of the order given.
    """
    if not costs or len(costs) % num_processes:
        raise ValueError(f"{len(costs)} traces do not divide by {num_processes} processes")
    ranked = sorted(range(len(costs)), key=lambda i: -costs[i])
    order: Order = [[] for _ in range(num_processes)]
    totals = [0.0] * num_processes
    for first in range(0, len(ranked), num_processes):
        behind = sorted(range(num_processes), key=lambda process: totals[process])
        for process, i in zip(behind, ranked[first : first + num_processes], strict=True):
            order[process].append(i)
            totals[process] += costs[i]
    given = in_order(len(costs), num_processes)
    return given if max(loads(given, costs)) <= max(totals) else order


def in_order(num_traces: int, num_processes: int) -> Order:
    """The order given: the first traces to the first process."""
    share = num_traces // num_processes
    return [list(range(p * share, (p + 1) * share)) for p in range(num_processes)]


def loads(order: Order, costs: Sequence[float]) -> list[float]:
    """The cost of each process."""
    return [sum(costs[i] for i in own) for own in order]


def balance(costs: Sequence[float]) -> float:
    """Mean cost of a process over the highest cost of one: 1 is even, and 1 / R is one for all."""
    highest = max(costs)
    return sum(costs) / len(costs) / highest if highest else 1.0


@dataclass(frozen=True)
class Shares:
    """A batch of traces, and who has which.

    Attributes:
        order: for each process the places of its traces in the batch.
        traces: of this process, in that order.
        all_traces: of the whole batch on the first process, elsewhere none.
        balance: of what training on them costs; of several optimizer steps the mean.
        chunk_tokens: that each process forwards in all, prompts of chunks included.
    """

    order: Order
    traces: list[Trace]
    all_traces: list[Trace]
    balance: float
    chunk_tokens: list[int]

    def own(self, rank: int, values: Sequence[Any]) -> list[Any]:
        """A process's own of the values of the whole batch."""
        return [values[i] for i in self.order[rank]]

    def metrics(self) -> dict[str, Any]:
        """What a step's metrics say of it; nothing where there is one process."""
        if len(self.order) == 1:
            return {}
        return {
            "balance": self.balance,
            "traces_by_process": [len(rows) for rows in self.order],
            "chunk_tokens_by_process": self.chunk_tokens,
        }


class _Dealt(NamedTuple):
    """What a process is told."""

    order: Order
    balance: float
    chunk_tokens: list[int]
    traces: list[Trace]


def share_out(
    processes: Processes,
    number: int,
    play: Callable[[], list[Trace]],
    cost: Callable[[Trace], float],
    num_steps: int = 1,
) -> Shares:
    """Has the first process play a batch, and deals the traces out.

    Args:
        processes: that train together.
        number: of traces in the batch.
        play: plays them; called in the first process.
        cost: of training on a trace, in any unit.
        num_steps: optimizer steps that the batch is cut into; a trace stays in its own.
    """
    played: list[Trace] = []

    def make() -> list[_Dealt]:
        played.extend(play())
        costs = [cost(trace) for trace in played]
        order, even = _deal_steps(costs, processes.size, num_steps)
        tokens = [sum(chunk_tokens(played[i]) for i in own) for own in order]
        return [_Dealt(order, even, tokens, [played[i] for i in own]) for own in order]

    dealt = processes.deal_out(make)
    if sorted(i for own in dealt.order for i in own) != list(range(number)):
        raise RuntimeError("a trace was dealt out to no process, or to several")
    return Shares(dealt.order, dealt.traces, played, dealt.balance, dealt.chunk_tokens)


def chunk_tokens(trace: Trace) -> int:
    """Tokens that are forwarded to train on a trace: each chunk under its own prompt."""
    return sum(len(c.prompt_ids) + len(c.output_ids) for c in trace.chunks if c.output_ids)


def _deal_steps(costs: Sequence[float], num_processes: int, num_steps: int) -> tuple[Order, float]:
    """One step after another; a process alone keeps the order of playing."""
    if num_processes == 1:
        return in_order(len(costs), 1), 1.0
    size = len(costs) // num_steps
    whole: Order = [[] for _ in range(num_processes)]
    balances = []
    for first in range(0, len(costs), size):
        step = costs[first : first + size]
        dealt = deal(step, num_processes)
        balances.append(balance(loads(dealt, step)))
        for own, places in zip(whole, dealt, strict=True):
            own += [first + i for i in places]
    return whole, fmean(balances)


def batch_settings(training: TrainingConfig, num_processes: int) -> dict[str, int]:
    """How a process cuts its share of an optimizer step and of a batch, as ``GRPOConfig`` has it.

    A micro-batch is as large as the recipe has it where that divides the share, else the next
    smaller size that does. The traces of the step stay the same, whatever the number of processes.
    """
    share = training.traces_per_step // num_processes
    most = min(training.per_device_train_batch_size, share)
    size = next(n for n in range(most, 0, -1) if share % n == 0)
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": share // size,
        "steps_per_generation": training.traces_per_batch // num_processes // size,
    }


def process_settings(trainer: TrainerConfig) -> dict[str, Any]:
    """What ``GRPOConfig`` has to say of several processes."""
    if trainer.num_ranks == 1:
        return {}
    settings: dict[str, Any] = {"use_cpu": trainer.gpus_per_rank == 0}
    if trainer.strategy == "fsdp2":
        return settings | {"fsdp": True, "fsdp_config": {"version": 2}}
    # A micro-batch has many forward passes, and DDP would talk or search in each. Buffers never
    # differ, and each parameter has a part in each pass.
    return settings | {"ddp_broadcast_buffers": False, "ddp_find_unused_parameters": False}


def shard_on_cpu(trainer: Any) -> None:
    """Has accelerate shard also where there is no GPU; it would take DDP there without a word."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    if trainer.args.fsdp_plugin_args is None or state.distributed_type is DistributedType.FSDP:
        return
    PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    trainer.is_fsdp_enabled = True


def trace_cost(config: Mapping[str, Any]) -> Callable[[Trace], float]:
    """How to weigh a trace for a model, attention included.

    Where no formula covers the architecture, a trace weighs as many tokens as are forwarded, which
    leaves out that tokens late in a chunk attend to more.

    Args:
        config: the model's ``config.json``.
    """
    try:
        shape = shape_of_config(dict(config), "the model")
    except ModelError:
        shape = None

    def cost(trace: Trace) -> float:
        chunks = [chunk for chunk in trace.chunks if chunk.output_ids]
        outputs = np.array([len(chunk.output_ids) for chunk in chunks], float)
        lengths = outputs + np.array([len(chunk.prompt_ids) for chunk in chunks], float)
        work = lengths if shape is None else forward_flops(shape, 0, lengths, heads=outputs)
        return float(np.sum(work))

    return cost
