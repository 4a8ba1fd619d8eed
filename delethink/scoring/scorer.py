"""Adds up rewards: named, weighted by the recipe, the breakdown always kept.

What happens to a trace that ran out of budget, and to one that failed or whose reward could not be
computed, are two settings here, so that no reward has to know of it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from delethink.errors import ConfigError, UserError, did_you_mean
from delethink.registry import resolve
from delethink.scoring.pool import VerifierPool, VerifierSettings
from delethink.scoring.reward import Reward
from delethink.types import Attempt, Score, TraceStop


@dataclass(frozen=True)
class Rules:
    """What stands in the place of the weighted sum.

    Args:
        out_of_budget: of a trace that ran out of budget: ``"zero"`` for 0, ``"penalty"`` for the
            sum less ``penalty``; anything else scores it as any other.
        penalty: see there.
        error: for a trace that failed, or of which a reward could not be computed; ``None`` gives
            it no reward, so that it counts neither for nor against anything.
    """

    out_of_budget: str = "score"
    penalty: float = 1.0
    error: float | None = None

    def apply(self, attempt: Attempt, earned: float | None) -> float | None:
        """What a trace that did not fail is given, of what its rewards add up to."""
        if attempt.stop is not TraceStop.BUDGET or earned is None:
            return earned
        if self.out_of_budget == "zero":
            return 0.0
        return earned - self.penalty if self.out_of_budget == "penalty" else earned


_DEFAULTS = VerifierSettings()


class Part(NamedTuple):
    """What one reward said of one attempt."""

    value: float | None = None
    error: str | None = None


class Scorer:
    """Scores attempts with named rewards; many at a time, while others are still being sampled.

    Args:
        rewards: by their names in the recipe.
        accuracy: which of them says right or wrong: what rewards with a parameter ``correct`` see.
        rules: of budget and errors.
        settings: of the workers for rewards that may hang.
        pool: workers to share; without it the scorer has its own.

    Use it as a context manager, or close it: it may own processes.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        accuracy: str | None = None,
        rules: Rules = Rules(),
        settings: VerifierSettings = _DEFAULTS,
        pool: VerifierPool | None = None,
    ) -> None:
        names = [reward.name for reward in rewards]
        accuracy = accuracy or (names[0] if names else "")
        if accuracy not in names or len(set(names)) < len(names):
            raise ConfigError(
                f"rewards need names of their own, the accuracy reward's among them: got {names} "
                f"and {accuracy!r}.{did_you_mean(accuracy, names)}"
            )
        self.rewards, self.accuracy, self.rules = tuple(rewards), accuracy, rules
        self._first = [r for r in rewards if r.kind != "trl" and not r.needs_correctness]
        self._second = [r for r in rewards if r.needs_correctness]
        if accuracy in [reward.name for reward in self._second]:
            raise ConfigError(
                f"the reward {accuracy!r} builds on the accuracy reward and cannot be it; name "
                "another with evaluation.reward"
            )
        self._whole = [r for r in rewards if r.kind == "trl"]
        self.pool, self._owns_pool = pool or VerifierPool(settings), pool is None
        self._threads = ThreadPoolExecutor(self.pool.num_workers, "delethink-reward")

    async def score(self, attempts: Sequence[Attempt]) -> list[Score]:
        """The scores of ``attempts``, in their order."""
        return await self.finish(attempts, [self.parts(attempt) for attempt in attempts])

    def score_now(self, attempts: Sequence[Attempt]) -> list[Score]:
        """``score``, for callers that have no event loop."""
        return asyncio.run(self.score(attempts))

    async def parts(self, attempt: Attempt) -> dict[str, Part]:
        """What the rewards that look at one trace alone say; nothing of a trace that failed.

        To be called when a trace has ended, and handed to ``finish`` when all have.
        """
        if attempt.stop.is_failure:
            return {}
        first = await self._compute(self._first, attempt, None)
        accuracy = first.get(self.accuracy, Part())
        if accuracy.error is not None:
            return first
        if self._second and self.accuracy in [reward.name for reward in self._whole]:
            return first  # its value is not known yet
        return first | await self._compute(self._second, attempt, accuracy.value)

    async def finish(
        self, attempts: Sequence[Attempt], parts: Sequence[Awaitable[dict[str, Part]]]
    ) -> list[Score]:
        """Adds the rewards that look at the whole batch, and sums up."""
        known = await asyncio.gather(*parts)
        scored = [i for i, attempt in enumerate(attempts) if not attempt.stop.is_failure]
        for reward in self._whole:
            column = await self._compute_whole(reward, [attempts[i] for i in scored])
            for i, part in zip(scored, column, strict=True):
                known[i][reward.name] = part
        for i in scored:
            known[i] = await self._late(attempts[i], known[i])
        return [self._sum(*pair) for pair in zip(attempts, known, strict=True)]

    async def _late(self, attempt: Attempt, known: dict[str, Part]) -> dict[str, Part]:
        missing = [reward for reward in self._second if reward.name not in known]
        correct = known.get(self.accuracy, Part())
        if not missing or correct.error is not None:
            return known
        return known | await self._compute(missing, attempt, correct.value)

    def close(self) -> None:
        """Ends the workers."""
        if self._owns_pool:
            self.pool.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _compute(
        self, rewards: Sequence[Reward], attempt: Attempt, correct: float | None
    ) -> dict[str, Part]:
        found = await asyncio.gather(*(self._part(r, attempt, correct) for r in rewards))
        return {reward.name: part for reward, part in zip(rewards, found, strict=True)}

    async def _part(self, reward: Reward, attempt: Attempt, correct: float | None) -> Part:
        arguments = reward.arguments(attempt, correct)
        try:
            if reward.kind == "isolated":
                verdict = await asyncio.wrap_future(self.pool.submit(reward.function, arguments))
                if verdict.status == "ok":
                    return _checked(verdict.value)
                return Part(None, f"{verdict.status}: {verdict.reason}")
            if reward.kind == "async":
                return _checked(await reward.function(**arguments))
            if reward.kind == "light":
                return _checked(reward.function(**arguments))
            loop = asyncio.get_running_loop()
            call = lambda: reward.function(**arguments)  # noqa: E731 - runs in a thread
            return _checked(await loop.run_in_executor(self._threads, call))
        except UserError:
            raise
        except Exception as error:  # the boundary between the library and any grader
            return Part(None, f"error: {type(error).__name__}: {error}")

    async def _compute_whole(self, reward: Reward, attempts: Sequence[Attempt]) -> list[Part]:
        if not attempts:
            return []
        columns = trl_columns(attempts) | dict(reward.args)
        try:
            values = reward.function(**columns)
            if asyncio.iscoroutine(values):
                values = await values
            if len(values) != len(attempts):
                raise ValueError(f"{len(values)} rewards for {len(attempts)} completions")
        except UserError:
            raise
        except Exception as error:  # the boundary between the library and any grader
            return [Part(None, f"error: {type(error).__name__}: {error}")] * len(attempts)
        return [_checked(value) for value in values]

    def _sum(self, attempt: Attempt, parts: Mapping[str, Part]) -> Score:
        values = {r.name: parts.get(r.name, Part()).value for r in self.rewards}
        errors = {name: part.error for name, part in parts.items() if part.error is not None}
        if attempt.stop.is_failure or errors:
            return Score(self.rules.error, values, errors)
        earned = [r.weight * v for r in self.rewards if (v := values[r.name]) is not None]
        total = self.rules.apply(attempt, math.fsum(earned) if earned else None)
        return Score(total, values, errors)


