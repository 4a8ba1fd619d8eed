"""The state of a run on rank 0: weights of the engine, batches, rewards and results.

The trainer calls the methods of ``RunState`` at fixed points of a step: ``sample_batch``, then
``reward``, then ``on_sampled``, and ``on_nonfinite`` if the step is skipped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from transformers import TrainerCallback

from delethink.chunking import ChunkSpec
from delethink.config import Recipe
from delethink.engines.base import Engine
from delethink.engines.loading import eos_ids, vocabulary_size
from delethink.errors import NonFiniteError, RolloutError, RunDirectoryError
from delethink.evaluation.heldout import Evaluator, HeldOutResult
from delethink.registry import resolve
from delethink.rollout import replay_trace
from delethink.thinking_marks import marks_of, unmarked_hint
from delethink.tokenization import query_ids, reward_text
from delethink.trace_io import TraceRecord, json_like
from delethink.training.batching import RolloutBatch, ScoredBatch
from delethink.training.grpo import NonFinite
from delethink.training.metrics import StepMetrics, TraceBatch, batch_metrics, overlap
from delethink.training.preflight import Inputs, Prepared
from delethink.training.progress import TrainingProgress
from delethink.training.rollouts import Batch, BatchSampler, Prefetch, PromptCursor
from delethink.training.run_directory import RunDirectory
from delethink.training.weights import (
    RankWeights,
    has_adapters,
    low_rank_changes,
    merge_obstacle,
    merged_state_dict,
)
from delethink.types import Problem, Trace

Example = dict[str, Any]  # a row of the dataset: prompt, answer, index of the problem
_MAX_SKIPPED_STEPS = 10  # in a row


def make_example(problems: list[Problem], index: int) -> Example:
    """Return the row of a problem."""
    return {"prompt": problems[index].messages, "answer": problems[index].answer, "problem": index}


def is_evaluated_at(recipe: Recipe, step: int) -> bool:
    """Return whether a few held-out problems are due after a step; all follow the last one."""
    evaluation = recipe.evaluation
    if not min(evaluation.num_problems_at_intervals, evaluation.num_problems):
        return False
    return step % evaluation.every == 0 and step != recipe.training.max_steps


class EngineWeights:
    """Keep the weights of the engine at the version of the trainer."""

    def __init__(
        self, engine: Engine, model: Any, metrics: StepMetrics, ranks: RankWeights
    ) -> None:
        self.engine, self.ranks = engine, ranks
        self._model, self._metrics = model, metrics
        self.version = -1  # weight updates in the engine's weights; -1: those it was made with
        self._sends_changes = False  # of adapters alone, instead of whole weights
        self._sent: Any = None  # the handles of shared weights that the engine has read
        self._update: Future[None] | None = None  # in the background

    @property
    def trained_version(self) -> int:
        """Number of weight updates in the trainer's weights."""
        return self.ranks.version

    def choose_updates(self) -> str | None:
        """Decide whether updates hold the adapters alone, once the model has them.

        Returns:
            A sentence for people; ``None`` without adapters, or if nothing has to be sent.
        """
        if not has_adapters(self._model) or getattr(self.engine, "shares_weights", False):
            return None
        whole = sum(t.nbytes for n, t in self._model.state_dict().items() if ".lora_" not in n)
        text = f"weight updates: whole merged weights, {whole / 1e6:,.1f} MB"
        if not hasattr(self.engine, "merge_weights"):
            return f"{text}: the engine cannot merge adapters"
        engine: Any = self.engine
        if (obstacle := merge_obstacle(self._model) or engine.merge_obstacle()) is not None:
            return f"{text}: {obstacle}"
        self._sends_changes = True
        changes = low_rank_changes(self._model).values()
        size = sum(change.down.nbytes + change.up.nbytes for change in changes)
        return (
            f"weight updates: the adapters alone, {size / 1e6:,.1f} MB instead of "
            f"{whole / 1e6:,.1f} MB of merged weights"
        )

    def update(self, wait: bool = True) -> None:
        """Load the trainer's weights into the engine, unless they are there already.

        Without ``wait``, this returns once the weights are copied, if the engine can load them in
        the background. At most one update runs at a time.

        Raises:
            WeightSyncError: see ``Engine.update_weights``; also of the update before.
        """
        started = time.perf_counter()
        self.finish()
        if self.trained_version != self.version or self.ranks.handles is not self._sent:
            self._begin()
            if wait:
                self.finish()
            self._metrics.add_weight_update(time.perf_counter() - started)

    def finish(self) -> None:
        """Wait for an update in the background.

        Raises:
            WeightSyncError: see ``Engine.update_weights``.
        """
        update, self._update = self._update, None
        if update is not None:
            update.result()

    def _begin(self) -> None:
        """Begin an update, or make it if the engine has no other way."""
        engine: Any = self.engine
        version, self._sent = self.trained_version, self.ranks.handles
        is_background = hasattr(engine, "begin_update")
        if self._sent is not None:
            engine.read_weights(self._sent, version)
        elif getattr(engine, "shares_weights", False):
            engine.update_weights({}, version)
        elif self._sends_changes:
            merge = engine.begin_merge if is_background else engine.merge_weights
            self._update = merge(low_rank_changes(self._model), version)
        else:
            weights = self.ranks.weights or merged_state_dict(self._model)
            update = engine.begin_update if is_background else engine.update_weights
            self._update = update(weights, version)
        self.version = version


