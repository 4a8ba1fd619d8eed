"""A training run from a recipe to its table."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import GRPOConfig

from delethink.config import Recipe, TaskConfig
from delethink.errors import ConfigError, RolloutError
from delethink.evaluation.evaluate import Evaluator, Summary
from delethink.policy import Sampling
from delethink.query import check_thinking_is_open, query_ids
from delethink.registry import resolve
from delethink.rollout import derive_seed, replay_trace
from delethink.rule import ChunkSpec, start
from delethink.scoring import play_and_score
from delethink.serving.checkpoint import (
    eos_ids,
    load_model,
    load_tokenizer,
    longest_sequence,
    vocabulary_size,
)
from delethink.serving.engine import Engine
from delethink.serving.factory import choose_engine, make_engine
from delethink.tasks import Taken, Task, left_out_of, take
from delethink.traces import TraceRecord, json_like
from delethink.training.curves import plot_curves
from delethink.training.grpo import DelethinkTrainer, Sampled
from delethink.training.preflight import Prepared
from delethink.training.progress import Reporter
from delethink.training.run_directory import RunDirectory
from delethink.types import Problem, Score, Trace, TraceStop

Example = dict[str, Any]  # a row of the dataset: prompt, answer, the problem's place in the run


def train(prepared: Prepared, reporter: Reporter) -> Path:
    """Runs a recipe and returns the path of its run directory.

    Raises:
        UserError: something the user can mend, before anything is sampled.
        RolloutError, WeightSyncError: the run broke; what was written stays whole.
    """
    try:
        return _run(prepared, reporter)
    except BaseException:
        prepared.run.discard_if_empty()
        raise


def _run(prepared: Prepared, reporter: Reporter) -> Path:
    recipe, run = prepared.recipe, prepared.run
    set_seed(recipe.seed)
    _check_devices()
    tokenizer = load_tokenizer(recipe.model, recipe.trust_remote_code)
    model = load_model(recipe.model, "float32", recipe.trust_remote_code)
    eos_ids(model, tokenizer)
    training, other = recipe.training, recipe.evaluation.task or recipe.task
    needed = training.max_steps * training.traces_per_step // training.num_generations
    taken = {
        "train": _take(prepared.task, "train", needed, recipe.task, tokenizer),
        "heldout": _take(
            prepared.evaluation_task, "heldout", recipe.evaluation.num_problems, other, tokenizer
        ),
    }
    problems, heldout = taken["train"].problems, taken["heldout"].problems
    spec, longest = recipe.thinking.spec().bind(tokenizer), longest_sequence(model)
    for problem in (*problems, *heldout):
        start(spec, query_ids(tokenizer, problem), longest)
    check_thinking_is_open(tokenizer, problems[0])
    trl_config = _trl_config(recipe, spec, run.checkpoints)
    model.to(trl_config.device)

    reporter.say(f"run directory: {run.path}")
    _report_problems(prepared, taken, reporter)
    reporter.say(f"starting the engine: {choose_engine(recipe.engine)}")
    scorer, evaluation_scorer = prepared.scorer, prepared.evaluation_scorer
    with (
        closing(scorer),
        closing(evaluation_scorer),
        closing(_make_engine(recipe, model, tokenizer)) as engine,
    ):
        temperature = recipe.training.temperature
        evaluator = Evaluator(heldout, evaluation_scorer, tokenizer, temperature, recipe.seed)
        job = _Job(
            recipe, spec, run, reporter, engine, evaluator, problems, scorer, tokenizer, model
        )
        job.measure_baselines()
        job.fit(trl_config)
        job.add_row("after RL, Delethink", spec)
        reporter.table(job.rows, spec, run.path)
    return run.path


def _take(task: Task, split: str, number: int, config: TaskConfig, tokenizer: Any) -> Taken:
    """The problems of a split that the run uses."""

    def length(problem: Problem) -> int:
        return len(query_ids(tokenizer, problem))

    return take(task, split, number, length, config.max_query_tokens)


def _report_problems(prepared: Prepared, taken: dict[str, Taken], reporter: Reporter) -> None:
    """What was left out is said and kept: a data set never shrinks in silence."""
    tasks = {"train": prepared.task, "heldout": prepared.evaluation_task}
    counts: dict[str, dict[str, Any]] = {
        split: {
            "taken": len(some.problems),
            "overlong_queries": some.overlong,
            "longest_query_passed_over": some.longest,
            "left_out": left_out_of(tasks[split]),
        }
        for split, some in taken.items()
    }
    prepared.run.write_problems(counts)
    for split, some in taken.items():
        if some.overlong:
            reporter.say(
                f"{split}: {some.overlong} of {some.overlong + len(some.problems)} problems passed "
                f"over, their queries are too long (the longest has {some.longest} tokens)"
            )
        if left_out := counts[split]["left_out"]:
            listed = ", ".join(f"{number} {why}" for why, number in left_out.items())
            reporter.say(f"{split}: left out of the data set: {listed}")


def _check_devices() -> None:
    """In one process, TRL's trainer has one GPU; with more it refuses, but late and unclearly."""
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            f"{torch.cuda.device_count()} GPUs are visible and the trainer takes one: choose it "
            "with CUDA_VISIBLE_DEVICES"
        )


