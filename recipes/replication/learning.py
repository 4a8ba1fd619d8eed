"""Learning curves of claim 2 against steps, tokens, FLOPs and seconds.

A training cell stores for each step the mean reward, the mean thinking length and the tokens. FLOPs
are those of the cost model for traces of the mean length. Seconds are processor time, from the
rates that the cost cell has measured at the nearest lengths; nothing in them depends on how busy
the machine of the training was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from cells import Cell
from claims import Results, cost_values
from families import FAMILIES

from delethink.chunking import ChunkSpec
from delethink.cost.flops import LONGCOT, Cut, cut_traces, sampling_flops, training_flops
from delethink.cost.models import shape_of_config
from delethink.cost.shape import ModelShape

Curve = npt.NDArray[np.float64]
VOCABULARY = 16  # of the tokenizer of ``scripts/make_toy.py``


def base_shape(base: Mapping[str, Any]) -> ModelShape:
    """Return the shape of the base models; a test compares it with the model."""
    width = base["width"]
    config = {
        "model_type": "qwen2",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": base["layers"],
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 32,
        "tie_word_embeddings": False,
    }
    return shape_of_config(config, "the base")


def learning_curves(cells: Mapping[str, Cell], results: Results, name: str) -> dict[str, Curve]:
    """Return the reward of each step, and cumulated steps, tokens, FLOPs and seconds.

    Seconds are NaN without the family's cost cell.
    """
    settings, values = cells[name].settings, results[name]["values"]
    curve = np.array(values["curve"], float)
    column = {key: curve[:, i] for i, key in enumerate(values["columns"])}
    training = settings["training"]
    traces = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    length, family = column["thinking_tokens"], str(settings["family"])
    is_chunked = settings["method"] == "delethink"
    cut = Cut.of(ChunkSpec(**settings["thinking"])) if is_chunked else LONGCOT
    chunks = cut_traces(length, FAMILIES[family].line_tokens, cut, prefix_cache=False)
    shape = base_shape(settings["base"])
    flops = sampling_flops(shape, chunks) + training_flops(shape, chunks)
    seconds = np.full(len(curve), np.nan)
    if f"{family}-cost" in results:
        method = "delethink" if is_chunked else "longcot"
        seconds = sum(
            _seconds(cells[f"{family}-cost"], results, method, phase, length)
            for phase in ("sampling", "training")
        )
    return {
        "reward": column["reward"],
        "steps": column["step"],
        "tokens": np.cumsum(column["sampled_tokens"]),
        "flops": np.cumsum(traces * flops),
        "seconds": np.cumsum(traces * seconds),
    }


def _seconds(cell: Cell, results: Results, method: str, phase: str, length: Curve) -> Curve:
    """Return the seconds of a trace of each length, between the measured lengths."""
    cost = cell.settings["cost"]
    measured = cost_values(results, str(cell.settings["family"]), method, phase, "seconds")
    lengths = np.array(cost["multiples"]) * cell.settings["context_size"]
    rates = measured.mean(1) / cost["traces"][phase] / lengths  # seconds a token
    return np.asarray(length * np.interp(length, lengths, rates))
