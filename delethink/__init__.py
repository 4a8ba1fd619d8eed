"""Delethink: reinforcement learning in which a language model thinks in chunks with context resets.

The core, in reading order; what is heavier lives in rooms of its own (``delethink.envs``,
``delethink.rewards``, ``delethink.serving``, ``delethink.training``, ``delethink.evaluation``) and
is imported from there. Importing this package loads the standard library only.
"""

from delethink.border import Border
from delethink.carryover import Ask, Carryover
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
from delethink.policy import Completion, Policy, Progress, Sampling, ScriptedPolicy
from delethink.rollout import derive_seed, play_trace, play_traces
from delethink.rule import ChunkSpec, ThinkingState, start
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
    # carryover and border: what goes over a border, and where one falls early
    "Carryover",
    "Ask",
    "Border",
    # policy: anything that continues a prompt
    "Policy",
    "Sampling",
    "Progress",
    "Completion",
    "ScriptedPolicy",
    # rollout: plays traces
    "play_trace",
    "play_traces",
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
