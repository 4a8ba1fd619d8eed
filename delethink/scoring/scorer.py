"""Weighted sum of named rewards, with the value of each reward.

Two settings handle traces without budget left and failed traces or rewards, so reward functions
need no code for these cases.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from delethink.errors import ConfigError, UserError, did_you_mean
from delethink.registry import resolve
from delethink.scoring.pool import Verdict, VerifierPool, VerifierSettings
from delethink.scoring.reasons import describe
from delethink.scoring.reward import POOL_INPUT, Reward
from delethink.tokens import as_list
from delethink.types import Attempt, Score, TraceStop


@dataclass(frozen=True)
class ScoringRules:
    """Exceptions from the weighted sum."""

    # score of a trace that used up its budget: ``"zero"`` for 0, ``"penalty"`` for the sum minus
    # ``penalty``, ``"score"`` for the sum
    out_of_budget: str = "score"
    penalty: float = 1.0  # see ``out_of_budget``
    # score of a failed trace, or of a trace with a failed reward. ``None`` excludes the trace from
    # training and averages.
    error: float | None = None


class Scorer:
    """Scores attempts with named rewards, concurrently and while other traces are sampled.

    The scorer may own processes: close it, or use it as a context manager.

    Args:
        rewards: the rewards, with different names.
        accuracy: name of the reward for right (1) or wrong (0), the input ``correct`` of others; by
            default the first.
        rules: scores for used-up budgets and failures.
        settings: settings of the verifiers.
        pool: verifiers of another scorer; by default the scorer has its own.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        accuracy: str | None = None,
        rules: ScoringRules = ScoringRules(),
        settings: VerifierSettings | None = None,
        pool: VerifierPool | None = None,
    ) -> None:
        names = [reward.name for reward in rewards]
        accuracy = accuracy or (names[0] if names else "")
        if accuracy not in names or len(set(names)) < len(names):
            raise ConfigError(
                "rewards need different names, and the accuracy reward must be one of them: got "
                f"{names} and {accuracy!r}.{did_you_mean(accuracy, names)}"
            )
        self.rewards, self.accuracy, self.rules = tuple(rewards), accuracy, rules
        self._first = [r for r in rewards if r.kind != "trl" and not r.needs_correctness]
        self._second = [r for r in rewards if r.needs_correctness]
        if any(reward.name == accuracy for reward in self._second):
            raise ConfigError(
                f"the reward {accuracy!r} uses the accuracy reward and cannot be the accuracy "
                "reward itself; set evaluation.reward to another one"
            )
        self._batched = [r for r in rewards if r.kind == "trl"]
        self.pool = pool or VerifierPool(settings or VerifierSettings())
        self._owns_pool = pool is None
        self._threads = ThreadPoolExecutor(self.pool.num_verifiers, "delethink-reward")

    async def score(self, attempts: Sequence[Attempt]) -> list[Score]:
        """Return the scores of ``attempts``, in order."""
        return await self.finish(attempts, [self.parts(attempt) for attempt in attempts])

    def score_now(self, attempts: Sequence[Attempt]) -> list[Score]:
        """Return the scores of ``attempts`` for callers without an event loop."""
        return asyncio.run(self.score(attempts))

    async def parts(self, attempt: Attempt) -> dict[str, Verdict]:
        """Compute the rewards of one trace; none for a failed trace.

        Call this when a trace ends, and pass the results of all traces to ``finish``.
        """
        if attempt.stop.is_failure:
            return {}
        first = await self._compute(self._first, attempt, None)
        return await self._add_second(attempt, first)

    async def finish(
        self, attempts: Sequence[Attempt], parts: Sequence[Awaitable[dict[str, Verdict]]]
    ) -> list[Score]:
        """Compute the rewards of the whole batch and return the scores."""
        known = await asyncio.gather(*parts)
        scored = [i for i, attempt in enumerate(attempts) if not attempt.stop.is_failure]
        for reward in self._batched:
            column = await self._compute_batch(reward, [attempts[i] for i in scored])
            for i, part in zip(scored, column, strict=True):
                known[i][reward.name] = part
        for i in scored:
            known[i] = await self._add_second(attempts[i], known[i])
        return list(map(self._sum, attempts, known))

    async def _add_second(self, attempt: Attempt, known: dict[str, Verdict]) -> dict[str, Verdict]:
        """Compute the rewards that need the accuracy, if it is known and they are not."""
        missing = [reward for reward in self._second if reward.name not in known]
        accuracy = known.get(self.accuracy)
        if not missing or accuracy is None or accuracy.status != "ok":
            return known
        return known | await self._compute(missing, attempt, accuracy.value)

    def close(self) -> None:
        """Kill the verifiers owned by this scorer."""
        if self._owns_pool:
            self.pool.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _compute(
        self, rewards: Sequence[Reward], attempt: Attempt, correct: float | None
    ) -> dict[str, Verdict]:
        found = await asyncio.gather(*(self._compute_one(r, attempt, correct) for r in rewards))
        return {reward.name: part for reward, part in zip(rewards, found, strict=True)}

    async def _compute_one(
        self, reward: Reward, attempt: Attempt, correct: float | None
    ) -> Verdict:
        """Compute a reward. Of several accepted answers, the one with the best verdict counts."""
        arguments = reward.arguments(attempt, correct)
        if "answer" not in arguments or len(attempt.problem.accepted) < 2:
            return await self._compute_with(reward, arguments)
        verdicts = []
        for answer in attempt.problem.accepted:
            verdict = await self._compute_with(reward, arguments | {"answer": answer})
            if verdict.status == "ok" and verdict.value == 1.0:
                return verdict
            verdicts.append(verdict)
        # An answer that could not be compared might have been the right one.
        failed = [verdict for verdict in verdicts if verdict.status != "ok"]
        values = [-math.inf if verdict.value is None else verdict.value for verdict in verdicts]
        return failed[0] if failed else verdicts[values.index(max(values))]

    async def _compute_with(self, reward: Reward, arguments: dict[str, Any]) -> Verdict:
        if reward.needs_sandbox:
            arguments[POOL_INPUT] = self.pool.run_program
        try:
            if reward.kind == "isolated":
                verdict = await asyncio.wrap_future(self.pool.submit(reward.function, arguments))
                if verdict.status != "ok":
                    return verdict
                return _to_verdict(verdict.value)._replace(reason=verdict.reason)
            if reward.kind == "async":
                return _to_verdict(await reward.function(**arguments))
            call = partial(reward.function, **arguments)
            if reward.kind == "light":
                return _to_verdict(call())
            loop = asyncio.get_running_loop()
            return _to_verdict(await loop.run_in_executor(self._threads, call))
        except UserError:
            raise
        except Exception as error:  # a grader may raise anything
            return Verdict("error", None, describe(error))

    async def _compute_batch(self, reward: Reward, attempts: Sequence[Attempt]) -> list[Verdict]:
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
        except Exception as error:  # a grader may raise anything
            return [Verdict("error", None, describe(error))] * len(attempts)
        return [_to_verdict(value) for value in values]

    def _sum(self, attempt: Attempt, parts: Mapping[str, Verdict]) -> Score:
        values = {r.name: parts[r.name].value if r.name in parts else None for r in self.rewards}
        errors = {k: f"{v.status}: {v.reason}" for k, v in parts.items() if v.status != "ok"}
        zeroed = {k: v.reason for k, v in parts.items() if v.status == "ok" and v.reason}
        if attempt.stop.is_failure or errors:
            return Score(self.rules.error, values, errors, zeroed)
        weighted = [r.weight * v for r in self.rewards if (v := values[r.name]) is not None]
        if not weighted:
            return Score(None, values)
        total = math.fsum(weighted)
        if attempt.stop is TraceStop.BUDGET and self.rules.out_of_budget == "zero":
            total = 0.0
        elif attempt.stop is TraceStop.BUDGET and self.rules.out_of_budget == "penalty":
            total -= self.rules.penalty
        return Score(total, values, zeroed=zeroed)


