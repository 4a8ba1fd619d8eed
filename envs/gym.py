"""Tasks of reasoning-gym (arXiv 2505.24760), scored by its own scorers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from delethink.errors import ConfigError, MissingExtraError, did_you_mean
from delethink.tasks import check_split
from delethink.types import END_OF_THINKING, Problem

TEMPLATE = (
    "{problem}\n\nThink step by step. Then write your final answer, and nothing else, between "
    "<answer> and </answer>."
)
_HELD_OUT_ONE_IN = 5  # one question in five is held out
_MAX_TRIES = 200


@dataclass(frozen=True)
class GymTask:
    """A task of reasoning-gym, unlimited and split by question.

    A question belongs to one split. A task with few different questions repeats them.

    Attributes:
        member: the name in reasoning-gym: NAME of reasoning_gym/NAME.
        seed: seed of the problems.
        config: settings of the task in reasoning-gym, such as its difficulty.
        template: the prompt, with ``{problem}`` in place of the question.
    """

    member: str
    seed: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    template: str = TEMPLATE
    rewards: Mapping[str, float] = field(default_factory=lambda: {"reasoning_gym": 1.0}, init=False)

    def __post_init__(self) -> None:
        if "{problem}" not in self.template:
            raise ConfigError(f"the template {self.template!r} must contain {{problem}}")
        self._make(0)

    def problem(self, split: str, index: int) -> Problem:
        """Return problem ``index`` of ``split``.

        Raises:
            ConfigError: the task has too few different questions for two splits.
        """
        check_split(split)
        for attempt in range(_MAX_TRIES):
            entry = self._make(_hash(f"{self.seed}/{split}/{index}/{attempt}"))[0]
            if (_hash(entry["question"]) % _HELD_OUT_ONE_IN == 0) == (split == "heldout"):
                return Problem(
                    self.template.replace("{problem}", entry["question"]),
                    str(entry["answer"]),
                    {"dataset": self.member, "config": dict(self.config), "entry": entry},
                )
        raise ConfigError(
            f"reasoning_gym/{self.member} created no question of the split {split!r} in "
            f"{_MAX_TRIES} tries: it has too few different questions; widen its config"
        )

    def demonstrations(self, problem: Problem) -> tuple[str | None, str]:
        """Return the task's own answer to the question, and a wrong answer."""
        gold = problem.metadata["entry"]["answer"]
        answer = f"Let me see.{END_OF_THINKING}<answer>%s</answer>"
        return (None if gold is None else answer % gold), answer % "certainly not this"

    def _make(self, seed: int) -> Any:
        """Return a data set of one question."""
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError:
            raise MissingExtraError("reasoning-gym", "tasks") from None
        name = self.member
        if name not in DATASETS:
            raise ConfigError(f"reasoning-gym has no task {name!r}.{did_you_mean(name, DATASETS)}")
        try:
            return reasoning_gym.create_dataset(name, **self.config, seed=seed, size=1)
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(f"invalid config of reasoning_gym/{name}: {error}") from None


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1
