"""Detection of thinking that repeats itself."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from delethink.errors import ConfigError
from delethink.tokens import TokenIds

_MAX_PATTERN_SIZE = 1024  # tokens; every token is compared with as many before it


@dataclass(frozen=True)
class LoopRule:
    """Definition of a loop: a pattern of tokens, repeated without a gap.

    The names are those of vLLM's ``repetition_detection``.

    Raises:
        ConfigError: a size or the count is out of range.
    """

    max_pattern_size: int = 64  # tokens
    min_pattern_size: int = 1
    min_count: int = 8  # repeats in a row

    def __post_init__(self) -> None:
        sizes = 1 <= self.min_pattern_size <= self.max_pattern_size <= _MAX_PATTERN_SIZE
        if not sizes or self.min_count < 2:
            raise ConfigError(
                "a loop needs 1 <= min_pattern_size <= max_pattern_size <= "
                f"{_MAX_PATTERN_SIZE} and min_count >= 2, got {self}"
            )


class LoopDetector:
    """Finds the first repeated pattern in a stream of tokens."""

    def __init__(self, rule: LoopRule) -> None:
        self._rule = rule
        self._last: deque[int] = deque(maxlen=rule.max_pattern_size)  # the newest first
        self._equal = [0] * rule.max_pattern_size  # tokens in a row that equal the one s before

    def push(self, token: int) -> int:
        """Add a token, and return the tokens of the pattern whose loop it completes, or 0."""
        equal, found = self._equal, 0
        for distance, earlier in enumerate(self._last, start=1):
            count = equal[distance - 1] + 1 if earlier == token else 0
            equal[distance - 1] = count
            if (
                count >= distance * (self._rule.min_count - 1)
                and distance >= self._rule.min_pattern_size
            ):
                found = found or distance
        self._last.appendleft(token)
        return found


def without_repeats(ids: TokenIds, pattern_tokens: int) -> TokenIds:
    """Return tokens up to the first occurrence of the pattern that they end with."""
    end = len(ids)
    while end >= 2 * pattern_tokens:
        last = ids[end - pattern_tokens : end]
        if last != ids[end - 2 * pattern_tokens : end - pattern_tokens]:
            break
        end -= pattern_tokens
    return ids[:end]
