"""A training run from a recipe to its table of results.

``train`` is the whole way: read the inputs, run the preflight checks, resume from a checkpoint,
start the engine, evaluate the base model, train, and evaluate the trained model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed

from delethink.config import Recipe, dump_recipe
from delethink.engines.factory import choose_engine, make_engine
from delethink.engines.loading import load_model
from delethink.errors import RunDirectoryError
from delethink.tasks import left_out_of
from delethink.training.checkpointing import (
    AtomicCheckpoints,
    Checkpoint,
    find_checkpoint,
    remove_unfinished,
)
from delethink.training.data_parallel import RankGroup, trace_cost
from delethink.training.grpo import DelethinkTrainer
from delethink.training.grpo_config import DelethinkConfig, lora, trl_config
from delethink.training.preflight import Inputs, Prepared, read_inputs, refuse_problems, run_checks
from delethink.training.progress import TrainingProgress, plot_metrics
from delethink.training.resume import RunLocation
from delethink.training.run_state import (
    TRAINED_SETTING,
    Example,
    ResultsTable,
    RunState,
    make_example,
)
from delethink.training.step_metrics import forward_metrics, logger_values
from delethink.training.weights import GatherWeights

FINAL_CHECKPOINT = "final"


def train(
    prepared: Prepared,
    location: RunLocation,
    progress: TrainingProgress,
    ranks: RankGroup | None = None,
) -> Path:
    """Run a recipe, or resume its run, and return the run directory.

    Args:
        prepared: recipe, tasks and scorers.
        location: run directory.
        progress: output on the terminal.
        ranks: all ranks; this is the main one.

    Raises:
        UserError: a mistake of the user, found before the first rollout.
        RolloutError, WeightSyncError: the run failed; the files written so far are complete.
    """
    try:
        return _train(prepared, location, progress, ranks or RankGroup())
    except BaseException:
        location.directory.discard_if_empty()
        raise
    finally:
        prepared.close()
        location.directory.release()


def _train(
    prepared: Prepared, location: RunLocation, progress: TrainingProgress, ranks: RankGroup
) -> Path:
    recipe, directory = prepared.recipe, location.directory
    set_seed(recipe.seed)
    inputs = read_inputs(prepared)
    progress.log(f"run directory: {directory.path}")
    checks = run_checks(prepared, inputs, directory.path)
    refuse_problems(checks, recipe.preflight)
    for check in checks:
        if check.status != "ok":
            progress.log(f"{check.status}: {check.name}: {check.found}; {check.advice}")

    model: Any = load_model(recipe.model, "float32", recipe.trust_remote_code)
    settings = trl_config(recipe, inputs.spec, directory.checkpoints)
    sampling_model = _sampling_model(recipe, model, settings.device)
    checkpoint = resume(location, recipe, progress) if location.exists else None
    _report_problems(prepared, inputs, location, progress)

    progress.log(f"starting the engine: {choose_engine(recipe.engine.name)}")
    engine = make_engine(
        recipe.engine,
        recipe.model,
        sampling_model,
        inputs.tokenizer,
        trust_remote_code=recipe.trust_remote_code,
        seed=recipe.seed,
        is_trained=sampling_model is model,
    )
    with closing(engine):
        state = RunState(prepared, inputs, directory, progress, engine, model)
        state.weights.check()
        heldout = inputs.selected["heldout"].problems
        table = ResultsTable(state, heldout, prepared.evaluation_scorer)
        table.add_baselines()
        _fit(state, table, settings, model, checkpoint, ranks)
        table.add_row(TRAINED_SETTING, inputs.spec)
        directory.finish(recipe.training.max_steps)
        progress.table(table.rows, inputs.spec, directory.path)
    return directory.path


def _sampling_model(recipe: Recipe, model: Any, device: Any) -> Any:
    """Return the model for an engine in this process."""
    if recipe.trainer.strategy != "fsdp2":
        return model.to(device)
    if choose_engine(recipe.engine.name) != "transformers":
        return model  # Workers load their own; the trainer shards this one.
    copy: Any = load_model(recipe.model, "float32", recipe.trust_remote_code)
    return copy.to(device)


# -- resuming ----------------------------------------------------------------------------------


def resume(location: RunLocation, recipe: Recipe, progress: TrainingProgress) -> Checkpoint | None:
    """Reset a run directory to its newest complete checkpoint, and return the checkpoint.

    Returns:
        ``None`` without a complete checkpoint; the run then starts at the first step.

    Raises:
        RunDirectoryError: the run is finished and its last checkpoint is gone, or a file cannot be
            written.
    """
    directory, max_steps = location.directory, recipe.training.max_steps
    if remove_unfinished(directory.checkpoints):
        progress.log("removed an incomplete checkpoint")
    checkpoint, rejected = find_checkpoint(directory.checkpoints)
    for text in rejected:
        progress.log(f"skipped an incomplete checkpoint: {text}")
    step = checkpoint.step if checkpoint else 0
    finished = directory.finished_step
    if finished is not None and step < finished:
        raise RunDirectoryError(
            f"{directory.path} holds a finished run of {finished} steps whose last checkpoint is "
            f"gone; to train further, start from its weights: "
            f"model={directory.checkpoints / FINAL_CHECKPOINT} output=PATH"
        )
    for key, (old, new) in location.changed.items():
        progress.log(f"{key} was {old} and is {new} from here on")
    rows = directory.read_table()
    if step < max_steps or "training.max_steps" in location.changed:
        rows = [row for row in rows if row["setting"] != TRAINED_SETTING]
    directory.write_table(rows)
    superseded = directory.reset_to(step, dump_recipe(recipe), location.changed)
    start = f"after step {step}" if step else "from the first step, as there is no checkpoint"
    progress.log(f"resuming the run {start}")
    if superseded:
        progress.log(
            f"moved the files of {len(superseded)} later steps, up to step {superseded[-1]}, to "
            f"{directory.path / 'superseded'}; these steps run again"
        )
    missing = sorted(set(range(1, step + 1)) - {line["step"] for line in directory.read_metrics()})
    if missing:
        progress.log(f"metrics.jsonl lacks {len(missing)} steps, the first is step {missing[0]}")
    return checkpoint


def _report_problems(
    prepared: Prepared, inputs: Inputs, location: RunLocation, progress: TrainingProgress
) -> None:
    """Write and print the numbers of used and omitted problems."""
    tasks = {"train": prepared.task, "heldout": prepared.evaluation_task}
    counts: dict[str, dict[str, Any]] = {
        split: {
            "taken": len(taken.problems),
            "overlong_queries": taken.overlong,
            "longest_query_passed_over": taken.longest,
            "left_out": left_out_of(tasks[split]),
        }
        for split, taken in inputs.selected.items()
    }
    location.directory.write_problems(counts)
    for split, taken in inputs.selected.items():
        if taken.overlong:
            progress.log(
                f"{split}: skipped {taken.overlong} of {taken.overlong + len(taken.problems)} "
                f"problems whose queries are too long (the longest has {taken.longest} tokens)"
            )
        if left_out := counts[split]["left_out"]:
            listed = ", ".join(f"{number} {reason}" for reason, number in left_out.items())
            progress.log(f"{split}: left out of the data set: {listed}")


# -- training ----------------------------------------------------------------------------------


class RunTrainer(AtomicCheckpoints, DelethinkTrainer):
    """``DelethinkTrainer`` with complete checkpoints and the metrics of a run.

    Args:
        on_step: receives the trainer's metrics of each step and returns the whole line for the
            experiment trackers.
    """

    def __init__(
        self, *args: Any, on_step: Callable[[dict[str, Any]], dict[str, Any]], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._on_step = on_step

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add the metrics of a run to the logs of a step."""
        if "loss" in logs:
            metrics = {
                "step": int(self.state.global_step),
                "loss": logs["loss"],
                "gradient_norm": logs["grad_norm"],
                "learning_rate": logs["learning_rate"],
                **forward_metrics(self.pop_statistics(), *self.pop_forward_counts()),
                **self.shards.metrics(),
            }
            line = self._on_step(metrics)
            logs = logs | (logger_values(line) if self.args.report_to else {})
        super().log(logs, start_time)


