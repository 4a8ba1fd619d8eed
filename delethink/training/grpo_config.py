"""A recipe in TRL's own words."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from trl import GRPOConfig

from delethink.chunking import ChunkSpec
from delethink.config import LoraConfig, Recipe
from delethink.training.data_parallel import batch_settings, process_settings
from delethink.training.grpo import Objective

# Settings of a recipe that are not GRPOConfig's own, or that the trainer does itself.
_OWN = {
    "forward_tokens",
    "max_failed_share",
    "max_sampling_rounds",
    "max_staleness",
    "on_nonfinite",
    "save_steps",
    "lora",
    "report_to",
    "steps_per_generation",
    "loss_type",
    "importance_sampling_level",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
}


def trl_config(recipe: Recipe, spec: ChunkSpec, checkpoints: Path) -> GRPOConfig:
    """TRL's own settings, with its defaults replaced where they would change the method."""
    training = recipe.training
    batches = batch_settings(training, recipe.trainer.num_ranks)
    values = training.model_dump(exclude=_OWN) | batches | process_settings(recipe.trainer)
    make = partial(GRPOConfig, **values)
    return make(
        output_dir=str(checkpoints),
        seed=recipe.seed,
        max_completion_length=spec.budget,
        save_strategy="steps" if training.save_steps else "no",
        save_steps=training.save_steps or 500,
        use_cpu=not torch.accelerator.is_available(),  # bf16 wants to be told
        use_vllm=False,
        # TRL's unbiased gradient of the divergence is one of token ratios.
        use_bias_correction_kl=training.importance_sampling_level == "token",
        disable_dropout=True,  # sampling has none
        logging_nan_inf_filter=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        shuffle_dataset=False,
        logging_steps=1,
        report_to=training.report_to or "none",
        run_name=recipe.name,
        disable_tqdm=True,
    )


def objective(recipe: Recipe) -> Objective:
    """What of a recipe is the trainer's own."""
    training = recipe.training
    mode = training.vllm_importance_sampling_mode.removeprefix("token_")
    return Objective(
        loss_type=training.loss_type,
        importance_sampling_level=training.importance_sampling_level,
        correction=mode if training.vllm_importance_sampling_correction else None,
        correction_cap=training.vllm_importance_sampling_clip_max,
        mask_budget=recipe.scoring.out_of_budget == "mask",
        forward_tokens=training.forward_tokens,
        max_failed_share=training.max_failed_share,
    )


def lora(config: LoraConfig | None) -> Any:
    """PEFT's own settings; ``None`` where all weights are trained."""
    if config is None:
        return None
    import peft

    # Dropout is left at 0: sampling has none.
    return peft.LoraConfig(**config.model_dump(), task_type="CAUSAL_LM")