def _make_engine(recipe: Recipe, model: Any, tokenizer: Any) -> Engine:
    return make_engine(
        recipe.engine,
        recipe.model,
        model,
        tokenizer,
        num_workers=recipe.num_workers,
        gpus_per_worker=recipe.gpus_per_worker,
        dtype=recipe.dtype,
        trust_remote_code=recipe.trust_remote_code,
        weight_sync_timeout=recipe.weight_sync_timeout,
        seed=recipe.seed,
    )


@dataclass
class _Job:
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
    trainer: Any = None
    version: int = 0  # of the weights that the engine serves
    seconds_weight_update: float = 0.0  # since the last step was logged
    rows: list[Summary] = field(default_factory=list)  # of the table
    step: dict[str, Any] = field(default_factory=dict)  # measured for the step at hand
    scores: list[Score] = field(default_factory=list)  # of the traces sampled last, in order

    def measure(self, setting: str, spec: ChunkSpec, limit: int | None = None) -> Summary:
        """Accuracy and lengths on held-out problems with the current weights."""
        self.serve_current_weights()
        return self.evaluator.run(self.engine, spec, setting, self.engine.max_model_tokens, limit)

    def add_row(self, setting: str, spec: ChunkSpec) -> None:
        """Measures a row of the table on all held-out problems and writes the table so far."""
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

    def serve_current_weights(self) -> None:
        """Brings the engine up to the trainer's version; does nothing where it is."""
        version = 0 if self.trainer is None else int(self.trainer.state.global_step)
        if version == self.version:
            return
        started = time.perf_counter()
        self.engine.update_weights(self.model.state_dict(), version)
        self.version = version
        self.seconds_weight_update += time.perf_counter() - started

    def fit(self, trl_config: GRPOConfig) -> None:
        """The optimizer steps; the curves are drawn also where they are cut short."""
        recipe = self.recipe
        self.trainer = DelethinkTrainer(
            model=self.model,
            processing_class=self.tokenizer,
            args=trl_config,
            train_dataset=Dataset.from_list(_examples(self.problems)),
            reward_funcs=[self.pay_out(self.make_env())],
            play=self.play,
            on_sampled=self.record_traces,
            forward_tokens=recipe.training.forward_tokens,
            max_failed_share=recipe.training.max_failed_share,
            callbacks=[_Recorder(self)],
        )
        self.trainer.remove_callback(PrinterCallback)
        self.reporter.start_steps(recipe.training.max_steps)
        try:
            self.trainer.train()
        finally:
            self.reporter.stop_steps()
            plot_curves(self.run.read_metrics(), recipe.name, self.run.curves)
        self.trainer.save_model(str(self.run.checkpoints / "final"))

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

    def play(self, examples: list[Example]) -> list[Trace]:
        """A trace for each example, with the current weights, scored."""
        self.serve_current_weights()
        started = time.perf_counter()
        seed = derive_seed("training", self.recipe.seed, self.version)
        problems = [self.problems[example["problem"]] for example in examples]
        queries = [query_ids(self.tokenizer, problem) for problem in problems]
        samplings = [
            Sampling(self.recipe.training.temperature, derive_seed(seed, i))
            for i in range(len(examples))
        ]
        traces, self.scores, waited = asyncio.run(
            play_and_score(
                self.engine,
                self.spec,
                problems,
                queries,
                samplings,
                self.tokenizer,
                self.scorer,
                self.engine.max_model_tokens,
            )
        )
        self.step["seconds_scoring"] = waited
        self.step["seconds_sampling"] = time.perf_counter() - started - waited
        self._check_scores(traces)
        return traces

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
        traces = sampled.traces
        n = len(traces)
        self.step["traces"] = n
        self.step["sampled_tokens"] = sum(trace.length for trace in traces)
        self.step["thinking_tokens"] = self.step["sampled_tokens"] / n
        self.step["chunks"] = sum(len(trace.thinking) for trace in traces) / n
        self.step["budget_share"] = sum(t.stop is TraceStop.BUDGET for t in traces) / n
        self.step["failed_share"] = sum(t.stop.is_failure for t in traces) / n
        self.step |= reward_metrics(self.scores, self.scorer.rewards)
        step = int(self.trainer.state.global_step) + 1
        records = trace_records(sampled, self.problems, self.scores, self.tokenizer)
        self.run.add_traces(step, records)