def make_scorer(
    rewards: Mapping[str, Any],
    accuracy: str,
    scoring: Any,
    pool: VerifierPool | None = None,
) -> Scorer:
    """Return a scorer of these rewards, with the verifiers of ``pool`` or its own.

    Args:
        rewards: a ``RewardConfig`` for each name.
        accuracy: the name of the reward that says right (1) or wrong (0).
        scoring: a ``ScoringConfig``.
        pool: verifiers that another scorer owns.

    Raises:
        UserError: a reward is unknown, lacks a setting or a package, or cannot run here.
    """
    made = []
    for name, config in rewards.items():
        function = resolve("delethink.rewards", config.reward or name)
        reward = Reward(name, function, config.weight, config.args, config.isolated)
        reward.check()
        made.append(reward)
    rules = Rules(scoring.out_of_budget, scoring.penalty, scoring.error)
    settings = VerifierSettings(scoring.num_verifiers, scoring.timeout, scoring.memory_mb)
    return Scorer(made, accuracy, rules, settings, pool)


def trl_columns(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """The columns that TRL calls reward functions with.

    The gold answer is there as ``answer`` and as ``solution``, and whatever all problems have in
    their metadata under its own name.
    """
    columns: dict[str, Any] = {
        "prompts": [attempt.problem.messages for attempt in attempts],
        "completions": [[{"role": "assistant", "content": a.text}] for a in attempts],
        "completion_ids": [list(attempt.output_ids) for attempt in attempts],
        "answer": [attempt.problem.answer for attempt in attempts],
        "solution": [attempt.problem.answer for attempt in attempts],
        "trainer_state": None,
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
    }
    shared = set.intersection(*(set(a.problem.metadata) for a in attempts)) - set(columns)
    return columns | {k: [a.problem.metadata[k] for a in attempts] for k in sorted(shared)}


def _checked(value: Any) -> Part:
    if value is None:
        return Part()
    try:
        number = float(value)
    except (TypeError, ValueError):
        return Part(None, f"error: a reward is a number or None, got {type(value).__name__}")
    if not math.isfinite(number):
        return Part(None, f"error: a reward is a finite number, got {number}")
    return Part(number)
