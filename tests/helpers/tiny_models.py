"""Models of random weights, small enough for a test and large enough to tell tokens apart."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

EOS, PAD = 1, 0


def make_qwen2(seed: int, scale: float = 5.0, **sizes: Any) -> Qwen2ForCausalLM:
    """A Qwen2 of two layers in float32.

    Args:
        seed: of its weights.
        scale: what matrices are multiplied with: logits far from uniform make no greedy ties.
        sizes: of the config, over two heads of 16 channels and one for keys and values.
    """
    torch.manual_seed(seed)
    defaults = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": EOS,
    }
    model = Qwen2ForCausalLM(Qwen2Config(**(defaults | sizes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.ndim > 1 else 1)
    return model
