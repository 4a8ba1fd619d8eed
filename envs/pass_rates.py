"""Keeps problems of the right difficulty, by pass rates that were measured.

Rates come from a column of the data set, or from a file of JSON lines: either with ``prompt`` and
``pass_rate``, or scored traces with ``prompt`` and ``rewards`` (``traces/`` of a run), of which the
mean of the first reward is taken for each prompt.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from delethink.envs.sources import Row, read_rows
from delethink.errors import ConfigError, did_you_mean
from delethink.types import Problem


@dataclass(frozen=True)
class PassRates:
    """The range to keep, and the measured rates by prompt."""

    MARK: ClassVar[str] = "delethink_pass_rate"

    key: str | None = None
    by_prompt: Mapping[str, float] | None = None
    least: float = 0.0
    most: float = 1.0

    @classmethod
    def read(cls, key: str | None, path: str | None, least: float, most: float) -> PassRates:
        """What the settings say.

        Raises:
            ConfigError: a range that is none, one without rates, or a file without rates.
        """
        if not 0 <= least <= most <= 1:
            raise ConfigError(
                f"pass rates must satisfy 0 <= min_pass_rate <= max_pass_rate <= 1, got {least} "
                f"and {most}"
            )
        if key is None and path is None and (least, most) != (0.0, 1.0):
            raise ConfigError(
                "min_pass_rate and max_pass_rate need measured rates: name a column with "
                "pass_rate_key, or a file with pass_rates"
            )
        return cls(key, None if path is None else _read(path), least, most)

    def mark(self, problem: Problem, row: Row) -> Problem:
        """The problem with its pass rate among its metadata, where one was measured."""
        if self.key is None and self.by_prompt is None:
            return problem
        rate = self.by_prompt.get(problem.prompt) if self.by_prompt is not None else None
        if self.key is not None:
            if self.key not in row:
                raise ConfigError(
                    f"the data set has no column {self.key!r}.{did_you_mean(self.key, row)}"
                )
            rate = None if row[self.key] is None else _number(row[self.key])
        if rate is None:
            return problem
        return replace(problem, metadata={**problem.metadata, self.MARK: rate})

    def is_unknown(self, problem: Problem) -> bool:
        """Whether rates are asked for and this problem has none."""
        asked = self.key is not None or self.by_prompt is not None
        return asked and self.MARK not in problem.metadata

    def keeps(self, problem: Problem) -> bool:
        """Whether the problem is of the right difficulty; one without a rate is not."""
        if self.key is None and self.by_prompt is None:
            return True
        rate = problem.metadata.get(self.MARK)
        return rate is not None and self.least <= rate <= self.most


def _read(path: str) -> dict[str, float]:
    files = sorted(glob.glob(str(Path(path).expanduser()))) or [path]
    seen: dict[str, list[float]] = {}
    for row in (row for file in files for row in read_rows(file, "train")):
        if "prompt" not in row or not ("pass_rate" in row or row.get("rewards")):
            raise ConfigError(
                f"{path} is no file of pass rates: a line has a prompt, and a pass_rate or "
                f"rewards; got the keys {', '.join(sorted(row)) or 'none'}"
            )
        rate = row["pass_rate"] if "pass_rate" in row else next(iter(row["rewards"].values()))
        if rate is not None:  # a trace that failed says nothing
            seen.setdefault(str(row["prompt"]), []).append(_number(rate))
    return {prompt: sum(rates) / len(rates) for prompt, rates in seen.items()}


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"a pass rate is a number, got {value!r}") from None
