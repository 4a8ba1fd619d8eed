"""Ranks that train together: what they exchange, and how a batch of traces is sharded over them.

The main rank owns the engine, rewards, the run directory and progress; the other ranks only train.
They exchange objects over a CPU process group with a very long timeout. A collective on the GPUs
would time out after minutes while the other ranks wait for sampling.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from delethink.config import Recipe
from delethink.cost.flops import forward_flops
from delethink.cost.models import shape_of_config
from delethink.engines.base import WorkerPlace
from delethink.errors import ModelError
from delethink.types import Trace, TraceStop

T = TypeVar("T")
Assignment = list[list[int]]  # for each rank, the batch indices of its traces

_COLLECTIVE_TIMEOUT = timedelta(days=365)


class RankGroup:
    """The ranks of ``torch.distributed``; a single rank where it is not initialized.

    Every method is a collective: all ranks create the group and call its methods in the same order.
    """

    def __init__(self) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if distributed else 0
        self.size: int = dist.get_world_size() if distributed else 1
        self._group: Any = None
        if self.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=_COLLECTIVE_TIMEOUT)

    @property
    def is_main(self) -> bool:
        """True on the main rank."""
        return self.rank == 0

    def broadcast(self, make: Callable[[], T]) -> T:
        """Call ``make`` on the main rank and return its result on every rank.

        Raises:
            Exception: ``make`` raised an exception. Every rank raises it, so that none waits for
                a rank that has failed.
        """
        if self.size == 1:
            return make()
        message: list[Any] = [(None, None)]
        failure: Exception | None = None
        if self.is_main:
            try:
                message = [(make(), None)]
            except Exception as error:  # any exception of the main rank ends all ranks
                failure = error
                message = [(None, _picklable(error))]
        dist.broadcast_object_list(message, 0, self._group)
        value: T
        value, remote_failure = message[0]
        if failure or remote_failure:
            raise failure or remote_failure
        return value

    def scatter(self, make: Callable[[], Sequence[T]]) -> T:
        """Call ``make`` on the main rank and return to each rank its item of the result.

        Raises:
            Exception: As in ``broadcast``.
        """
        values: list[T] = []
        self.broadcast(lambda: values.extend(make()))
        if self.size == 1:
            return values[0]
        received: list[Any] = [None]
        dist.scatter_object_list(received, values if self.is_main else None, 0, self._group)
        value: T = received[0]
        return value

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self._group)
        return values


def gather_places(recipe: Recipe, ranks: RankGroup) -> list[WorkerPlace] | None:
    """Return the places beside all ranks; ``None`` without engines there. A collective."""
    if recipe.engine.placement != "colocated":
        return None
    import ray

    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", []) if recipe.trainer.gpus_per_rank else []
    return ranks.gather(WorkerPlace(context.get_node_id(), gpus[0] if gpus else None))


def _picklable(error: Exception) -> Exception:
    """Return the error, or its text in a ``RuntimeError`` if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # the error's own code may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@dataclass(frozen=True)
class Padding:
    """Rows without a trace at the end of each optimizer step, so that ranks have equally many."""

    traces: int  # of an optimizer step
    rows: int  # of an optimizer step

    def pad(self, values: Sequence[T], filler: T) -> list[T]:
        """Return values of traces as values of rows."""
        rows: list[T] = []
        for first in range(0, len(values), self.traces):
            rows += values[first : first + self.traces]
            rows += [filler] * (self.rows - self.traces)
        return rows

    def unpad(self, values: Sequence[T]) -> list[T]:
        """Return values of rows as values of traces."""
        return [value for row, value in enumerate(values) if self.trace(row) is not None]

    def trace(self, row: int) -> int | None:
        """Return the index of the trace in a row; ``None`` without one."""
        step, place = divmod(row, self.rows)
        return step * self.traces + place if place < self.traces else None


@dataclass(frozen=True)
class Shards:
    """A batch of traces sharded over ranks."""

    assignment: Assignment  # of rows
    padding: Padding
    traces: list[Trace]  # of this rank, in that order; without chunks in rows without a trace
    all_traces: list[Trace]  # of the batch on the main rank; empty on the other ranks
    balance: float  # mean over highest training cost of a rank, averaged over optimizer steps
    chunk_tokens: list[int]  # forwarded tokens of each rank, prompts of chunks included

    def metrics(self) -> dict[str, Any]:
        """Return the metrics of a step; none for a single rank."""
        if len(self.assignment) == 1:
            return {}
        return {
            "balance": self.balance,
            "traces_by_process": [
                sum(self.padding.trace(row) is not None for row in rows) for rows in self.assignment
            ],
            "chunk_tokens_by_process": self.chunk_tokens,
        }