def make_scorer(
    rewards: Mapping[str, Any],
    accuracy: str,
    scoring: Any,
    pool: VerifierPool | None = None,
) -> Scorer:
    """Create a scorer from a ``RewardConfig`` for each name and a ``ScoringConfig``.

    ``accuracy`` and ``pool`` are those of ``Scorer``.

    Raises:
        UserError: a reward is unknown, lacks a setting or a package, or cannot run here.
    """
    made = []
    for name, config in rewards.items():
        function = resolve("delethink.rewards", config.reward or name)
        reward = Reward(name, function, config.weight, config.args, config.isolated)
        reward.check(scoring.allow_unsafe_code)
        made.append(reward)
    rules = ScoringRules(scoring.out_of_budget, scoring.penalty, scoring.error)
    settings = VerifierSettings(
        scoring.num_verifiers,
        scoring.timeout,
        scoring.memory_mb,
        allow_unsafe_code=scoring.allow_unsafe_code,
    )
    return Scorer(made, accuracy, rules, settings, pool)


def trl_columns(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Return the arguments of TRL's reward functions.

    The gold answer is in ``answer`` and ``solution``. Metadata keys common to all problems are
    further columns.
    """
    columns: dict[str, Any] = {
        "prompts": [attempt.problem.messages for attempt in attempts],
        "completions": [[{"role": "assistant", "content": a.text}] for a in attempts],
        "completion_ids": [as_list(attempt.output_ids) for attempt in attempts],
        "answer": [attempt.problem.answer for attempt in attempts],
        "solution": [attempt.problem.answer for attempt in attempts],
        "trainer_state": None,
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
    }
    shared = set.intersection(*(set(a.problem.metadata) for a in attempts)) - set(columns)
    return columns | {k: [a.problem.metadata[k] for a in attempts] for k in sorted(shared)}


def _to_verdict(value: Any) -> Verdict:
    """Return the verdict of a reward's value. Only finite numbers and ``None`` are allowed."""
    try:
        number = None if value is None else float(value)
    except (TypeError, ValueError):
        reason = f"a reward must be a number or None, got {type(value).__name__}"
        return Verdict("error", None, reason)
    if number is not None and not math.isfinite(number):
        return Verdict("error", None, f"a reward must be finite, got {number}")
    return Verdict("ok", number)
