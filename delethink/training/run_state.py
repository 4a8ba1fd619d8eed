"""What happens in a training run: traces are played, scored, kept, and trained on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig

from delethink.chunking import ChunkSpec
from delethink.config import Recipe
from delethink.engines.base import Engine
from delethink.engines.loading import eos_ids, vocabulary_size
from delethink.errors import NonFiniteError, RolloutError
from delethink.evaluation.heldout import Evaluator, HeldOutResult
from delethink.registry import resolve
from delethink.rollout import replay_trace
from delethink.tokenization import query_ids
from delethink.trace_io import TraceRecord, json_like
from delethink.training.checkpointing import AtomicCheckpoints, Checkpoint
from delethink.training.data_parallel import Processes, trace_cost
from delethink.training.grpo import DelethinkTrainer, Filled, Guarded, NonFinite, Sampled
from delethink.training.grpo_config import lora, objective
from delethink.training.metrics import (
    flat_numbers,
    reward_metrics,
    sampled_metrics,
    staleness_metrics,
    trained_metrics,
)
from delethink.training.progress import Reporter, plot_curves
from delethink.training.rollouts import Batch, PromptCursor, Sampler, SamplingAhead
from delethink.training.run_directory import RunDirectory
from delethink.training.weights import WholeWeights, served_weights
from delethink.types import Problem, Score, Trace


def trace_records(
    sampled: Sampled, problems: list[Problem], scores: list[Score], tokenizer: Any
) -> list[dict[str, Any]]:
    """One JSON object a trace: what was sampled, exactly as trained, and how it was scored."""
    rows = zip(sampled.examples, sampled.traces, scores, sampled.advantages, strict=True)
    return [
        trace_record(problems[example["problem"]], trace, score, tokenizer, advantage)
        for example, trace, score, advantage in rows
    ]


def trace_record(
    problem: Problem, trace: Trace, score: Score, tokenizer: Any, advantage: float | None = None
) -> dict[str, Any]:
    """One trace; without an advantage it is not trained on."""
    return TraceRecord(
        problem=_storable(problem),
        trace=trace,
        reward=score.total,
        rewards=score.parts,
        reward_errors=score.errors,
        advantage=advantage,
        text=tokenizer.decode(list(trace.output_ids)),
    ).to_json()


def _storable(problem: Problem) -> Problem:
    """A run does not end because a task's metadata holds what JSON does not know."""
    return replace(problem, metadata=json_like(problem.metadata))