class StepCallback(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Measure the time of steps, and update the engine after each if rollouts are prefetched."""

    def __init__(self, state: RunState) -> None:
        self._state = state

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._state.metrics.start_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock, and let new weights enter at the next chunk boundaries."""
        self._state.metrics.stop_step()
        if self._state.recipe.training.max_staleness:
            self._state.weights.update()


def make_trainer(
    recipe: Recipe,
    ranks: RankGroup,
    *,
    model: Any,
    train_dataset: list[Example],
    callbacks: Sequence[TrainerCallback],
    **options: Any,
) -> RunTrainer:
    """Return the trainer of a recipe; all ranks use the dataset of the main rank."""
    trainer = RunTrainer(
        model=model,
        train_dataset=Dataset.from_list(ranks.broadcast(lambda: train_dataset)),
        ranks=ranks,
        cost=trace_cost(model.config.to_dict()),
        peft_config=lora(recipe.training.lora),
        callbacks=list(callbacks),
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        if isinstance(callback, GatherWeights):
            callback.trainer = trainer
    return trainer


def fit_ranks(trainer: RunTrainer, ranks: RankGroup, checkpoint: Checkpoint | None = None) -> None:
    """Train on all ranks, from the checkpoint of the main rank if it has one, and save weights."""
    path = ranks.broadcast(lambda: str(checkpoint.path) if checkpoint else None)
    trainer.train(resume_from_checkpoint=path)
    trainer.save_weights(FINAL_CHECKPOINT)


def _write_step(
    state: RunState, table: ResultsTable, trainer_metrics: dict[str, Any]
) -> dict[str, Any]:
    """Write the metrics of a step, evaluate if due, and return the line."""
    line = {
        **trainer_metrics,
        "policy_version": state.policy_version,
        "step_skipped": 0,
        **state.metrics.values,
        "heldout_accuracy": table.accuracy_at(trainer_metrics["step"]),
    }
    state.directory.add_metrics(line)
    state.progress.step(line, state.recipe.training.max_steps)
    return line


def _fit(
    state: RunState,
    table: ResultsTable,
    settings: DelethinkConfig,
    model: Any,
    checkpoint: Checkpoint | None,
    ranks: RankGroup,
) -> None:
    """Run the optimizer steps on the main rank, and plot the curves even if they fail."""
    recipe = state.recipe
    if checkpoint is not None:
        state.load_state_dict(checkpoint.run_state)
    trainer = make_trainer(
        recipe,
        ranks,
        model=model,
        processing_class=state.tokenizer,
        args=settings,
        train_dataset=[make_example(state.problems, i) for i in range(len(state.problems))],
        reward_funcs=[state.reward],
        run_rollouts=state.sample_batch,
        on_sampled=state.on_sampled,
        on_nonfinite=state.on_nonfinite,
        on_step=partial(_write_step, state, table),
        run_state=state.state_dict,
        callbacks=[state.weights.gathered, StepCallback(state)],
    )
    state.weights.trainer = trainer
    state.progress.start_steps(recipe.training.max_steps, checkpoint.step if checkpoint else 0)
    try:
        fit_ranks(trainer, ranks, checkpoint)
    finally:
        state.prefetch.close()
        state.progress.stop_steps()
        plot_metrics(state.directory.read_metrics(), recipe.name, state.directory.curves)
