"""The traces of a batch, shared out to the processes that train on them.

The first process plays and pays for all of them, in the order in which TRL's processes drew their
examples: rank after rank, so that a group's traces stand side by side as TRL wants them. What each
process then trains on is dealt out by cost (``balance.py``). Rewards and advantages stay in the order
of playing, in which TRL takes its baselines; ``own`` picks a process's from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from delethink.training.balance import Load, Order, deal, in_order, load
from delethink.training.processes import Processes
from delethink.types import Trace

Example = dict[str, Any]


@dataclass(frozen=True)
class Shares:
    """A batch of traces, and who has which.

    Attributes:
        order: for each process the places of its traces in the batch.
        traces: of this process, in that order.
        examples: of the whole batch.
        all_traces: of the whole batch on the first process, elsewhere none.
        load: how even the work is, chunk tokens of each process beside it.
        chunk_tokens: tokens that each process forwards, prompts of chunks included.
    """

    order: Order
    traces: list[Trace]
    examples: list[Example]
    all_traces: list[Trace]
    load: Load
    chunk_tokens: list[int]

    def own(self, rank: int, values: Sequence[Any]) -> list[Any]:
        """A process's own of the values of the whole batch."""
        return [values[i] for i in self.order[rank]]

    def metrics(self) -> dict[str, Any]:
        """What a step's metrics say of it; nothing where there is one process."""
        if len(self.order) == 1:
            return {}
        return {
            "balance": self.load.balance,
            "busy_share": self.load.busy,
            "traces_by_process": [len(rows) for rows in self.order],
            "chunk_tokens_by_process": self.chunk_tokens,
        }


def share_out(
    processes: Processes,
    examples: list[Example],
    play: Callable[[list[Example]], list[Trace]],
    cost: Callable[[Trace], float],
    micro_batch_size: int,
    num_steps: int = 1,
) -> Shares:
    """Has the first process play the examples of all processes, and deals the traces out.

    Args:
        processes: that train together.
        examples: of this process.
        play: plays a trace for each example, in their order; called in the first process.
        cost: of training on a trace, in any unit.
        micro_batch_size: traces of a process in a micro-batch.
        num_steps: optimizer steps that the batch is cut into; a trace stays in its own.
    """
    everybodys = [example for own in processes.gather(examples) for example in own]
    played: list[Trace] = []

    def make() -> list[tuple[Order, Load, list[int], list[Trace]]]:
        played.extend(play(everybodys))
        order, even = _deal_steps(played, processes.size, cost, micro_batch_size, num_steps)
        tokens = [sum(chunk_tokens(played[i]) for i in rows) for rows in order]
        return [(order, even, tokens, [played[i] for i in rows]) for rows in order]

    order, even, tokens, own = processes.deal_out(make)
    return Shares(order, own, everybodys, played, even, tokens)


def chunk_tokens(trace: Trace) -> int:
    """Tokens that are forwarded to train on a trace: each chunk under its own prompt."""
    return sum(len(c.prompt_ids) + len(c.output_ids) for c in trace.chunks if c.output_ids)


def _deal_steps(
    traces: list[Trace],
    num_processes: int,
    cost: Callable[[Trace], float],
    micro_batch_size: int,
    num_steps: int,
) -> tuple[Order, Load]:
    costs = [cost(trace) for trace in traces]
    if num_processes == 1:
        order = in_order(len(traces), 1)
        return order, load(order, costs, micro_batch_size)
    size = len(traces) // num_steps
    whole: Order = [[] for _ in range(num_processes)]
    for first in range(0, len(traces), size):
        dealt = deal(costs[first : first + size], num_processes, micro_batch_size)
        for own, rows in zip(whole, dealt, strict=True):
            own += [first + i for i in rows]
    return whole, load(whole, costs, micro_batch_size)
