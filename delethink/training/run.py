"""A training run from a recipe to its table."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import GRPOConfig

from delethink.config import Recipe
from delethink.errors import ConfigError, RolloutError
from delethink.evaluation.evaluate import Evaluator, Summary
from delethink.policy import Sampling
from delethink.query import query_ids
from delethink.registry import resolve
from delethink.rollout import derive_seed, play_traces, replay_trace
from delethink.rule import ChunkSpec, start
from delethink.serving.checkpoint import (
    eos_ids,
    load_model,
    load_tokenizer,
    longest_sequence,
    vocabulary_size,
)
from delethink.serving.engine import Engine
from delethink.serving.factory import choose_engine, make_engine
from delethink.traces import TraceRecord
from delethink.training.curves import plot_curves
from delethink.training.grpo import DelethinkTrainer, Sampled
from delethink.training.preflight import Prepared
from delethink.training.progress import Reporter
from delethink.training.run_directory import RunDirectory
from delethink.types import Problem, Trace, TraceStop

Example = dict[str, Any]  # a row of the dataset: prompt, answer
RewardFunction = Callable[[str, str], float]


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
    recipe, task, rewards, run = prepared
    set_seed(recipe.seed)
    _check_devices()
    tokenizer = load_tokenizer(recipe.model, recipe.trust_remote_code)
    model = load_model(recipe.model, "float32", recipe.trust_remote_code)
    eos_ids(model, tokenizer)
    heldout = [task.problem("heldout", i) for i in range(recipe.evaluation.num_problems)]
    examples = _examples(recipe, task)
    asked = [*examples, *heldout]
    spec = recipe.thinking.spec().bind(tokenizer)
    _check_queries(spec, tokenizer, asked, longest_sequence(model))
    trl_config = _trl_config(recipe, spec, run.checkpoints)
    model.to(trl_config.device)

    reporter.say(f"run directory: {run.path}")
    reporter.say(f"starting the engine: {choose_engine(recipe.engine)}")
    with closing(_make_engine(recipe, model, tokenizer)) as engine:
        score, temperature = rewards[recipe.accuracy_reward], recipe.training.temperature
        evaluator = Evaluator(heldout, score, tokenizer, temperature, recipe.seed)
        job = _Job(recipe, spec, run, reporter, engine, evaluator, task, tokenizer, model)
        job.measure_baselines()
        job.fit(examples, rewards, trl_config)
        job.add_row("after RL, Delethink", spec)
        reporter.table(job.rows, spec, run.path)
    return run.path


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
    task: Any
    tokenizer: Any
    model: Any
    trainer: Any = None
    version: int = 0  # of the weights that the engine serves
    seconds_weight_update: float = 0.0  # since the last step was logged
    rows: list[Summary] = field(default_factory=list)  # of the table
    step: dict[str, float] = field(default_factory=dict)  # measured for the step at hand

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

    def fit(
        self, examples: list[Example], rewards: dict[str, RewardFunction], trl_config: GRPOConfig
    ) -> None:
        """The optimizer steps; the curves are drawn also where they are cut short."""
        recipe = self.recipe
        self.trainer = DelethinkTrainer(
            model=self.model,
            processing_class=self.tokenizer,
            args=trl_config,
            train_dataset=Dataset.from_list(examples),
            reward_funcs=[
                _trl_reward(name, self.make_env(reward)) for name, reward in rewards.items()
            ],
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

    def make_env(self, reward: RewardFunction) -> Any:
        """The thinking environment with one of the recipe's rewards."""
        return resolve("delethink.envs", "thinking")(
            task=self.task,
            reward=reward,
            tokenizer=self.tokenizer,
            chunk_spec=self.spec,
            eos_ids=eos_ids(self.model, self.tokenizer),
            vocabulary=vocabulary_size(self.model),
            max_query_tokens=self.engine.max_model_tokens,
        )

    def play(self, examples: list[Example]) -> list[Trace]:
        """A trace for each example, with the current weights."""
        self.serve_current_weights()
        started = time.perf_counter()
        seed = derive_seed("training", self.recipe.seed, self.version)
        queries = [query_ids(self.tokenizer, _problem_of(example)) for example in examples]
        samplings = [
            Sampling(self.recipe.training.temperature, derive_seed(seed, i))
            for i in range(len(examples))
        ]
        longest = self.engine.max_model_tokens
        traces = asyncio.run(play_traces(self.engine, self.spec, queries, samplings, longest))
        self.step["seconds_sampling"] = time.perf_counter() - started
        return traces

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
        step = int(self.trainer.state.global_step) + 1
        self.run.add_traces(step, trace_records(sampled, self.tokenizer))


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
        step["seconds_training"] = whole - step["seconds_sampling"] - (updated - self._updated)
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


def trace_records(sampled: Sampled, tokenizer: Any) -> list[dict[str, Any]]:
    """One JSON object a trace: what was sampled, exactly as trained."""
    rows = zip(sampled.examples, sampled.traces, sampled.rewards, sampled.advantages, strict=True)
    return [
        TraceRecord(
            problem=_problem_of(example),
            trace=trace,
            rewards=rewards,
            advantage=advantage,
            text=tokenizer.decode(list(trace.output_ids)),
        ).to_json()
        for example, trace, rewards, advantage in rows
    ]


def _problem(prompt: Any, answer: str) -> Problem:
    return Problem(prompt[-1]["content"], answer)


def _problem_of(example: Example) -> Problem:
    return _problem(example["prompt"], example["answer"])


def _examples(recipe: Recipe, task: Any) -> list[Example]:
    """As many training problems as the run uses, each once."""
    training = recipe.training
    needed = training.max_steps * training.traces_per_step // training.num_generations
    problems = [task.problem("train", i) for i in range(needed)]
    return [
        {"prompt": [{"role": "user", "content": p.prompt}], "answer": p.answer} for p in problems
    ]


def _check_queries(
    spec: ChunkSpec, tokenizer: Any, asked: list[Example | Problem], max_model_tokens: int
) -> None:
    for one in asked:
        problem = one if isinstance(one, Problem) else _problem_of(one)
        start(spec, query_ids(tokenizer, problem), max_model_tokens)


def _trl_reward(name: str, env: Any) -> Any:
    """What an environment pays, as TRL asks for it; a failed trace has no reward.

    Each trace is replayed through the environment, which also proves that it was sampled by the
    environment's own rule.
    """

    def scored(
        prompts: list[Any], trace: list[Trace], answer: list[str], **columns: Any
    ) -> list[float | None]:
        return [
            None if t.stop.is_failure else replay_trace(env, _problem(p, gold), t)
            for p, t, gold in zip(prompts, trace, answer, strict=True)
        ]

    scored.__name__ = name
    return scored


def _trl_config(recipe: Recipe, spec: ChunkSpec, checkpoints: Path) -> GRPOConfig:
    """TRL's own settings, with its defaults replaced where they would change the method."""
    own = {"forward_tokens", "max_failed_share", "save_steps"}
    training = recipe.training.model_dump(exclude=own)
    make = partial(GRPOConfig, **training)
    return make(
        output_dir=str(checkpoints),
        seed=recipe.seed,
        reward_weights=list(recipe.rewards.values()),
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
