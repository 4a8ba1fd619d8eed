"""A training run from a recipe to its table."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from delethink.config import Recipe, dump_recipe
from delethink.engines.base import Engine
from delethink.engines.factory import choose_engine, make_engine
from delethink.engines.loading import load_model
from delethink.errors import ConfigError, RunDirectoryError
from delethink.evaluation.heldout import Evaluator, HeldOutResult
from delethink.tasks import Taken, left_out_of
from delethink.training.checkpointing import Checkpoint, find, remove_unfinished
from delethink.training.data_parallel import Processes
from delethink.training.grpo_config import trl_config
from delethink.training.preflight import (
    Inputs,
    Place,
    Prepared,
    check_run,
    read_inputs,
    refuse_problems,
)
from delethink.training.progress import Reporter
from delethink.training.run_directory import RunDirectory
from delethink.training.run_state import AFTER, Job


def train(
    prepared: Prepared, place: Place, reporter: Reporter, processes: Processes | None = None
) -> Path:
    """Runs a recipe, or goes on with its run, and returns the path of its run directory.

    Args:
        prepared: the recipe.
        place: where it writes.
        reporter: told the course of the run.
        processes: that train together, of which this is the first.

    Raises:
        UserError: something the user can mend, before anything is sampled.
        RolloutError, WeightSyncError: the run broke; what was written stays whole.
    """
    try:
        return _run(prepared, place, reporter, processes or Processes())
    except BaseException:
        place.run.discard_if_empty()
        raise
    finally:
        prepared.close()
        place.run.release()


def _run(prepared: Prepared, place: Place, reporter: Reporter, processes: Processes) -> Path:
    recipe, run = prepared.recipe, place.run
    set_seed(recipe.seed)
    _check_devices()
    inputs = read_inputs(prepared)
    reporter.say(f"run directory: {run.path}")
    _preflight(prepared, inputs, run, reporter)
    model = load_model(recipe.model, "float32", recipe.trust_remote_code)
    tokenizer, spec = inputs.tokenizer, inputs.spec
    settings = trl_config(recipe, spec, run.checkpoints)
    sampled_from = _sampled_from(recipe, model, settings.device)

    checkpoint = _take_up(place, recipe, reporter) if place.begun else None
    _report_problems(prepared, run, inputs.taken, reporter)
    reporter.say(f"starting the engine: {choose_engine(recipe.engine.name)}")
    problems, heldout = inputs.taken["train"].problems, inputs.taken["heldout"].problems
    with closing(_make_engine(recipe, sampled_from, tokenizer, sampled_from is model)) as engine:
        temperature, scorer = recipe.training.temperature, prepared.scorer
        evaluator = Evaluator(
            heldout, prepared.evaluation_scorer, tokenizer, temperature, recipe.seed
        )
        job = Job(
            recipe,
            spec,
            run,
            reporter,
            engine,
            evaluator,
            problems,
            scorer,
            tokenizer,
            model,
            processes,
        )
        job.rows = [HeldOutResult.from_dict(row) for row in run.read_table()]
        job.prove_updates()
        job.measure_baselines()
        job.fit(settings, checkpoint)
        job.add_row(AFTER, spec)
        run.finish(recipe.training.max_steps)
        reporter.table(job.rows, spec, run.path)
    return run.path


def _preflight(prepared: Prepared, inputs: Inputs, run: RunDirectory, reporter: Reporter) -> None:
    """Says what is close or cannot be known, and ends a run that cannot go well."""
    checks = check_run(prepared, inputs, run.path)
    refuse_problems(checks, prepared.recipe.preflight)
    for check in checks:
        if check.status != "ok":
            reporter.say(f"{check.status}: {check.name}: {check.found}; {check.advice}")


def _take_up(place: Place, recipe: Recipe, reporter: Reporter) -> Checkpoint | None:
    """Goes back to the newest whole checkpoint, and says all that is not as it was."""
    run, last = place.run, recipe.training.max_steps
    if remove_unfinished(run.checkpoints):
        reporter.say("a checkpoint that was not written to its end is taken away")
    checkpoint, rejected = find(run.checkpoints)
    for text in rejected:
        reporter.say(f"not whole, and passed over: {text}")
    step = checkpoint.step if checkpoint else 0
    finished = run.finished_step
    if finished is not None and step < finished:
        raise RunDirectoryError(
            f"{run.path} holds a finished run of {finished} steps whose last checkpoint is gone; "
            f"to train on, start from its weights: model={run.checkpoints}/final output=PATH"
        )
    for key, (old, new) in place.changed.items():
        reporter.say(f"{key} was {old} and is {new} from here on")
    rows = run.read_table()
    if step < last or "training.max_steps" in place.changed:
        rows = [row for row in rows if row["setting"] != AFTER]
    run.write_table(rows)
    superseded = run.take_up(step, dump_recipe(recipe), place.changed)
    begins = f"after step {step}" if step else "from the first step, as there is no checkpoint"
    reporter.say(f"taking the run up {begins}")
    if superseded:
        reporter.say(
            f"what was written beyond it, of {len(superseded)} steps up to {superseded[-1]}, lies "
            f"under {run.path / 'superseded'} now; they are made again"
        )
    missing = sorted(set(range(1, step + 1)) - {line["step"] for line in run.read_metrics()})
    if missing:
        reporter.say(
            f"metrics.jsonl has no line of {len(missing)} steps, the first one {missing[0]}"
        )
    return checkpoint


def _report_problems(
    prepared: Prepared, run: RunDirectory, taken: dict[str, Taken], reporter: Reporter
) -> None:
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
    run.write_problems(counts)
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


def _sampled_from(recipe: Recipe, model: Any, device: Any) -> Any:
    """The model that an engine in this process samples from; of others only settings are read."""
    if recipe.trainer.strategy != "fsdp2":
        return model.to(device)
    if choose_engine(recipe.engine.name) == "vllm":
        return model  # which the trainer moves, in pieces
    copy: Any = load_model(recipe.model, "float32", recipe.trust_remote_code)
    return copy.to(device)


def _make_engine(recipe: Recipe, model: Any, tokenizer: Any, is_trained: bool) -> Engine:
    return make_engine(
        recipe.engine,
        recipe.model,
        model,
        tokenizer,
        trust_remote_code=recipe.trust_remote_code,
        seed=recipe.seed,
        is_trained=is_trained,
    )