class Recorder(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Turns the trainer's events into metrics, held-out evaluations and progress."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._started = 0.0
        self._updated = 0.0
        self._total = job.recipe.training.max_steps
        self._line: dict[str, Any] = {}

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
        if self._job.recipe.training.max_staleness:  # new weights enter at the next boundaries
            self._job.serve_current_weights()

    def measure(self, logs: dict[str, Any]) -> dict[str, float]:
        """Makes the line of a step, of which the trainer has these figures.

        Returns:
            Its numbers by flat names, for places that metrics are reported to.
        """
        self._line = {
            "step": int(self._job.trainer.state.global_step),
            "loss": logs["loss"],
            "gradient_norm": logs["grad_norm"],
            "learning_rate": logs["learning_rate"],
            "policy_version": self._job.batch_version,
            "step_skipped": 0,
            **trained_metrics(self._job.trainer.take_statistics(), self._job.trainer.take_work()),
            **self._job.trainer.shares.metrics(),
            **self._job.step,
        }
        return {f"delethink/{name}": value for name, value in flat_numbers(self._line)}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Writes the line of the step."""
        if not logs or "loss" not in logs:
            return
        metrics = self._line
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
        except RolloutError as error:  # the run is worth more than this one point
            self._job.reporter.say(f"step {step}: not evaluated: {error}")
            return None


Example = dict[str, Any]  # a row of the dataset: prompt, answer, the problem's place in the run
AFTER = "after RL, Delethink"  # the last row of the table
FINAL = "final"  # where the trained weights go, under checkpoints
_MOST_SKIPPED = 10  # optimizer steps in a row: then something is wrong that skipping does not mend


class RunTrainer(AtomicCheckpoints, Guarded, DelethinkTrainer):
    """The trainer of a run, which survives, and reports what the run measures.

    Args:
        measure: what there is to report of a step beside what the trainer logs of it.
    """

    def __init__(
        self, *args: Any, measure: Callable[[dict[str, Any]], dict[str, float]], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._measure = measure

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Logs a step to wherever metrics are reported to."""
        if "loss" in logs:
            measured = self._measure(logs)
            logs = logs | (measured if self.args.report_to else {})
        super().log(logs, start_time)


@dataclass
class Job:
    """What the parts of a run share."""

    recipe: Recipe
    spec: ChunkSpec  # bound to the tokenizer
    run: RunDirectory
    reporter: Reporter
    engine: Engine
    evaluator: Evaluator
    problems: list[Problem]  # of training
    scorer: Any
    tokenizer: Any
    model: Any
    processes: Processes = field(default_factory=Processes)
    gathered: WholeWeights = field(default_factory=WholeWeights)
    trainer: Any = None
    version: int = 0  # of the weights that the engine serves
    seconds_weight_update: float = 0.0  # since the last step was logged
    rows: list[HeldOutResult] = field(default_factory=list)  # of the table
    step: dict[str, Any] = field(default_factory=dict)  # measured for the step at hand
    scores: list[Score] = field(default_factory=list)  # of the traces sampled last, in order
    sampled: Sampled | None = None  # last
    skipped: list[int] = field(default_factory=list)  # optimizer steps, of a run until now
    batch: Batch | None = None  # sampled last
    batch_version: int = 0  # of the weights that it is trained on first
    prompts: PromptCursor = field(default_factory=PromptCursor)
    ahead: SamplingAhead = field(init=False)

    def __post_init__(self) -> None:
        training = self.recipe.training
        sampler = Sampler(
            self.engine,
            self.spec,
            self.problems,
            self.prompts,
            self.scorer,
            self.tokenizer,
            training.temperature,
            training.num_generations,
            self.recipe.seed,
            training.max_sampling_rounds,
            self.recipe.engine.rollout_timeout,
        )
        groups = training.traces_per_batch // training.num_generations
        self.ahead = SamplingAhead(
            lambda step: sampler.begin(step, groups),
            self.prompts.state_dict,
            training.max_staleness // training.steps_per_batch,
            training.steps_per_batch,
            training.max_steps,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of a run, beside what the trainer keeps itself."""
        return {
            "prompts": self.ahead.state(),
            "policy_version": int(self.trainer.state.global_step),
            "skipped_steps": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.prompts.load_state_dict(state["prompts"])
        self.skipped = list(state["skipped_steps"])

    def measure(self, setting: str, spec: ChunkSpec, limit: int | None = None) -> HeldOutResult:
        """Accuracy and lengths on held-out problems with the current weights."""
        self.ahead.settle()
        self.serve_current_weights()
        longest = self.engine.max_model_tokens
        measured = self.evaluator.run(self.engine, spec, setting, longest, limit)
        if not self.recipe.training.max_staleness:  # else there are counts of batches in it
            self.engine.take_metrics()  # no part of the next step
        return measured

    def add_row(self, setting: str, spec: ChunkSpec) -> None:
        """Measures a row of the table on all held-out problems and writes the table so far.

        A row that was measured before the run was cut short stays as it is.
        """
        if setting in [row.setting for row in self.rows]:
            return
        row = self.measure(setting, spec)
        self.rows.append(row)
        self.run.write_table([row.as_dict() for row in self.rows])
        self.reporter.summary(row)
        if row.unscored:
            self.reporter.say(
                f"{setting}: {row.unscored} of {row.num_problems} traces could not be scored and "
                f"count as not right; the first one: {row.first_error}"
            )

    def measure_baselines(self) -> None:
        """The base model in one context of C, as LongCoT, and with Delethink zero-shot."""
        spec = self.spec
        self.add_row("base, one context", ChunkSpec.longcot(spec.context_size))
        query = max(len(query_ids(self.tokenizer, p)) for p in self.evaluator.problems)
        if query + spec.budget <= self.engine.max_model_tokens:
            self.add_row("base, LongCoT", ChunkSpec.longcot(spec.budget))
        else:
            self.reporter.say(
                f"base, LongCoT: left out, {query} + {spec.budget} tokens do not fit in the "
                f"model's {self.engine.max_model_tokens}"
            )
        self.add_row("base, Delethink", spec)

    def prove_updates(self) -> None:
        """Gives the engine the weights that it has.

        What it will not take up, now or after a step, is so known before anything is sampled.

        Raises:
            WeightSyncError: see ``Engine.update_weights``.
        """
        self.engine.update_weights(served_weights(self.model), self.version)

    def serve_current_weights(self) -> None:
        """Brings the engine up to the trainer's version; does nothing where it is."""
        version = 0 if self.trainer is None else int(self.trainer.state.global_step)
        if version == self.version:
            return
        started = time.perf_counter()
        self.engine.update_weights(self.gathered.weights or served_weights(self.model), version)
        self.version = version
        self.seconds_weight_update += time.perf_counter() - started

    def fit(self, settings: GRPOConfig, checkpoint: Checkpoint | None = None) -> None:
        """The optimizer steps, from a checkpoint on where there is one.

        The curves are drawn also where they are cut short.
        """
        recipe, recorder = self.recipe, Recorder(self)
        if checkpoint is not None:
            self.load_state_dict(checkpoint.job)
        self.trainer = make_trainer(
            recipe,
            self.processes,
            model=self.model,
            processing_class=self.tokenizer,
            args=settings,
            train_dataset=_examples(self.problems),
            reward_funcs=[self.pay_out(self.make_env())],
            play=self.play,
            on_sampled=self.record_traces,
            job_state=self.state_dict,
            on_nonfinite=self.leave_out,
            measure=recorder.measure,
            callbacks=[self.gathered, recorder],
        )
        self.reporter.start_steps(recipe.training.max_steps, checkpoint.step if checkpoint else 0)
        try:
            fit_together(self.trainer, self.processes, checkpoint)
        finally:
            self.ahead.close()
            self.reporter.stop_steps()
            plot_curves(self.run.read_metrics(), recipe.name, self.run.curves)
        self.trainer.save_weights(FINAL)

    def make_env(self) -> Any:
        """The thinking environment; what it pays is set for each trace."""
        return resolve("delethink.envs", "thinking")(
            task=self,
            reward=lambda text, answer: 0.0,
            tokenizer=self.tokenizer,
            chunk_spec=self.spec,
            eos_ids=eos_ids(self.model, self.tokenizer),
            vocabulary=vocabulary_size(self.model),
            max_query_tokens=self.engine.max_model_tokens,
        )

    def problem(self, split: str, index: int) -> Problem:
        """A training problem of the run: what makes it a task for the environment."""
        return self.problems[index % len(self.problems)]

    def pay_out(self, env: Any) -> Any:
        """The scores of the traces sampled last, as TRL asks for them.

        Each trace that earned something is replayed through the environment, which proves that it
        was sampled by the environment's own rule, and pays that for it.
        """

        def reward(trace: list[Trace], problem: list[int], **columns: Any) -> list[float | None]:
            return [
                self._paid(env, t, self.problems[p], score)
                for t, p, score in zip(trace, problem, self.scores, strict=True)
            ]

        return reward

    def _paid(self, env: Any, trace: Trace, problem: Problem, score: Score) -> float | None:
        if score.total is None:
            return None
        if trace.stop.is_failure:  # what the recipe says of errors; there is nothing to replay
            return score.total
        total = score.total
        env.reward = lambda text, answer: total
        return replay_trace(env, problem, trace)

    def leave_out(self, found: NonFinite) -> None:
        """An optimizer step that is not taken: its traces are kept, and the run stops or goes on.

        Raises:
            NonFiniteError: as the recipe says, or because it is one of too many in a row.
        """
        assert self.sampled is not None
        records = trace_records(self.sampled, self.problems, self.scores, self.tokenizer)
        guilty = [records[place] for place in found.traces] or records
        path = self.run.add_nonfinite(found.step, guilty)
        self.skipped.append(found.step)
        self.step |= {"step_skipped": 1, "loss": None}
        text = f"step {found.step}: a {found.what} of training is not finite"
        kept = f"its traces ({len(guilty)} of {len(records)}) are in {path}"
        if self.recipe.training.on_nonfinite == "stop":
            raise NonFiniteError(
                f"{text}; no weight was changed; {kept}; the same command goes on from the newest "
                "checkpoint: add training.on_nonfinite=skip to leave such steps out"
            )
        last = list(range(found.step - _MOST_SKIPPED + 1, found.step + 1))
        if self.skipped[-_MOST_SKIPPED:] == last:
            raise NonFiniteError(f"{text}, like the {_MOST_SKIPPED - 1} before it; {kept}")
        self.reporter.say(f"{text}: skipped; {kept}")

    def play(self, places: list[Example]) -> Filled:
        """A batch in the places of as many rows, scored, from the current weights."""
        self.serve_current_weights()
        self.batch_version = self.version
        self.batch = batch = self.ahead.next(self.version)
        if not self.recipe.training.max_staleness:  # else the next batch is being sampled
            self.engine.sleep()
        self.step |= self.engine.take_metrics()
        self.scores = batch.scores
        self.step["seconds_scoring"] = batch.seconds_scoring
        self.step["seconds_sampling"] = batch.seconds_sampling
        self.step |= {
            "sampling_rounds": batch.rounds,
            "groups_replaced": len(batch.replaced),
            "tokens_replaced": sum(t.length for g in batch.replaced for t in g.traces),
        }
        self._check_scores(batch.traces)
        return Filled([_example(self.problems, place) for place in batch.problems], batch.traces)

    def _check_scores(self, traces: list[Trace]) -> None:
        """Rewards that cannot be computed are failures like any other: not more than a share."""
        broken = [score for score in self.scores if score.errors]
        failed = len(broken) + sum(trace.stop.is_failure for trace in traces)
        most = self.recipe.training.max_failed_share
        if broken and failed > most * len(traces):
            name, reason = next(iter(broken[0].errors.items()))
            raise RolloutError(
                f"{failed} of {len(traces)} traces failed or could not be scored, more than "
                f"max_failed_share={most}; the first that could not be scored: {name}: {reason}"
            )

    def record_traces(self, sampled: Sampled) -> None:
        """Writes what was sampled and keeps the figures of the step."""
        self.sampled = sampled
        group = self.recipe.training.num_generations
        self.step |= sampled_metrics(sampled, self.scores, group)
        self.step |= staleness_metrics(sampled.traces, self.version)
        self.step |= reward_metrics(self.scores, self.scorer.rewards)
        step = int(self.trainer.state.global_step) + 1
        records = trace_records(sampled, self.problems, self.scores, self.tokenizer)
        self.run.add_traces(step, records + self._replaced())

    def _replaced(self) -> list[dict[str, Any]]:
        """What was sampled and is not trained on, because its group has no signal."""
        assert self.batch is not None
        return [
            trace_record(self.problems[group.problem], trace, score, self.tokenizer)
            for group in self.batch.replaced
            for trace, score in zip(group.traces, group.scores, strict=True)
        ]


def make_trainer(
    recipe: Recipe,
    processes: Processes,
    *,
    model: Any,
    train_dataset: list[Example],
    callbacks: Sequence[Any],
    **parts: Any,
) -> RunTrainer:
    """The trainer of a recipe, alike in all processes; the rows are those of the first one."""
    trainer = RunTrainer(
        model=model,
        train_dataset=Dataset.from_list(processes.lead(lambda: train_dataset)),
        objective=objective(recipe),
        processes=processes,
        cost=trace_cost(model.config.to_dict()),
        peft_config=lora(recipe.training.lora),
        callbacks=list(callbacks),
        **parts,
    )
    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        if isinstance(callback, WholeWeights):
            callback.trainer = trainer
    return trainer


def fit_together(
    trainer: RunTrainer, processes: Processes, checkpoint: Checkpoint | None = None
) -> None:
    """Trains in all processes, from the first one's checkpoint on where it has one."""
    path = processes.lead(lambda: str(checkpoint.path) if checkpoint else None)
    trainer.train(resume_from_checkpoint=path)


def _examples(problems: list[Problem]) -> list[Example]:
    """The training problems as rows, each once."""
    return [_example(problems, i) for i in range(len(problems))]


def _example(problems: list[Problem], place: int) -> Example:
    problem = problems[place % len(problems)]
    return {"prompt": problem.messages, "answer": problem.answer, "problem": place % len(problems)}
