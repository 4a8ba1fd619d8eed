"""What thinking costs: FLOPs, memory, time and money, by arithmetic alone.

``estimate(model_shape("Qwen/Qwen2.5-1.5B"), Lengths.constant(98_304), Cut(8192, 4096),
accelerator("h100"))`` says what a run with Delethink costs; with ``LONGCOT`` for the cut, without.
"""

from delethink.cost.estimate import Cost, Job, Lengths, estimate
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
    "Job",
    "Lengths",
    "ModelShape",
    "accelerator",
    "estimate",
    "model_shape",
]
