"""TRL settings of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trl import GRPOConfig

from delethink.chunking import ChunkSpec
from delethink.config import Recipe, TrainerConfig, TrainingConfig

# Training keys of a recipe that TRL does not read.
_NOT_OF_TRL = {
    "max_sampling_rounds",
    "max_staleness",
    "on_nonfinite",
    "save_steps",
    "lora",
    "report_to",
    "steps_per_generation",
}


@dataclass
class DelethinkConfig(GRPOConfig):  # type: ignore[misc]  # TRL is untyped
    """``GRPOConfig`` with the defaults of the method, and the settings that TRL lacks."""

    loss_type: str = "grpo"
    vllm_importance_sampling_mode: str = "token_truncate"
    vllm_importance_sampling_clip_max: float = 2.0
    router_aux_loss_coef: float = 0.0  # the loss is a sum over tokens, without a router term
    mask_out_of_budget: bool = False  # leave traces out of budget out of the loss and its mean
    forward_tokens: int = 16_384  # at most, in one forward pass with its padding
    max_failed_share: float = 0.1  # of the traces of a batch
    trace_token_stats: bool = False  # keep log-probs and entropies of single tokens
    filler_rows: int = 0  # of an optimizer step over all ranks, so that they have equally many


def trl_config(recipe: Recipe, spec: ChunkSpec, checkpoints: Path) -> DelethinkConfig:
    """Return the TRL settings of a recipe, without TRL's defaults that would change the method."""
    training = recipe.training
    values: dict[str, Any] = training.model_dump(exclude=_NOT_OF_TRL)
    values |= batch_settings(training, recipe.trainer.num_ranks)
    rows = training.rows_per_step(recipe.trainer.num_ranks)
    values |= {"filler_rows": rows - training.traces_per_step}
    values |= {"use_cpu": not torch.accelerator.is_available()}  # bf16 needs it set
    return DelethinkConfig(
        **(values | rank_settings(recipe.trainer)),
        output_dir=str(checkpoints),
        seed=recipe.seed,
        max_completion_length=spec.budget,
        mask_out_of_budget=recipe.scoring.out_of_budget == "mask",
        save_strategy="steps" if training.save_steps else "no",
        save_steps=training.save_steps or 500,
        use_vllm=False,
        # The unbiased KL gradient of TRL is defined for token ratios.
        use_bias_correction_kl=training.importance_sampling_level == "token",
        disable_dropout=True,  # the engine samples without dropout
        logging_nan_inf_filter=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        shuffle_dataset=False,
        logging_steps=1,
        report_to=training.report_to or "none",
        run_name=recipe.name,
        disable_tqdm=True,
    )


def batch_settings(training: TrainingConfig, num_ranks: int) -> dict[str, int]:
    """Return the micro-batch settings of one rank.

    An optimizer step has the same traces for any number of ranks, and filler rows if they do not
    divide. The micro-batch is the largest divisor of a rank's rows up to
    ``per_device_train_batch_size``.
    """
    share = training.rows_per_step(num_ranks) // num_ranks
    steps = training.traces_per_batch // training.traces_per_step
    limit = min(training.per_device_train_batch_size, share)
    size = next(n for n in range(limit, 0, -1) if share % n == 0)
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": share // size,
        "steps_per_generation": steps * share // size,
    }


def rank_settings(trainer: TrainerConfig) -> dict[str, Any]:
    """Return the DDP or FSDP settings; none without Ray Train."""
    if not trainer.uses_ray_train:
        return {}
    settings: dict[str, Any] = {"use_cpu": trainer.gpus_per_rank == 0}
    if trainer.strategy == "fsdp2":
        return settings | {"fsdp": True, "fsdp_config": {"version": 2}}
    # A micro-batch has many forward passes, and DDP would synchronize buffers and search for unused
    # parameters in each. Buffers are equal on all ranks, and every parameter is used.
    return settings | {"ddp_broadcast_buffers": False, "ddp_find_unused_parameters": False}