class _Recorder(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Turns the trainer's events into metrics, held-out evaluations and progress."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._started = 0.0
        self._updated = 0.0
        self._total = job.recipe.training.max_steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._job.step.clear()
        self._started = time.perf_counter()
        self._updated = self._job.seconds_weight_update

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, updated = self._job.step, self._job.seconds_weight_update
        whole = time.perf_counter() - self._started
        sampled = step["seconds_sampling"] + step["seconds_scoring"]
        step["seconds_training"] = whole - sampled - (updated - self._updated)
        step["seconds_weight_update"], self._job.seconds_weight_update = updated, 0.0
        step["tokens_per_second"] = step["sampled_tokens"] / step["seconds_sampling"]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        trained = self._job.trainer.take_statistics()
        metrics = {
            "step": state.global_step,
            "reward": logs["reward"],
            "reward_std": logs["reward_std"],
            "groups_without_signal": logs["frac_reward_zero_std"],
            "loss": logs["loss"],
            "gradient_norm": logs["grad_norm"],
            "learning_rate": logs["learning_rate"],
            "clip_fraction": logs["clip_ratio/region_mean"],
            "entropy": trained.entropy / max(1, trained.tokens),
            "logprob_difference": trained.difference / max(1, trained.tokens),
            "logprob_difference_max": trained.largest_difference,
            "trained_tokens": trained.tokens,
            "policy_version": self._job.version,
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


def reward_metrics(scores: list[Score], rewards: Any) -> dict[str, float | int | None]:
    """The breakdown of a step: of each reward, over the traces that it applies to, and errors.

    Errors are counted by trace and kind: ``timeout``, ``memory`` or ``error``.
    """
    metrics: dict[str, float | int | None] = {}
    for reward in rewards:
        values = [v for score in scores if (v := score.parts.get(reward.name)) is not None]
        mean = sum(values) / len(values) if values else None
        metrics[f"rewards/{reward.name}/mean"] = mean
        metrics[f"rewards/{reward.name}/applied_share"] = len(values) / len(scores)
    kinds = [
        next(iter(score.errors.values())).partition(":")[0] for score in scores if score.errors
    ]
    for kind in ("timeout", "memory", "error"):
        metrics[f"verifier/{kind}"] = kinds.count(kind)
    return metrics


def trace_records(
    sampled: Sampled, problems: list[Problem], scores: list[Score], tokenizer: Any
) -> list[dict[str, Any]]:
    """One JSON object a trace: what was sampled, exactly as trained, and how it was scored."""
    rows = zip(sampled.examples, sampled.traces, scores, sampled.advantages, strict=True)
    return [
        TraceRecord(
            problem=_storable(problems[example["problem"]]),
            trace=trace,
            reward=score.total,
            rewards=score.parts,
            reward_errors=score.errors,
            advantage=advantage,
            text=tokenizer.decode(list(trace.output_ids)),
        ).to_json()
        for example, trace, score, advantage in rows
    ]


def _storable(problem: Problem) -> Problem:
    """A run does not end because a task's metadata holds what JSON does not know."""
    return replace(problem, metadata=json_like(problem.metadata))


def _examples(problems: list[Problem]) -> list[Example]:
    """The training problems as rows, each once."""
    return [
        {"prompt": problem.messages, "answer": problem.answer, "problem": i}
        for i, problem in enumerate(problems)
    ]


def _trl_config(recipe: Recipe, spec: ChunkSpec, checkpoints: Path) -> GRPOConfig:
    """TRL's own settings, with its defaults replaced where they would change the method."""
    own = {"forward_tokens", "max_failed_share", "save_steps"}
    training = recipe.training.model_dump(exclude=own)
    make = partial(GRPOConfig, **training)
    return make(
        output_dir=str(checkpoints),
        seed=recipe.seed,
        steps_per_generation=recipe.training.gradient_accumulation_steps,
        max_completion_length=spec.budget,
        save_strategy="steps" if recipe.training.save_steps else "no",
        save_steps=recipe.training.save_steps or 500,
        bf16=False,
        gradient_checkpointing=False,
        use_vllm=False,
        disable_dropout=True,  # sampling has none
        logging_nan_inf_filter=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        shuffle_dataset=False,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
