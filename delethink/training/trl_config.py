"""A recipe in TRL's own words."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from trl import GRPOConfig

from delethink.config import Recipe
from delethink.rule import ChunkSpec


def trl_config(recipe: Recipe, spec: ChunkSpec, checkpoints: Path) -> GRPOConfig:
    """TRL's own settings, with its defaults replaced where they would change the method."""
    own = {"forward_tokens", "max_failed_share", "on_nonfinite", "save_steps"}
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
