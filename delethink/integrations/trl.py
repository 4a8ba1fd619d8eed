"""Our rewards as reward functions of a stock ``trl.GRPOTrainer``.

    GRPOTrainer(reward_funcs=[for_trl(math_equal), for_trl(overlong, budget=4096, cache=512)], ...)

Functions of TRL's kind need nothing to be used here: name them in a recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from delethink.errors import ConfigError
from delethink.scoring.pool import shared_pool
from delethink.scoring.reward import Reward
from delethink.scoring.scorer import Scorer
from delethink.types import Attempt, Problem, TraceStop

_GOLD = ("answer", "solution", "ground_truth", "target")
_OWN = {"trainer_state", "log_extra", "log_metric", "environments"}


def for_trl(
    function: Callable[..., Any],
    *,
    accuracy: Callable[..., Any] | None = None,
    answer_column: str | None = None,
    budget: int | None = None,
    **args: Any,
) -> TrlReward:
    """A function that ``GRPOTrainer`` takes, which computes the reward ``function``.

    Args:
        function: one of ours, or of the same kind.
        accuracy: what says right or wrong, for a ``function`` with the parameter ``correct``.
        answer_column: the dataset's column with gold answers; by default the first there is of
            ``answer``, ``solution``, ``ground_truth`` and ``target``.
        budget: the most tokens of a completion, for rewards of length; by default the longest
            completion of the batch.
        args: the reward's own settings.

    A reward that cannot be computed is ``None`` there, which TRL leaves out of the mean, and
    counted in the metric ``verifier/errors``. Rows of the dataset may have a column ``metadata``.

    Raises:
        UserError: the reward cannot be computed on this machine, or lacks a setting.
    """
    own = Reward(function.__name__, function, args=args)
    own.check()
    rewards = [own]
    if own.needs_correctness:
        if accuracy is None:
            raise ConfigError(f"{own.name} builds on right and wrong: name it with accuracy=")
        rewards.append(Reward(f"accuracy of {own.name}", accuracy, weight=0.0))
    return TrlReward(tuple(rewards), answer_column, budget)


class TrlReward:
    """What ``for_trl`` returns: called by the trainer, in its event loop, with whole columns."""

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
        """The reward of each completion; ``None`` where there is none."""
        gold = _gold(columns, self._answer_column)
        attempts = _attempts(prompts, completions, completion_ids, columns, gold, self._budget)
        accuracy = self._rewards[-1].name
        with Scorer(self._rewards, accuracy, pool=shared_pool()) as scorer:
            scores = await scorer.score(attempts)
        if log_metric is not None:
            log_metric("verifier/errors", float(sum(bool(score.errors) for score in scores)))
        return [score.parts[self.__name__] for score in scores]


def _gold(columns: Mapping[str, Any], answer_column: str | None) -> Sequence[Any]:
    named = [answer_column] if answer_column else [name for name in _GOLD if name in columns]
    if not named or named[0] not in columns:
        raise ConfigError(
            f"the dataset has no column {answer_column or ' or '.join(_GOLD)} with gold answers; "
            f"it has {', '.join(sorted(set(columns) - _OWN)) or 'none'}: name one with "
            "answer_column="
        )
    gold: Sequence[Any] = columns[named[0]]
    return gold


def _attempts(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None,
    columns: Mapping[str, Any],
    answers: Sequence[Any],
    budget: int | None,
) -> list[Attempt]:
    ids = completion_ids or [()] * len(completions)
    most = budget or max(map(len, ids), default=1) or 1
    metadata = columns.get("metadata") or [{}] * len(prompts)
    return [
        Attempt(
            problem=Problem(_text(prompt), str(gold), dict(extra or {})),
            text=_text(completion),
            stop=TraceStop.COMPLETED,
            length=len(own),
            num_chunks=1,
            budget=most,
            max_chunks=1,
            output_ids=tuple(own),
        )
        for prompt, completion, own, gold, extra in zip(
            prompts, completions, ids, answers, metadata, strict=True
        )
    ]


def _text(said: Any) -> str:
    """Of a string, or of the last message of a conversation."""
    return said if isinstance(said, str) else str(said[-1]["content"])
