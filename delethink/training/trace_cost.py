"""What training on a trace costs: FLOPs of forwarding its chunks, each under its own prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from delethink.cost.flops import forward_flops
from delethink.cost.model_config import shape_of_config
from delethink.errors import ModelError
from delethink.types import Trace


def trace_cost(config: Mapping[str, Any]) -> Callable[[Trace], float]:
    """How to weigh a trace for a model, attention included.

    Where no formula covers the architecture, a trace weighs as many tokens as are forwarded, which
    leaves out that tokens late in a chunk attend to more.

    Args:
        config: the model's ``config.json``.
    """
    try:
        shape = shape_of_config(dict(config), "the model")
    except ModelError:
        shape = None

    def cost(trace: Trace) -> float:
        chunks = [chunk for chunk in trace.chunks if chunk.output_ids]
        outputs = np.array([len(chunk.output_ids) for chunk in chunks], float)
        lengths = outputs + np.array([len(chunk.prompt_ids) for chunk in chunks], float)
        work = lengths if shape is None else forward_flops(shape, 0, lengths, heads=outputs)
        return float(np.sum(work))

    return cost
