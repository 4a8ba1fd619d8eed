"""The trainer's events become metrics, evaluations and progress."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from delethink.errors import RolloutError
from delethink.training.step_metrics import trained_metrics

if TYPE_CHECKING:
    from delethink.training.job import Job


class Recorder(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Turns the trainer's events into metrics, held-out evaluations and progress."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._started = 0.0
        self._updated = 0.0
        self._total = job.recipe.training.max_steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The clocks of a step start."""
        self._job.step.clear()
        self._started = time.perf_counter()
        self._updated = self._job.seconds_weight_update

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What was not sampling, scoring or an update of weights was training."""
        step, updated = self._job.step, self._job.seconds_weight_update
        whole = time.perf_counter() - self._started
        sampled = step.get("seconds_sampling", 0.0) + step.get("seconds_scoring", 0.0)
        step["seconds_training"] = whole - sampled - (updated - self._updated)
        step["seconds_weight_update"], self._job.seconds_weight_update = updated, 0.0
        if sampled:
            step["tokens_per_second"] = step["sampled_tokens"] / step["seconds_sampling"]
        if self._job.recipe.training.max_staleness:  # new weights enter at the next borders
            self._job.serve_current_weights()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Writes the line of the step."""
        if not logs or "loss" not in logs:
            return
        metrics = {
            "step": state.global_step,
            "loss": logs["loss"],
            "gradient_norm": logs["grad_norm"],
            "learning_rate": logs["learning_rate"],
            "policy_version": self._job.version,
            "step_skipped": 0,
            **trained_metrics(self._job.trainer.take_statistics(), self._job.trainer.take_work()),
            **self._job.step,
        }
        metrics["heldout_accuracy"] = self._heldout_accuracy(state.global_step)
        self._job.run.add_metrics(metrics)
        self._job.reporter.step(metrics, self._total)

    def _heldout_accuracy(self, step: int) -> float | None:
        evaluation = self._job.recipe.evaluation
        if step % evaluation.every or step == self._total:  # the table has all problems at the end
            return None
        limit = min(evaluation.num_problems_at_intervals, evaluation.num_problems)
        try:
            return self._job.measure("held-out", self._job.spec, limit).accuracy
        except RolloutError as problem:  # the run is worth more than this one point
            self._job.reporter.say(f"step {step}: not evaluated: {problem}")
            return None
