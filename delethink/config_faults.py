"""Words for faults of settings: pydantic's, YAML's, and names that other programs give to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from delethink.errors import did_you_mean
from delethink.json_io import shorten

# Names of vLLM, TRL, transformers and PEFT, with the key for the same thing here.
_ELSEWHERE = {
    "batch_size": "training.per_device_train_batch_size",
    "dataset_name": "task.args.dataset",
    "eval_steps": "evaluation.every",
    "fp16": "training.bf16",
    "generation_batch_size": "training.steps_per_generation",
    "kv_cache_memory_bytes": "engine.kv_cache_gib",
    "lora_r": "training.lora.r",
    "lora_target_modules": "training.lora.target_modules",
    "lr": "training.learning_rate",
    "max_completion_length": "thinking.context_size and thinking.max_chunks",
    "max_model_len": "engine.max_model_tokens",
    "max_num_seqs": "engine.max_batch_size",
    "max_prompt_length": "task.max_query_tokens",
    "model_name_or_path": "model",
    "num_train_epochs": "training.max_steps",
    "output_dir": "output",
    "peft_config": "training.lora",
    "rank": "training.lora.r",
    "reward_funcs": "rewards",
    "reward_weights": "rewards",
    "use_peft": "training.lora",
    "use_vllm": "engine",
    "vllm_gpu_memory_utilization": "engine.gpu_memory_utilization",
    "vllm_max_model_length": "engine.max_model_tokens",
    "vllm_tensor_parallel_size": "engine.tensor_parallel_size",
}
_FIXED = {"optim": "the optimizer is AdamW", "logging_steps": "every step is logged"}
# Kinds of pydantic, without those of numbers compared with a limit.
_EXPECTED = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "dict_type": "a mapping of names to values, as in {name: value}",
    "model_type": "a section of keys and values, as in {key: value}",
    "list_type": "a list",
    "path_type": "a path",
}
_LIMITS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
# The last part of a place where a value may be of several types: no key.
_TYPE = re.compile(r"(str|int|float|bool|none|constrained-\w+|(list|dict)\[.*\]|function-.*)")


def unknown_key(dotted: str, allowed: Sequence[str]) -> str:
    """Return the error text for an unknown key, with the key to write instead."""
    name = dotted.rpartition(".")[2]
    if name in _ELSEWHERE and name not in allowed:
        return f"unknown key {dotted!r}: it is called {_ELSEWHERE[name]} here"
    if name in _FIXED:
        return f"unknown key {dotted!r}: {_FIXED[name]}, so leave it out"
    return f"unknown key {dotted!r}.{did_you_mean(name, allowed)}"


def wrong_values(faults: Sequence[Mapping[str, Any]], inside: Sequence[str]) -> list[str]:
    """Return an error text for each key with a value of a wrong type or size.

    Args:
        faults: faults of pydantic, other than unknown keys, missing ones and our own.
        inside: the sections around the values.
    """
    expected: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    for fault in faults:
        path = [str(part) for part in fault["loc"]]
        if len(path) > 1 and _TYPE.fullmatch(path[-1]):
            path.pop()
        dotted = ".".join([*inside, *path])
        values.setdefault(dotted, fault.get("input"))
        expected.setdefault(dotted, []).append(_expected(fault))
    return [
        f"{dotted!r} is {shorten(values[dotted])}; it must be {' or '.join(dict.fromkeys(kinds))}"
        for dotted, kinds in expected.items()
    ]


def _expected(fault: Mapping[str, Any]) -> str:
    kind, context = fault["type"], fault.get("ctx") or {}
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind in _LIMITS:
        key, words = _LIMITS[kind]
        return f"{words} {context[key]:g}"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", str(context["expected"]))
        near = did_you_mean(str(fault["input"]), allowed)
        near = near if near.startswith(" Did") else ""
        return f"one of {', '.join(allowed)}.{near}" if near else f"one of {', '.join(allowed)}"
    return f"another value ({fault['msg']})"


def yaml_fault(error: Exception) -> str:
    """Return line, column and fault of a text that is no YAML."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    reason = getattr(error, "problem", None)
    if mark is None or reason is None:
        if (character := getattr(error, "character", None)) is not None:  # of the reader
            return f"it has the character {character!r:.20}, which YAML does not allow"
        return " ".join(str(error).split())
    place = f"line {mark.line + 1}, column {mark.column + 1}"
    if "'\\t'" in reason:
        return f"{place}: there is a tab; indent with spaces"
    if "but found another document" in reason:
        return f"{place}: a second document begins, and a recipe is one; remove the line ---"
    if reason.startswith("found undefined alias"):
        return f"{place}: * begins an alias, and there is no such anchor; quote a text with *"
    if tag := re.search(r"constructor for the tag '(.*)'", reason):
        return f"{place}: the tag {tag[1]!r:.80} is not allowed; write a plain value"
    opened = getattr(error, "context_mark", None)
    if opened is not None and opened.line != mark.line:
        reason = f"{reason} (began in line {opened.line + 1})"
    return f"{place}: {reason}"
