"""Low-rank adapters of a recipe, by PEFT, which is imported for such a run only."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from delethink.config import LoraConfig
from delethink.errors import ConfigError


def lora(config: LoraConfig | None, revision: str | None = None) -> Any:
    """Return the PEFT settings; ``None`` to train all weights.

    ``revision`` is that of the base model, which a saved adapter names.
    """
    if config is None:
        return None
    import peft

    # The dropout of PEFT stays 0, because the engine samples without dropout.
    return peft.LoraConfig(**config.model_dump(), task_type="CAUSAL_LM", revision=revision)


def adapter_parameters(
    model_config: Any, config: LoraConfig, trust_remote_code: bool = False
) -> int:
    """Return the number of parameters of the adapters, counted without memory for the model.

    Raises:
        ConfigError: the model has no layers of these names, or they cannot have adapters.
    """
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
        layers = dict(model.named_modules())
        fault = _fault_of_targets(config.target_modules, layers)
        try:
            if fault is None:
                adapted = peft.get_peft_model(model, lora(config))
        except Exception as error:  # PEFT raises many types
            fault = f"cannot have adapters ({' '.join(str(error).split())[:200]})"
    if fault is not None:
        linear = {n for n, module in layers.items() if isinstance(module, torch.nn.Linear)}
        names = sorted({name.rpartition(".")[2] for name in linear})
        raise ConfigError(
            f"training.lora.target_modules={config.target_modules} {fault}; linear layers of this "
            f"model: {', '.join(names)}; or all-linear"
        )
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def _fault_of_targets(targets: str | list[str], layers: Collection[str]) -> str | None:
    """Return the fault of names of layers, or ``None``; a text is a regular expression."""
    if not targets:
        return "names no layer"
    if isinstance(targets, str):
        try:
            found = [name for name in layers if re.fullmatch(targets, name)]
        except re.error as error:
            return f"is no regular expression ({error})"
        return None if found or targets == "all-linear" else "matches no layer as a whole"
    missing = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in layers)]
    return f"names {', '.join(missing)}, which is no layer of the model" if missing else None
