"""Cost of thinking: FLOPs, memory, time and money, by arithmetic alone.

Example::

    shape, device = model_shape("Qwen/Qwen2.5-1.5B"), accelerator("h100")
    delethink = estimate(shape, Lengths.constant(98_304), Cut(8192, 4096), device)
    longcot = estimate(shape, Lengths.constant(98_304), LONGCOT, device)
"""

from delethink.cost.estimate import Cost, Lengths, Workload, estimate
from delethink.cost.flops import LONGCOT, Cut
from delethink.cost.hardware import Accelerator, Efficiency, accelerator
from delethink.cost.models import model_shape
from delethink.cost.shape import ModelShape

__all__ = [
    "LONGCOT",
    "Accelerator",
    "Cost",
    "Cut",
    "Efficiency",
    "Lengths",
    "ModelShape",
    "Workload",
    "accelerator",
    "estimate",
    "model_shape",
]
