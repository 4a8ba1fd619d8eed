"""The proof that every trace is trained on as often as it should be, whole, and in one step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


class Ledger:
    """Counts how often each trace of a batch was trained on.

    A trace goes into the loss with all its sampled tokens at once or not at all: its chunks are
    never in different optimizer steps.
    """

    def __init__(self) -> None:
        self._expected: dict[int, int] = {}
        self._times = 0
        self._seen: Counter[int] = Counter()

    def open(self, lengths: Mapping[int, int], times: int) -> None:
        """Starts a batch: sampled tokens of each trace, and how often each is to be trained on."""
        self._expected, self._times, self._seen = dict(lengths), times, Counter()

    def count(self, tokens: Mapping[int, int]) -> None:
        """Enters the tokens of each trace of a micro-batch.

        Raises:
            RuntimeError: a trace is not of the batch, is there in part, or was there before.
        """
        for trace, number in tokens.items():
            if number != self._expected.get(trace):
                raise RuntimeError(
                    f"{number} tokens of trace {trace} are in the loss, but "
                    f"{self._expected.get(trace, 'none')} were sampled"
                )
            self._seen[trace] += 1
            if self._seen[trace] > self._times:
                raise RuntimeError(
                    f"trace {trace} is trained on {self._seen[trace]} times instead of "
                    f"{self._times}"
                )

    def close(self) -> None:
        """Ends a batch.

        Raises:
            RuntimeError: a trace was dropped, or trained on less often than it should have been.
        """
        missing = [t for t in self._expected if self._seen[t] != self._times]
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(self._expected)} traces were not trained on "
                f"{self._times} times; the first: trace {missing[0]}, {self._seen[missing[0]]}"
            )
