"""The processes that train together, and what they tell each other.

The first one owns the outside world: engine, rewards, run directory and progress. What it knows
travels over a group of its own on the CPU, whose patience does not end: sampling takes as long as
it takes, and a collective of the GPUs that waited for it would be taken for dead after minutes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

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
            except Exception as problem:  # whatever it is, it is everybody's
                failure = problem
                told = [(None, _portable(problem))]
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
