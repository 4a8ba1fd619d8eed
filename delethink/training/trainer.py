"""A training run from its inputs to its table of results.

``run`` is the way from a started engine: load the model, resume from a checkpoint, evaluate the
base model, train, and evaluate the trained model. ``delethink.training.startup`` comes before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import rotate_checkpoints

from delethink.config import Recipe
from delethink.engines.base import Engine
from delethink.engines.factory import choose_engine, make_engine
from delethink.engines.loading import load_model, split_revision
from delethink.errors import RunDirectoryError
from delethink.tasks import left_out_of
from delethink.thinking_marks import marks_of
from delethink.training.checkpointing import (
    CHECKPOINT_PREFIX,
    FINAL_CHECKPOINT,
    Checkpoint,
    RunLocation,
    complete_folder,
    resume,
    write_run_state,
)
from delethink.training.data_parallel import RankGroup, trace_cost
from delethink.training.export import eval_command, export_weights, stored_dtype, write_card
from delethink.training.grpo import DelethinkTrainer
from delethink.training.grpo_config import DelethinkConfig, trl_config
from delethink.training.lora import lora
from delethink.training.metrics import forward_metrics, logger_values
from delethink.training.preflight import Inputs, Prepared
from delethink.training.progress import TrainingProgress, plot_metrics
from delethink.training.report import RunReport, kept_report
from delethink.training.run_directory import TRAINED_SETTING, RunDirectory
from delethink.training.run_state import (
    Example,
    ResultsTable,
    RunState,
    is_evaluated_at,
    make_example,
)
from delethink.training.weights import RankWeights, has_adapters, merged_state_dict


def run(
    prepared: Prepared,
    inputs: Inputs,
    finish_engine: Callable[[Callable[[], Engine]], Engine],
    location: RunLocation,
    progress: TrainingProgress,
    ranks: RankGroup | None = None,
) -> Path:
    """Train, and return the run directory; see ``startup.train``.

    ``finish_engine`` returns the engine, and calls its argument if none was begun.
    """
    recipe, directory = prepared.recipe, location.directory
    ranks = ranks or RankGroup()
    set_seed(recipe.seed)
    progress.wait("loading the model")
    model: Any = load_model(recipe.model, "float32", recipe.trust_remote_code)
    settings = trl_config(recipe, inputs.spec, directory.checkpoints)
    sampling_model = _sampling_model(recipe, model, settings.device)
    checkpoint = resume(location, recipe, progress) if location.exists else None
    directory.write_marks(marks_of(inputs.tokenizer).end)
    _report_problems(prepared, inputs, directory, progress)

    def make() -> Engine:
        progress.log(f"starting the engine: {choose_engine(recipe.engine.name)}")
        return make_engine(
            inputs.engine_config(recipe.engine),
            recipe.model,
            sampling_model,
            inputs.tokenizer,
            trust_remote_code=recipe.trust_remote_code,
            seed=recipe.seed,
            is_trained=sampling_model is model,
        )

    progress.wait("starting the engine")
    engine = finish_engine(make)
    with closing(engine), kept_report(directory.path, progress.log) as report:
        weights = RankWeights(model, inputs.engine_config(recipe.engine), ranks)
        state = RunState(prepared, inputs, directory, progress, engine, model, weights)
        progress.wait("loading the weights into the engine")
        weights.collect()
        state.weights.update()  # before the first rollout, to find an incompatible engine now
        heldout = inputs.selected["heldout"].problems
        table = ResultsTable(state, heldout, prepared.evaluation_scorer)
        table.add_baselines()
        base_dtype = stored_dtype(inputs.shell.config)
        _fit(state, table, report, settings, model, checkpoint, ranks, base_dtype)
        table.add_row(TRAINED_SETTING, inputs.spec)
        weights.close()
        trained = directory.checkpoints / FINAL_CHECKPOINT
        write_card(trained, recipe, inputs.spec, table.rows)
        directory.finish(recipe.training.max_steps)
        progress.table(table.rows, inputs.spec, directory.path)
        progress.log(f"trained model: {trained}")
        progress.log(f"measure it: {eval_command(recipe, directory.path)}")
    return directory.path


def _sampling_model(recipe: Recipe, model: Any, device: Any) -> Any:
    """Return the model for an engine in this process."""
    if recipe.trainer.strategy != "fsdp2":
        return model.to(device)
    if choose_engine(recipe.engine.name) != "transformers":
        return model  # Workers load their own; the trainer shards this one.
    copy: Any = load_model(recipe.model, "float32", recipe.trust_remote_code)
    return copy.to(device)


def _report_problems(
    prepared: Prepared, inputs: Inputs, directory: RunDirectory, progress: TrainingProgress
) -> None:
    """Write and print the numbers of used and omitted problems."""
    counts: dict[str, dict[str, Any]] = {}
    for split, task in (("train", prepared.task), ("heldout", prepared.evaluation_task)):
        selected, left_out = inputs.selected[split], left_out_of(task)
        counts[split] = {
            "taken": len(selected.problems),
            "overlong_queries": selected.overlong,
            "longest_query_passed_over": selected.longest,
            "left_out": left_out,
        }
        if selected.overlong:
            progress.log(
                f"{split}: skipped {selected.overlong} of "
                f"{selected.overlong + len(selected.problems)} problems whose queries are too long "
                f"(the longest has {selected.longest} tokens)"
            )
        if left_out:
            listed = ", ".join(f"{number} {reason}" for reason, number in left_out.items())
            progress.log(f"{split}: left out of the data set: {listed}")
    directory.write_problems(counts)
    if len(prepared.recipe.rewards) > 1 and not prepared.recipe.evaluation.reward:
        accuracy = prepared.recipe.accuracy_reward
        progress.log(f"accuracy: {accuracy}, the first reward (evaluation.reward names another)")


TENSORBOARD = "tensorboard"  # folder of the event files in a run

# -- training ----------------------------------------------------------------------------------


class RunTrainer(DelethinkTrainer):
    """``DelethinkTrainer`` with complete checkpoints and the metrics of a run."""

    def __init__(
        self,
        *args: Any,
        weights: RankWeights,
        is_evaluated_at: Callable[[int], bool],  # a step
        on_step: Callable[[dict[str, Any]], dict[str, Any]],  # from metrics to the trackers' line
        run_state: Callable[[], dict[str, Any]],  # saved beside the trainer's own state
        on_token_stats: Callable[[list[dict[str, Any]]], None] = lambda values: None,
        final_dtype: torch.dtype = torch.float32,  # of the trained model's files
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args, before_rollouts=weights.collect, after_rollouts=weights.release, **kwargs
        )
        weights.trainer = self
        self._weights, self._is_evaluated_at = weights, is_evaluated_at
        self._final_dtype = final_dtype
        self._on_step, self._run_state = on_step, run_state
        self._on_token_stats = on_token_stats
        self._output_dir: str | None = None  # while a checkpoint is written
        self.add_callback(_SaveBetweenBatches(self))

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
            self._on_token_stats(self.pop_token_stats())
            is_evaluated = self._is_evaluated_at(metrics["step"])
            if is_evaluated:
                self._weights.collect()
            line = self._on_step(metrics)
            if is_evaluated:
                self._weights.release()
            logs = logs | (logger_values(line) if self.args.report_to else {})
        super().log(logs, start_time)

    def collect_weights(self) -> None:
        """Make the trained weights ready for the engine. A collective."""
        self._weights.collect()

    def save_weights(self, name: str) -> None:
        """Save the weights in the base's data type and the tokenizer, completely or not at all.

        Low-rank adapters are merged, so that the weights load like any others, and also saved
        beside them.

        Raises:
            RunDirectoryError: they cannot be written.
        """
        with self._complete_folder(name) as path:
            model = self.accelerator.unwrap_model(self.model)
            adapted = has_adapters(model)
            base = model.get_base_model() if adapted else model
            if adapted:
                weights = merged_state_dict(base)
            else:  # gathered from all ranks if the model is sharded
                weights = self.accelerator.get_state_dict(self.model)
            if not self.args.should_save:
                return
            if adapted:
                model.save_pretrained(path / "adapter")
            export_weights(base, weights, self._final_dtype, path)
            self.processing_class.save_pretrained(path)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card beside checkpoints; the trained model has its own (``write_card``)."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        with self._complete_folder(f"{CHECKPOINT_PREFIX}{step}") as path:
            self._output_dir = str(path.parent)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._output_dir = None
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_run_state(path, step, self._run_state())
        if self.args.should_save:
            rotate_checkpoints(self.args.output_dir, self.args.save_total_limit)

    def _complete_folder(self, name: str) -> AbstractContextManager[Path]:
        path = Path(self.args.output_dir) / name
        return complete_folder(path, self.args.should_save, self.accelerator.wait_for_everyone)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that lacks weights or has others; transformers only warns."""
        model = self.accelerator.unwrap_model(self.model)
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        missing = set(load_result.missing_keys) - tied
        if missing or load_result.unexpected_keys:
            names = sorted(missing | set(load_result.unexpected_keys))
            raise RunDirectoryError(
                f"cannot resume: the checkpoint in {self.args.output_dir} lacks weights or has "
                f"others than the model, {len(names)} in all: {', '.join(names[:3])}"
            )
        super()._issue_warnings_after_load(load_result)

    def _get_output_dir(self, trial: Any) -> str:
        return self._output_dir or str(super()._get_output_dir(trial))


