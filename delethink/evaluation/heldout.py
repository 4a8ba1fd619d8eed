"""Plays held-out problems against an engine and sums up what came out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from delethink.chunking import ChunkSpec
from delethink.errors import ConfigError, RolloutError
from delethink.evaluation.metrics import Interval, mean_interval, wilson
from delethink.policy import Policy, Sampling
from delethink.rollout import derive_seed
from delethink.scoring.rollouts import run_scored_rollouts
from delethink.scoring.scorer import Scorer
from delethink.tokenization import Tokenizer, query_ids
from delethink.types import Problem, Score, Trace, TraceStop


@dataclass(frozen=True)
class Summary:
    """One row of a table: one trace for each problem."""

    setting: str
    num_problems: int
    accuracy: float
    accuracy_interval: Interval  # 95 %, Wilson
    thinking_tokens: float  # mean of l(tau)
    thinking_tokens_interval: Interval  # 95 %, normal
    chunks: float  # mean number of chunks
    budget_share: float  # share of traces that ran out of budget
    unscored: int = 0  # traces whose reward could not be computed; they count as not right
    first_error: str | None = None  # why the first of them

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Summary:
        """The row that ``as_dict`` gave."""
        intervals = ("accuracy_interval", "thinking_tokens_interval")
        return cls(**{**values, **{name: tuple(values[name]) for name in intervals}})


@dataclass(frozen=True)
class Evaluator:
    """Held-out problems and how they are asked and scored.

    Args:
        problems: asked once each.
        scorer: scores traces; its accuracy reward is 1 if right, else 0.
        tokenizer: renders queries and decodes traces.
        temperature: of sampling.
        seed: with it, trace i draws with a seed that depends on it and i only.
    """

    problems: Sequence[Problem]
    scorer: Scorer
    tokenizer: Tokenizer
    temperature: float
    seed: int

    def run(
        self,
        policy: Policy,
        spec: ChunkSpec,
        setting: str,
        max_model_tokens: int | None = None,
        limit: int | None = None,
    ) -> Summary:
        """Plays the first ``limit`` problems (all by default) and sums them up.

        Raises:
            RolloutError: a trace failed; an accuracy over the others would not be one.
            ConfigError: a score is neither 0 nor 1.
        """
        problems = self.problems[:limit]
        queries = [query_ids(self.tokenizer, problem) for problem in problems]
        samplings = [
            Sampling(self.temperature, derive_seed("evaluation", self.seed, i))
            for i in range(len(problems))
        ]
        traces, scores, _ = asyncio.run(
            run_scored_rollouts(
                policy,
                spec,
                problems,
                queries,
                samplings,
                self.tokenizer,
                self.scorer,
                max_model_tokens,
            )
        )
        return self._summary(setting, traces, scores)

    def _summary(self, setting: str, traces: list[Trace], scores: list[Score]) -> Summary:
        failed = [trace for trace in traces if trace.stop.is_failure]
        if failed:
            raise RolloutError(
                f"{len(failed)} of {len(traces)} traces of the evaluation failed; the first one: "
                f"{failed[0].error or failed[0].stop.value}"
            )
        right = sum(self._is_right(score) for score in scores)
        errors = [score.errors[self.scorer.accuracy] for score in scores if self._failed(score)]
        n = len(traces)
        lengths = [float(trace.length) for trace in traces]
        return Summary(
            setting=setting,
            num_problems=n,
            accuracy=right / n,
            accuracy_interval=wilson(right, n),
            thinking_tokens=sum(lengths) / n,
            thinking_tokens_interval=mean_interval(lengths),
            chunks=sum(len(trace.thinking) for trace in traces) / n,
            budget_share=sum(trace.stop is TraceStop.BUDGET for trace in traces) / n,
            unscored=len(errors),
            first_error=next(iter(errors), None),
        )

    def _failed(self, score: Score) -> bool:
        return self.scorer.accuracy in score.errors

    def _is_right(self, score: Score) -> int:
        value = score.parts[self.scorer.accuracy]
        if self._failed(score):
            return 0
        if value not in (0, 1):
            raise ConfigError(
                f"an accuracy is counted by a reward of 0 or 1, got {value}; name another with "
                "evaluation.reward"
            )
        return int(value)
