"""Which problem comes next: a cursor of its own, so that a run can be taken up where it stood."""

from __future__ import annotations

from typing import Any


class PromptCursor:
    """Hands out the training problems of a run, each once, in order.

    More are taken than steps need where a problem is replaced, so where a run stands is not a
    matter of steps.
    """

    def __init__(self) -> None:
        self.next = 0  # the first problem that nobody has taken

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
