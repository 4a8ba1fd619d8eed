"""Delethink: reinforcement learning in which a language model thinks in chunks with context resets.

The core, in reading order; what is heavier lives in rooms of its own (``delethink.envs``,
``delethink.rewards``, ``delethink.engines``, ``delethink.training``, ``delethink.evaluation``) and
is imported from there. Importing this package loads the standard library only.
"""

from delethink.carryover import Ask, Boundary, Carryover
from delethink.chunking import ChunkSpec, ThinkingState, start
from delethink.errors import (
    ActionError,
    CarryoverError,
    ConfigError,
    ConformanceError,
    DeadlineError,
    DelethinkError,
    MissingExtraError,
    ModelError,
    NonFiniteError,
    PolicyError,
    QueryTooLongError,
    RolloutError,
    RunDirectoryError,
    TraceFileError,
    UserError,
    WeightSyncError,
    WorkersLostError,
)
from delethink.policy import Completion, Policy, Sampling, SchedulingHint, ScriptedPolicy
from delethink.rollout import derive_seed, run_rollout, run_rollouts
from delethink.types import (
    Chunk,
    ChunkRole,
    Problem,
    StopReason,
    TokenIds,
    Trace,
    TraceStop,
)

__version__ = "0.1.0"

__all__ = [
    # types: every noun
    "TokenIds",
    "StopReason",
    "ChunkRole",
    "TraceStop",
    "Problem",
    "Chunk",
    "Trace",
    # rule: how thinking is cut into chunks
    "ChunkSpec",
    "ThinkingState",
    "start",
    # carryover and boundary: what goes over a boundary, and where one falls early
    "Carryover",
    "Ask",
    "Boundary",
    # policy: anything that continues a prompt
    "Policy",
    "Sampling",
    "SchedulingHint",
    "Completion",
    "ScriptedPolicy",
    # rollout: plays traces
    "run_rollout",
    "run_rollouts",
    "derive_seed",
    # errors
    "DelethinkError",
    "UserError",
    "ConfigError",
    "QueryTooLongError",
    "ActionError",
    "CarryoverError",
    "TraceFileError",
    "ModelError",
    "RunDirectoryError",
    "MissingExtraError",
    "PolicyError",
    "DeadlineError",
    "WorkersLostError",
    "RolloutError",
    "WeightSyncError",
    "NonFiniteError",
    "ConformanceError",
    "__version__",
]
