"""Words for vLLM's reasons not to start: sizes and advice in settings of a recipe, not in its own.

The texts are those of vLLM 0.32; a text of another kind keeps its words, and its names of settings
become ours.
"""

from __future__ import annotations

import re

from delethink.config import EngineConfig

_KEYS = {
    "gpu_memory_utilization": "engine.gpu_memory_utilization",
    "max_model_len": "engine.max_model_tokens",
    "max_num_seqs": "engine.max_batch_size",
    "kv_cache_memory_bytes": "engine.kv_cache_gib",
    "tensor_parallel_size": "engine.tensor_parallel_size",
    "trust_remote_code": "trust_remote_code",
}
_GIB = r"([\d.]+)(?: GiB)?"
_OTHER_ENGINE = "set engine=transformers"


def explain_start(text: str, config: EngineConfig) -> str:
    """Return the reason for which an engine did not start.

    Args:
        text: vLLM's error.
        config: the engine's settings.
    """
    text = " ".join(text.split())
    on_cpu = not config.gpus_per_engine
    cache = "engine.kv_cache_gib" if on_cpu else "engine.gpu_memory_utilization"
    if found := re.search(rf"max seq len \((\d+)\), \({_GIB}.*?memory \({_GIB}\)", text):
        longest, needed, there = found.groups()
        return (
            f"a sequence of {longest} tokens needs {needed} GiB of KV cache, and the engine has "
            f"{there} GiB: raise {cache}, or lower engine.max_model_tokens"
        )
    if "No available memory for the cache blocks" in text:
        return f"no memory is left for the KV cache beside the weights: raise {cache}"
    if found := re.search(rf"\({_GIB}/{_GIB}\).*?requested memory for kv \({_GIB}", text):
        free, total, asked = found.groups()
        return (
            f"its KV cache of {asked} GiB does not fit in the memory, of which {free} of {total} "
            "GiB are free: lower engine.kv_cache_gib or engine.num_engines"
        )
    if found := re.search(rf"\({_GIB}/{_GIB}\).*?desired \w+ memory utilization", text):
        free, total = found.groups()
        return (
            f"the memory has {free} of {total} GiB free, less than its share: lower {cache}, or "
            "end other programs"
        )
    if found := re.search(r"attention heads \((\d+)\) must be divisible by.*?\((\d+)\)", text):
        return (
            f"the model's {found[1]} attention heads cannot be split over "
            f"engine.tensor_parallel_size={found[2]}: take a divisor of {found[1]}"
        )
    if found := re.search(r"[Hh]ead.size\D*(\d+)\D.*?not supported", text):
        return f"vLLM does not support attention heads of {found[1]} channels here: {_OTHER_ENGINE}"
    if found := re.search(r"odel architectures? (\[.*?\]|\S+) (?:are|is)? ?(?:not|failed)", text):
        return f"vLLM does not know the model's architecture {found[1]}: {_OTHER_ENGINE}"
    if "out of memory" in text.lower():
        return f"the memory is full: lower {cache} or engine.max_batch_size"
    return _with_our_keys(text)


def _with_our_keys(text: str) -> str:
    """Return a text with settings of a recipe instead of vLLM's, without links to its manual."""
    text = re.sub(r"(See|Refer to|Please see) https?://\S+[^.]*\.?", "", text)
    for name, key in _KEYS.items():
        option = name.replace("_", "-")
        text = re.sub(rf"`?(?<![\w.])(--{option}|{name})\b`?", key, text)
    return text.strip()
