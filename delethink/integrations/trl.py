"""Rewards of this library as reward functions of an unmodified ``trl.GRPOTrainer``.

    GRPOTrainer(reward_funcs=[for_trl(math_equal), for_trl(overlong, budget=4096, cache=512)], ...)

The other direction needs no adapter: a recipe can name a reward function written for TRL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from delethink.errors import ConfigError
from delethink.rows import MISSING, accepted_answers, value_at
from delethink.scoring.pool import shared_pool
from delethink.scoring.reward import Reward
from delethink.scoring.scorer import Scorer
from delethink.types import ACCEPTED_ANSWERS, Attempt, Problem, TraceStop

_GOLD_COLUMNS = ("answer", "solution", "ground_truth", "target", "reward_model.ground_truth")
_TRL_ARGUMENTS = {"trainer_state", "log_extra", "log_metric", "environments"}


def for_trl(
    function: Callable[..., Any],
    *,
    accuracy: Callable[..., Any] | None = None,
    answer_column: str | None = None,
    budget: int | None = None,
    **args: Any,
) -> TrlReward:
    """Return a reward function for ``GRPOTrainer``.

    A reward that cannot be computed is ``None``, which TRL leaves out of the mean, and counts in
    the metric ``verifier/errors``. The dataset may have a column ``metadata``. A gold answer may be
    a number or a list of accepted answers; a row without one is ``None``.

    Args:
        function: Reward function of this library, or of the same kind.
        accuracy: Reward function that decides right or wrong, for a ``function`` with the parameter
            ``correct``.
        answer_column: Column of the gold answers; by default the first existing one of ``answer``,
            ``solution``, ``ground_truth``, ``target`` and ``reward_model.ground_truth``; ``a.b`` is
            the key ``b`` inside a column ``a``.
        budget: Maximum tokens of a completion, for rewards of length; by default the longest
            completion of the batch.
        args: Settings of the reward.

    Raises:
        UserError: The reward cannot be computed on this machine, or a setting is missing.
    """
    reward = Reward(function.__name__, function, args=args)
    reward.check()
    rewards = [reward]
    if reward.needs_correctness:
        if accuracy is None:
            raise ConfigError(
                f"{reward.name} has the parameter 'correct': give the function that decides right "
                "or wrong with accuracy="
            )
        rewards.append(Reward(f"accuracy of {reward.name}", accuracy, weight=0.0))
    return TrlReward(tuple(rewards), answer_column, budget)


class TrlReward:
    """Asynchronous reward function, called by TRL with the columns of a batch."""

    def __init__(
        self, rewards: tuple[Reward, ...], answer_column: str | None, budget: int | None
    ) -> None:
        self._rewards, self._answer_column, self._budget = rewards, answer_column, budget
        self.__name__ = rewards[0].name

    async def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Return the reward of each completion; ``None`` where it cannot be computed."""
        ids = completion_ids or [()] * len(completions)
        budget = self._budget or max(map(len, ids), default=1) or 1
        gold = _gold_answers(columns, self._answer_column, len(prompts))
        metadata = columns.get("metadata") or [{}] * len(prompts)
        attempts = [
            Attempt(
                problem=_problem(prompt, answers, extra or {}),
                text=_text(completion),
                stop=TraceStop.COMPLETED,
                length=len(own_ids),
                num_chunks=1,
                budget=budget,
                max_chunks=1,
                output_ids=tuple(own_ids),
            )
            for prompt, completion, own_ids, answers, extra in zip(
                prompts, completions, ids, gold, metadata, strict=True
            )
        ]
        with Scorer(self._rewards, self._rewards[-1].name, pool=shared_pool()) as scorer:
            scores = await scorer.score(attempts)
        if log_metric is not None:
            log_metric("verifier/errors", float(sum(bool(score.errors) for score in scores)))
        parts = [score.parts[self.__name__] for score in scores]
        reads_gold = any("answer" in r.arguments(a) for r in self._rewards for a in attempts[:1])
        return [
            part if answers or not reads_gold else None
            for part, answers in zip(parts, gold, strict=True)
        ]


def _problem(prompt: Any, answers: Sequence[str], metadata: Mapping[str, Any]) -> Problem:
    several = {ACCEPTED_ANSWERS: list(answers)} if len(answers) > 1 else {}
    return Problem(_text(prompt), answers[0] if answers else "", {**metadata, **several})


def _gold_answers(
    columns: Mapping[str, Any], answer_column: str | None, number: int
) -> list[tuple[str, ...]]:
    """Return the accepted answers of each row; none where the row has no gold answer."""
    listed = {n: c for n, c in columns.items() if isinstance(c, (list, tuple)) and len(c) == number}
    rows = [{name: column[i] for name, column in listed.items()} for i in range(number)]
    candidates = (answer_column,) if answer_column else _GOLD_COLUMNS
    for name in candidates:
        gold = [value_at(row, name) for row in rows]
        if gold and all(value is not MISSING for value in gold):
            try:
                return [accepted_answers(value, as_mathematics=False) for value in gold]
            except ValueError as error:
                raise ConfigError(f"the column {name!r}: {error}") from None
    existing = ", ".join(sorted(set(columns) - _TRL_ARGUMENTS)) or "none"
    raise ConfigError(
        f"the dataset has no column {' or '.join(candidates)} with gold answers, only {existing}: "
        "name one with answer_column="
    )


def _text(value: Any) -> str:
    """Return a string, or the content of the last message of a conversation."""
    return value if isinstance(value, str) else str(value[-1]["content"])
