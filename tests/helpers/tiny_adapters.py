"""Folders of tiny models and of LoRA adapters trained on them, with byte tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from chat_tokenizers import make_chat_tokenizer
from safetensors.torch import load_file, save_file
from tiny_models import make_qwen2
from transformers import PreTrainedModel

MARKS = ("<think>", "</think>")
VOCABULARY = 260  # 256 bytes, padding, end and the marks
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<think>{% endif %}"
)
TARGETS = ["q_proj", "v_proj", "down_proj"]


def save_model(folder: Path, *, marks: tuple[str, ...] = MARKS, **sizes: Any) -> Path:
    """Save a Qwen2 with its tokenizer; return the folder."""
    tokenizer = make_chat_tokenizer(TEMPLATE, marks)
    defaults: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    make_qwen2(0, **(defaults | sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype)
    return model


def save_adapter(
    folder: Path, base: Path, change: Callable[[Any], None] | None = None, **settings: Any
) -> Path:
    """Save an adapter of random weights; return its folder.

    Args:
        folder: of the adapter.
        base: folder of its model.
        change: changes the model with the adapter before it is saved.
        settings: of PEFT's ``LoraConfig``, over rank 4 on ``TARGETS``.
    """
    torch.manual_seed(7)
    defaults: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": TARGETS,
        "task_type": "CAUSAL_LM",
    }
    adapted = peft.get_peft_model(load_base(base), peft.LoraConfig(**(defaults | settings)))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    if change is not None:
        change(adapted)
    adapted.save_pretrained(str(folder))
    return folder


def edit_settings(folder: Path, **values: Any) -> None:
    """Change values of ``adapter_config.json``; ``None`` removes a key."""
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text()) | values
    kept = {key: value for key, value in settings.items() if value is not None}
    file.write_text(json.dumps(kept))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the weights of an adapter in place."""
    weights: dict[str, torch.Tensor] = dict(load_file(folder / "adapter_model.safetensors"))
    change(weights)
    save_file(_contiguous(weights), folder / "adapter_model.safetensors")


def _contiguous(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in weights.items()}
