"""Which problem comes next: a cursor of its own, so that a run can be taken up where it stood."""

from __future__ import annotations

from typing import Any


class PromptCursor:
    """Hands out the training problems of a run, each once, in order.

    A trainer's rows are slots: each batch of slots takes the next problems, and more may be taken
    between batches, where a problem is replaced. So where a run stands is not a matter of steps.

    Args:
        problems_per_batch: problems of a batch of sampling, over all processes.
    """

    def __init__(self, problems_per_batch: int) -> None:
        self.next = 0  # the first problem that nobody has taken
        self._per_batch = problems_per_batch

    def fill(self, slots: list[int]) -> list[int]:
        """The problems for the slots of a batch, of this process; the batch is taken with that.

        Args:
            slots: numbers of rows, of one batch: batch k has ``k * problems_per_batch`` and so on.
        """
        first = min(slots) // self._per_batch * self._per_batch
        filled = [self.next + slot - first for slot in slots]
        self.take(self._per_batch)
        return filled

    def take(self, number: int) -> list[int]:
        """The next ``number`` problems."""
        taken = list(range(self.next, self.next + number))
        self.next += number
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.next = int(state["next"])