class RunState(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Parts and state of a run on rank 0."""

    def __init__(
        self,
        prepared: Prepared,
        inputs: Inputs,
        directory: RunDirectory,
        progress: TrainingProgress,
        engine: Engine,
        model: Any,
        ranks: RankWeights,
    ) -> None:
        self.recipe = recipe = prepared.recipe
        training = recipe.training
        self.spec = inputs.spec
        self.scorer, self.tokenizer = prepared.scorer, inputs.tokenizer
        self.problems = inputs.selected["train"].problems
        self.directory, self.progress = directory, progress
        self.metrics = StepMetrics()
        self.weights = EngineWeights(engine, model, self.metrics, ranks)
        self.prompts = PromptCursor()
        sampler = BatchSampler(
            engine,
            self.spec,
            self.problems,
            self.prompts,
            self.scorer,
            self.tokenizer,
            training.temperature,
            training.num_generations,
            recipe.seed,
            training.max_sampling_rounds,
            recipe.engine.rollout_timeout,
        )
        num_groups = training.traces_per_batch // training.num_generations
        self.prefetch = Prefetch(
            lambda step: sampler.start(step, num_groups),
            self.prompts.state_dict,
            training.max_staleness // training.steps_per_batch,
            training.steps_per_batch,
            training.max_steps,
        )
        # Verifies traces; the scorer computes the rewards.
        self.env: Any = resolve("delethink.envs", "thinking")(
            task=prepared.task,
            reward=lambda text, answer: 0.0,
            tokenizer=self.tokenizer,
            chunk_spec=self.spec,
            eos_ids=eos_ids(model, self.tokenizer),
            vocabulary=vocabulary_size(model),
            max_query_tokens=engine.max_model_tokens,
        )
        self.skipped_steps: list[int] = []
        self._is_marked: bool | None = None  # whether a trace wrote the end of thinking
        # The current batch, its advantages, and the weights of its first step.
        self.batch = Batch([])
        self.advantages: list[float] = []
        self.policy_version = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save in a checkpoint, beside the trainer's own."""
        return {
            "prompts": self.prefetch.state_dict(),
            "policy_version": self.weights.trained_version,
            "skipped_steps": self.skipped_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.prompts.load_state_dict(state["prompts"])
        self.skipped_steps = list(state["skipped_steps"])

    # -- callbacks of the trainer --------------------------------------------------------------

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of a step."""
        self.metrics.start_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock of a step."""
        self.metrics.stop_step()

    def sample_batch(self, examples: list[Example]) -> RolloutBatch:
        """Return a batch of scored traces, sampled from the current weights.

        With prefetching, the batch was begun with earlier weights. The current ones enter at chunk
        boundaries, once a batch, and the trainer waits for no chunk but those of its batch.
        The cursor over the problems replaces the examples chosen by the trainer.

        Raises:
            RolloutError: too many traces failed or could not be scored.
        """
        engine, is_prefetched = self.weights.engine, self.recipe.training.max_staleness > 0
        self.weights.update(wait=not is_prefetched)
        self.policy_version = self.weights.version
        started = time.perf_counter()
        self.batch = batch = self.prefetch.next(self.policy_version)
        waited = time.perf_counter() - started
        if not is_prefetched:  # else the engine samples the next batch
            engine.sleep()
        self.metrics.values |= {
            **engine.take_metrics(),
            "seconds_scoring": batch.seconds_scoring,
            "seconds_sampling": batch.seconds_sampling,
            "seconds_waiting": waited,
            "overlap": overlap(waited, batch.seconds_sampling + batch.seconds_scoring),
            "sampling_rounds": batch.rounds,
            "groups_replaced": len(batch.replaced),
            "tokens_replaced": sum(t.length for group in batch.replaced for t in group.traces),
        }
        unscored = [score for score in batch.scores if score.errors]
        failed = len(unscored) + sum(trace.stop.is_failure for trace in batch.traces)
        limit = self.recipe.training.max_failed_share
        if unscored and failed > limit * len(batch.traces):
            name, reason = next(iter(unscored[0].errors.items()))
            raise RolloutError(
                f"{failed} of {len(batch.traces)} traces failed or could not be scored, more than "
                f"max_failed_share={limit}; first scoring error: {name}: {reason}"
            )
        return RolloutBatch([make_example(self.problems, i) for i in batch.problems], batch.traces)

    def reward(self, trace: list[Trace], problem: list[int], **columns: Any) -> list[float | None]:
        """Return the rewards of the batch: a reward function for TRL.

        Each trace is replayed through the environment, to verify the chunk rule.

        Raises:
            RolloutError: a trace does not follow the rule.
        """
        rewards = []
        for one, index, score in zip(trace, problem, self.batch.scores, strict=True):
            if score.total is not None and not one.stop.is_failure:
                replay_trace(self.env, self.problems[index], one)
            rewards.append(score.total)
        return rewards

    def on_sampled(self, scored: ScoredBatch) -> None:
        """Write the traces of a batch and add its metrics."""
        self.advantages = scored.advantages
        batch = TraceBatch(
            scored.traces,
            self.batch.scores,
            scored.in_loss,
            self.recipe.training.num_generations,
            self.policy_version,
            [reward.name for reward in self.scorer.rewards],
        )
        self.metrics.values.update(batch_metrics(batch))
        if not self._is_marked:
            marks = marks_of(self.tokenizer)
            texts = (reward_text(self.tokenizer, trace.output_ids) for trace in scored.traces)
            self.watch_marks(any(map(marks.ends_in, texts)))
        replaced = Batch(self.batch.replaced)
        untrained = self._records(replaced, [None] * len(replaced.traces))
        trained = self._records(self.batch, self.advantages)
        self.directory.add_traces(self.policy_version + 1, trained + untrained)

    def watch_marks(self, is_marked: bool) -> None:
        """Print a hint the first time that no trace of many has ended its thinking."""
        if not is_marked and self._is_marked is None:
            self.progress.log(f"warning: {unmarked_hint(marks_of(self.tokenizer))}")
        self._is_marked = self._is_marked or is_marked

    def on_token_stats(self, values: list[dict[str, Any]]) -> None:
        """Write values of single tokens beside the traces of the batch."""
        if values:
            self.directory.add_token_stats(self.policy_version + 1, values)

    def on_nonfinite(self, found: NonFinite) -> None:
        """Keep the traces of a skipped optimizer step, and stop the run if the recipe says so.

        Raises:
            NonFiniteError: ``training.on_nonfinite`` is "stop", or too many steps were skipped.
        """
        records = self._records(self.batch, self.advantages)
        kept = [records[index] for index in found.traces] or records
        path = self.directory.add_nonfinite(found.step, kept)
        self.skipped_steps.append(found.step)
        self.metrics.values.update({"step_skipped": 1, "loss": None})
        text = f"step {found.step}: a {found.quantity} of training is not finite"
        where = f"its traces ({len(kept)} of {len(records)}) are in {path}"
        if self.recipe.training.on_nonfinite == "stop":
            raise NonFiniteError(
                f"{text}; no weight was changed; {where}; the same command resumes from the newest "
                "checkpoint, and training.on_nonfinite=skip skips such steps"
            )
        last = list(range(found.step - _MAX_SKIPPED_STEPS + 1, found.step + 1))
        if self.skipped_steps[-_MAX_SKIPPED_STEPS:] == last:
            raise NonFiniteError(f"{text}, as in the {len(last) - 1} steps before; {where}")
        self.progress.log(f"{text}: skipped; {where}")

    def _records(self, batch: Batch, advantages: Sequence[float | None]) -> list[dict[str, Any]]:
        """Return the lines of ``traces/``; traces without an advantage were not trained on."""
        records = []
        columns = (batch.problems, batch.traces, batch.scores)
        for index, trace, score, advantage in zip(*columns, advantages, strict=True):
            problem = self.problems[index]
            record = TraceRecord(
                # Metadata of a task may hold values outside JSON.
                problem=replace(problem, metadata=json_like(problem.metadata)),
                trace=trace,
                reward=score.total,
                rewards=score.parts,
                reward_errors={**score.errors, **score.zeroed},
                advantage=advantage,
                text=self.tokenizer.decode(list(trace.output_ids)),
            )
            records.append(record.to_json())
        return records


class ResultsTable:
    """Evaluate on held-out problems and keep the rows of ``table.json``."""

    def __init__(self, run: RunState, problems: list[Problem], scorer: Any) -> None:
        self._run = run
        temperature, seed = run.recipe.training.temperature, run.recipe.seed
        self._evaluator = Evaluator(problems, scorer, run.tokenizer, temperature, seed)
        try:
            self.rows = [HeldOutResult.from_dict(row) for row in run.directory.read_table()]
        except (TypeError, KeyError) as error:
            raise RunDirectoryError(
                f"{run.directory.path / 'table.json'} has a row of another form ({error}); delete "
                "the file, and its settings are evaluated again"
            ) from None

    def evaluate(self, setting: str, spec: ChunkSpec, limit: int | None = None) -> HeldOutResult:
        """Return accuracy and lengths of the current weights on the first ``limit`` problems."""
        self._run.prefetch.wait()
        self._run.weights.update()
        engine = self._run.weights.engine
        number = len(self._evaluator.problems[:limit])
        with self._run.progress.evaluating(setting, number) as on_end:
            result = self._evaluator.run(
                engine, spec, setting, engine.max_model_tokens, limit, on_end
            )
        if not self._run.recipe.training.max_staleness:
            engine.take_metrics()  # Without prefetching, all counts so far are the evaluation's.
        return result

    def accuracy_at(self, step: int) -> float | None:
        """Return the accuracy on a few problems, or ``None`` if no evaluation is due."""
        if not is_evaluated_at(self._run.recipe, step):
            return None
        limit = self._run.recipe.evaluation.num_problems_at_intervals
        try:
            return self.evaluate("held-out", self._run.spec, limit).accuracy
        except RolloutError as error:  # One missing value must not end the run.
            self._run.progress.log(f"step {step}: evaluation failed: {error}")
            return None
        finally:
            # The next step may train on the same batch, and the trainer needs the GPU for it.
            if not self._run.recipe.training.max_staleness:
                self._run.weights.engine.sleep()

    def add_row(self, setting: str, spec: ChunkSpec) -> None:
        """Evaluate a setting on all problems, unless the table has its row already."""
        if not self._evaluator.problems or setting in [row.setting for row in self.rows]:
            return
        row = self.evaluate(setting, spec)
        self.rows.append(row)
        self._run.directory.write_table([row.as_dict() for row in self.rows])
        self._run.progress.log(f"{setting}: accuracy {row.accuracy_text(' to ')}")
        if row.ungraded:
            self._run.progress.log(
                f"{setting}: {row.ungraded} of {row.num_problems} traces have no grade (the reward "
                f"{self._evaluator.scorer.accuracy} gave None) and are left out of the accuracy"
            )
        if row.unscored:
            self._run.progress.log(
                f"{setting}: {row.unscored} of {row.num_problems} traces could not be scored and "
                f"count as wrong; first error: {row.first_error}"
            )

    def add_baselines(self) -> None:
        """Evaluate the base model in one context of C, as LongCoT, and with Delethink."""
        if not self._evaluator.problems:
            self._run.progress.log("evaluation.num_problems=0: training without evaluation")
            return
        spec, window = self._run.spec, self._run.weights.engine.max_model_tokens
        self.add_row("base, one context", ChunkSpec.longcot(spec.context_size))
        query = max(len(query_ids(self._run.tokenizer, p)) for p in self._evaluator.problems)
        if query + spec.budget <= window:
            self.add_row("base, LongCoT", ChunkSpec.longcot(spec.budget))
        else:
            self._run.progress.log(
                f"base, LongCoT: skipped, a query of {query} tokens and a budget of {spec.budget} "
                f"do not fit in the model's context of {window}"
            )
        self.add_row("base, Delethink", spec)
        self._run.watch_marks(any(row.marked != 0 for row in self.rows))
