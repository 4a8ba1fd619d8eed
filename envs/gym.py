"""Every task of reasoning-gym (arXiv 2505.24760) by name: made here, scored by its own scorer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from delethink.errors import ConfigError, MissingExtraError, did_you_mean
from delethink.tasks import check_split
from delethink.types import END_OF_THINKING, Problem

TEMPLATE = (
    "{problem}\n\nThink step by step. Then write your final answer, and nothing else, between "
    "<answer> and </answer>."
)
_HELD_OUT_SHARE = 5  # one question in five is held out
_MOST_TRIES = 200


@dataclass(frozen=True)
class GymTask:
    """A task of reasoning-gym, indexable without end and split by question.

    A question belongs to the held-out split or to the training split for good. A task with few
    different questions repeats them.

    Args:
        member: the name in reasoning-gym.
        seed: of all problems.
        config: the task's own settings.
        template: how a question is asked; ``{problem}`` stands for it.
    """

    member: str
    seed: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    template: str = TEMPLATE
    rewards: Mapping[str, float] = field(default_factory=lambda: {"reasoning_gym": 1.0}, init=False)

    def __post_init__(self) -> None:
        if "{problem}" not in self.template:
            raise ConfigError(f"the template {self.template!r} has no {{problem}}")
        self._make(0)

    def problem(self, split: str, index: int) -> Problem:
        """Problem ``index`` of ``split``; the same for ever.

        Raises:
            ConfigError: the task makes too few different questions for two splits.
        """
        check_split(split)
        for attempt in range(_MOST_TRIES):
            entry = self._make(_hash(f"{self.seed}/{split}/{index}/{attempt}"))[0]
            if (_hash(entry["question"]) % _HELD_OUT_SHARE == 0) == (split == "heldout"):
                return Problem(
                    self.template.replace("{problem}", entry["question"]),
                    str(entry["answer"]),
                    {"dataset": self.member, "config": dict(self.config), "entry": entry},
                )
        raise ConfigError(
            f"reasoning_gym/{self.member} made no question of the split {split!r} in {_MOST_TRIES} "
            "tries: it has too few different ones; widen its config"
        )

    def demonstrations(self, problem: Problem) -> tuple[str | None, str]:
        """The answer that the task gives for its own question, and one that is none."""
        gold = problem.metadata["entry"]["answer"]
        say = f"Let me see.{END_OF_THINKING}<answer>%s</answer>"
        return (None if gold is None else say % gold), say % "certainly not this"

    def _make(self, seed: int) -> Any:
        """A data set of one question."""
        name, config = self.member, dict(self.config)
        try:
            return self._gym.create_dataset(name, **config, seed=seed, size=1)
        except (TypeError, ValueError, AssertionError) as error:
            if name not in self._names:
                raise ConfigError(
                    f"reasoning-gym has no task {name!r}.{did_you_mean(name, self._names)}"
                ) from None
            raise ConfigError(f"the config of reasoning_gym/{name}: {error}") from None

    @cached_property
    def _gym(self) -> Any:
        try:
            import reasoning_gym
        except ImportError:
            raise MissingExtraError("reasoning-gym", "tasks") from None
        return reasoning_gym

    @property
    def _names(self) -> list[str]:
        from reasoning_gym.factory import DATASETS

        return sorted(DATASETS)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1
