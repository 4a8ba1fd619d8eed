"""The traces of a batch, shared out to the processes that train on them.

The first process plays and pays for all of them, in the order in which TRL's processes drew their
examples: rank after rank, so that a group's traces stand side by side as TRL wants them. What each
process then trains on is dealt out by cost (``balance.py``). Rewards and advantages stay in the
order of playing, in which TRL takes its baselines; ``own`` picks a process's from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from delethink.training.balance import Order, balance, deal, in_order, loads
from delethink.training.processes import Processes
from delethink.types import Trace


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
