"""The trained model as a folder that any library loads: weights, tokenizer and model card.

Weights have the data type of the base model, and low-rank adapters are merged; the adapters are
also saved beside them. The card and the next command are written when the results are known.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from delethink.chunking import ChunkSpec
from delethink.config import Recipe
from delethink.engines.loading import split_revision
from delethink.errors import ModelError
from delethink.evaluation.heldout import HeldOutResult
from delethink.json_io import as_mapping, read_json
from delethink.redaction import json_text
from delethink.training.run_directory import describe_environment, write_text

CARD = "README.md"


def stored_dtype(config: Any) -> torch.dtype:
    """Return the data type of a model's weight files, from its configuration."""
    for part in (config, config.get_text_config()):
        if isinstance(dtype := getattr(part, "dtype", None), torch.dtype):
            return dtype
    return torch.float32


def export_weights(
    model: Any, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, path: Path
) -> None:
    """Write configuration and weights, with floating-point weights in ``dtype``.

    ``model`` has no adapters and gives the layout; ``weights`` are whole.
    """
    tied = set(
        getattr(model, "all_tied_weights_keys", None) or ()
    )  # a cast copy would be saved too
    cast = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
        if name not in tied
    }
    model.save_pretrained(path, state_dict=cast)
    # save_pretrained names the data type of the model, which trains in float32.
    config = as_mapping(read_json(path / "config.json", ModelError), "config.json")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = str(dtype).removeprefix("torch.")
    write_text(path / "config.json", json_text(config, indent=2) + "\n")


def write_card(path: Path, recipe: Recipe, spec: ChunkSpec, rows: Sequence[HeldOutResult]) -> None:
    """Write the model card: base, objective, chunk sizes, held-out results and versions."""
    training = recipe.training
    base, is_folder = recipe.model, Path(recipe.model).exists()
    name = Path(base).name if is_folder else split_revision(base)[0]
    front = ["library_name: transformers", "tags: [delethink, grpo, markovian-thinker]"]
    if not is_folder and base != "toy":
        front.insert(0, f"base_model: {name}")
    sizes = {
        "context size C": spec.context_size,
        "carryover size m": spec.carryover_size,
        "maximum chunks I": spec.max_chunks,
        "thinking budget": spec.budget,
        "optimizer steps": training.max_steps,
        "traces per step": training.traces_per_step,
        "learning rate": f"{training.learning_rate:g}",
        "temperature": f"{training.temperature:g}",
        "seed": recipe.seed,
    }
    lines = ["---", *front, "---", "", f"# {recipe.name}", ""]
    lines += [
        f"{name}, trained with reinforcement learning in the thinking environment of delethink "
        f"on the task {recipe.task.name} with the rewards {', '.join(recipe.rewards)}.",
        "After every chunk of thinking the context is reset to the query and a bounded carryover.",
        "",
        "| setting | value |",
        "| --- | --- |",
        *(f"| {key} | {value} |" for key, value in sizes.items()),
        "",
    ]
    if rows:
        lines += [f"{rows[0].num_problems} held-out problems, intervals of 95 %:", ""]
        lines += ["| setting | accuracy | thinking tokens |", "| --- | --- | --- |"]
        lines += [
            f"| {row.setting} | {row.accuracy_text(' to ')} | {row.thinking_tokens:.0f} |"
            for row in rows
        ]
        lines.append("")
    packages = describe_environment()["packages"]
    lines += [f"Versions: {', '.join(f'{k} {v}' for k, v in packages.items() if v)}.", ""]
    write_text(path / CARD, "\n".join(lines))


def eval_command(recipe: Recipe, run: Path) -> str:
    """Return the command that compares the trained model of a run with its base."""
    return shlex.join(["delethink", "eval", "-m", f"{recipe.model},{run}"])