class _SaveBetweenBatches(TrainerCallback):  # type: ignore[misc]  # transformers' are untyped
    """Delay checkpoints until the trainer is between batches."""

    def __init__(self, trainer: RunTrainer) -> None:
        self._trainer, self._is_due = trainer, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Decide whether to save after this step."""
        is_due = self._is_due or control.should_save
        control.should_save = is_due and self._trainer.is_between_batches
        self._is_due = is_due and not control.should_save
        return control


def make_trainer(
    recipe: Recipe,
    ranks: RankGroup,
    *,
    model: Any,
    train_dataset: list[Example],
    callbacks: list[TrainerCallback],
    **options: Any,
) -> RunTrainer:
    """Return the trainer of a recipe; all ranks use the dataset of the main rank."""
    examples = ranks.broadcast(lambda: train_dataset)
    # Rows without a trace have examples too; a batch of rollouts has its own problems anyway.
    training = recipe.training
    filler = training.rows_per_step(ranks.size) - training.traces_per_step
    steps = training.traces_per_batch // training.traces_per_step
    examples = examples + examples[:1] * (filler * steps // training.num_generations)
    trainer = RunTrainer(
        model=model,
        train_dataset=Dataset.from_list(examples),
        ranks=ranks,
        cost=trace_cost(model.config.to_dict()),
        peft_config=lora(recipe.training.lora, split_revision(recipe.model)[1]),
        callbacks=callbacks,
        is_evaluated_at=partial(is_evaluated_at, recipe),
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def fit_ranks(trainer: RunTrainer, ranks: RankGroup, checkpoint: Checkpoint | None = None) -> None:
    """Train on all ranks, from the checkpoint of the main rank if it has one, and save weights."""
    path = ranks.broadcast(lambda: str(checkpoint.path) if checkpoint else None)
    trainer.train(resume_from_checkpoint=path)
    trainer.save_weights(FINAL_CHECKPOINT)
    trainer.collect_weights()


def _write_tensorboard(trainer: RunTrainer, folder: Path, step: int) -> None:
    """Write the event files to ``folder``; by default they would lie among the checkpoints.

    Earlier files may hold steps after ``step``, which run again; TensorBoard then leaves them out.
    """
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    trainer.remove_callback(TensorBoardCallback)
    writer = SummaryWriter(log_dir=str(folder), purge_step=step + 1)
    trainer.add_callback(TensorBoardCallback(writer))


def _fit(
    state: RunState,
    table: ResultsTable,
    report: RunReport,
    settings: DelethinkConfig,
    model: Any,
    checkpoint: Checkpoint | None,
    ranks: RankGroup,
    base_dtype: torch.dtype,
) -> None:
    """Run the optimizer steps on the main rank, and plot the curves even if they fail."""
    recipe, done = state.recipe, checkpoint.step if checkpoint else 0
    if checkpoint is not None:
        state.load_state_dict(checkpoint.run_state)

    def write_step(trainer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Write the metrics of a step, evaluate if due, and return the line."""
        line = {
            **trainer_metrics,
            "policy_version": state.policy_version,
            "step_skipped": 0,
            **state.metrics.values,
            "heldout_accuracy": table.accuracy_at(trainer_metrics["step"]),
        }
        state.directory.add_metrics(line)
        report.update()
        state.progress.step(line, recipe.training.max_steps)
        return line

    state.progress.wait("preparing the trainer")
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
        on_step=write_step,
        on_token_stats=state.on_token_stats,
        run_state=state.state_dict,
        final_dtype=base_dtype,
        weights=state.weights.ranks,
        callbacks=[state],
    )
    if (said := state.weights.choose_updates()) is not None:
        state.progress.log(said)
    if "tensorboard" in recipe.training.report_to:
        _write_tensorboard(trainer, state.directory.path / TENSORBOARD, done)
    state.progress.start_steps(recipe.training.max_steps, done)
    try:
        fit_ranks(trainer, ranks, checkpoint)
    finally:
        state.prefetch.close()
        state.progress.stop_steps()
        plot_metrics(state.directory.read_metrics(), recipe.name, state.directory.curves)