def shard_traces(
    ranks: RankGroup,
    num_rows: int,
    run_rollouts: Callable[[], list[Trace]],
    cost: Callable[[Trace], float],
    num_steps: int = 1,
    num_fillers: int = 0,
) -> Shards:
    """Sample a batch on the main rank and shard its traces over ranks, balanced by cost.

    The cost of a trace is in any unit. A trace stays in its one of ``num_steps`` optimizer steps.
    Each step ends with ``num_fillers`` rows without a trace.
    """
    traces: list[Trace] = []
    padding = Padding(num_rows // num_steps - num_fillers, num_rows // num_steps)

    def make_shards() -> list[Shards]:
        sampled = run_rollouts()
        traces.extend(sampled)
        filler = Trace(sampled[0].query_ids, (), TraceStop.ABORTED)
        rows = padding.pad(sampled, filler)
        costs = [cost(trace) for trace in rows]
        assignment, balance = _assign_steps(costs, ranks.size, num_steps)
        tokens = [sum(chunk_tokens(rows[i]) for i in indices) for indices in assignment]
        return [
            Shards(assignment, padding, [rows[i] for i in indices], [], balance, tokens)
            for indices in assignment
        ]

    shards = ranks.scatter(make_shards)
    if sorted(i for indices in shards.assignment for i in indices) != list(range(num_rows)):
        raise RuntimeError(f"the shards do not hold each of {num_rows} rows exactly once")
    return replace(shards, all_traces=traces)


def _assign_steps(
    costs: Sequence[float], num_ranks: int, num_steps: int
) -> tuple[Assignment, float]:
    """Assign the traces of each optimizer step; a single rank keeps the sampled order."""
    if num_ranks == 1:
        return contiguous_assignment(len(costs), 1), 1.0
    size = len(costs) // num_steps
    assignment: Assignment = [[] for _ in range(num_ranks)]
    balances = []
    for first in range(0, len(costs), size):
        step_costs = costs[first : first + size]
        step_assignment = balanced_assignment(step_costs, num_ranks)
        balances.append(load_balance(rank_costs(step_assignment, step_costs)))
        for indices, step_indices in zip(assignment, step_assignment, strict=True):
            indices += [first + i for i in step_indices]
    return assignment, fmean(balances)


def balanced_assignment(costs: Sequence[float], num_ranks: int) -> Assignment:
    """Assign the traces of an optimizer step to ranks, the same number to each.

    Greedy: the next costliest ``num_ranks`` traces go to the ranks by ascending total cost. The
    highest cost of a rank is at most that of ``contiguous_assignment``.
    """
    if not costs or len(costs) % num_ranks:
        raise ValueError(f"{len(costs)} traces do not divide by {num_ranks} ranks")
    descending = sorted(range(len(costs)), key=lambda i: -costs[i])
    assignment: Assignment = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for first in range(0, len(descending), num_ranks):
        by_total = sorted(range(num_ranks), key=lambda rank: totals[rank])
        for rank, i in zip(by_total, descending[first : first + num_ranks], strict=True):
            assignment[rank].append(i)
            totals[rank] += costs[i]
    contiguous = contiguous_assignment(len(costs), num_ranks)
    return contiguous if max(rank_costs(contiguous, costs)) <= max(totals) else assignment


def contiguous_assignment(num_traces: int, num_ranks: int) -> Assignment:
    """Assign the first traces to the first rank, and so on."""
    share = num_traces // num_ranks
    return [list(range(rank * share, (rank + 1) * share)) for rank in range(num_ranks)]


def rank_costs(assignment: Assignment, costs: Sequence[float]) -> list[float]:
    """Return the total cost of each rank."""
    return [sum(costs[i] for i in indices) for indices in assignment]


def load_balance(costs: Sequence[float]) -> float:
    """Return mean over highest cost of a rank: 1 if even, 1 / R if one of R ranks has it all."""
    highest = max(costs)
    return sum(costs) / len(costs) / highest if highest else 1.0


def chunk_tokens(trace: Trace) -> int:
    """Return the forwarded tokens of a trace: each chunk under its own prompt."""
    return sum(len(c.prompt_ids) + len(c.output_ids) for c in trace.chunks if c.output_ids)


def trace_cost(config: Mapping[str, Any]) -> Callable[[Trace], float]:
    """Return a function from a trace to its training cost for a ``config.json``, with attention.

    Without a formula for the architecture, the cost is the number of forwarded tokens, which
    ignores that late tokens of a chunk attend to more tokens.
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


def enable_cpu_sharding(trainer: Any) -> None:
    """Apply the trainer's FSDP settings without a GPU, where accelerate silently uses DDP."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    if trainer.args.fsdp_plugin_args is None or state.distributed_type is DistributedType.FSDP:
        return
    PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    trainer.is_fsdp_enabled = True
