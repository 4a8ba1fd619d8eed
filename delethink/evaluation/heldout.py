"""Accuracy on held-out problems during training, one trace per problem."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from delethink.chunking import ChunkSpec
from delethink.errors import ConfigError, RolloutError
from delethink.evaluation.metrics import Interval, mean_interval, wilson
from delethink.policy import Policy, Sampling
from delethink.rollout import derive_seed
from delethink.scoring.rollouts import run_scored_rollouts
from delethink.scoring.scorer import Scorer
from delethink.thinking_marks import marks_of
from delethink.tokenization import Tokenizer, query_ids, reward_text
from delethink.types import Problem, Score, Trace, TraceStop


@dataclass(frozen=True)
class HeldOutResult:
    """Row of the table of held-out results. Intervals have a level of 95 %."""

    setting: str
    num_problems: int
    accuracy: float | None  # share of the graded traces; None: no trace could be graded
    accuracy_interval: Interval  # Wilson's interval
    thinking_tokens: float  # mean length of a trace
    thinking_tokens_interval: Interval  # normal interval
    chunks: float  # mean number of chunks of a trace
    budget_share: float  # share of traces out of budget
    unscored: int = 0  # traces whose reward failed; they count as wrong
    first_error: str | None = None  # error of the first unscored trace
    ungraded: int = 0  # traces for which the accuracy reward is None; left out of the accuracy
    marked: float | None = None  # share of traces that wrote the end of thinking; None: unknown

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def accuracy_text(self, to: str) -> str:
        """Return accuracy and interval for people; ``to`` stands between the interval's ends."""
        if self.accuracy is None:
            return "none"
        low, high = self.accuracy_interval
        return f"{self.accuracy:.3f} ({low:.3f}{to}{high:.3f})"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HeldOutResult:
        """Return the row written by ``as_dict``."""
        intervals = ("accuracy_interval", "thinking_tokens_interval")
        return cls(**{**values, **{name: tuple(values[name]) for name in intervals}})


@dataclass(frozen=True)
class Evaluator:
    """Runs one trace per held-out problem and scores it.

    The seed of trace i derives from ``seed`` and i.
    """

    problems: Sequence[Problem]
    scorer: Scorer  # the accuracy reward must be 1 if right, else 0
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
        on_end: Callable[[], None] = lambda: None,
    ) -> HeldOutResult:
        """Evaluate a policy on the first ``limit`` problems (all by default).

        ``setting`` is the name of the row. ``max_model_tokens`` is the longest sequence of the
        model; ``None`` checks nothing. ``on_end`` is called at the end of each trace.

        Raises:
            RolloutError: a trace failed; the accuracy of the others would be biased.
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
                on_end=on_end,
            )
        )
        return self._summarise(setting, traces, scores)

    def _summarise(self, setting: str, traces: list[Trace], scores: list[Score]) -> HeldOutResult:
        failed = [trace for trace in traces if trace.stop.is_failure]
        if failed:
            raise RolloutError(
                f"{len(failed)} of {len(traces)} traces of the evaluation failed; the first one: "
                f"{failed[0].error or failed[0].stop.value}"
            )
        name, n = self.scorer.accuracy, len(traces)
        errors = [score.errors[name] for score in scores if name in score.errors]
        values = [score.parts[name] for score in scores if name not in score.errors]
        if wrong := set(values) - {0, 1, None}:
            raise ConfigError(
                f"the reward {name!r} gave {wrong.pop()}, and an accuracy needs 0 or 1; name "
                "another reward with evaluation.reward"
            )
        right, ungraded = values.count(1), values.count(None)
        graded = n - ungraded
        marks = marks_of(self.tokenizer)
        texts = [reward_text(self.tokenizer, trace.output_ids) for trace in traces]
        lengths = [float(trace.length) for trace in traces]
        return HeldOutResult(
            setting=setting,
            num_problems=n,
            accuracy=right / graded if graded else None,
            accuracy_interval=wilson(right, graded) if graded else Interval(0.0, 1.0),
            thinking_tokens=fmean(lengths),
            thinking_tokens_interval=mean_interval(lengths),
            chunks=fmean(len(trace.thinking) for trace in traces),
            budget_share=fmean(trace.stop is TraceStop.BUDGET for trace in traces),
            unscored=len(errors),
            first_error=next(iter(errors), None),
            ungraded=ungraded,
            marked=fmean(map(marks.ends_in, texts)),
        )
