"""Reinforcement learning of language models thinking in chunks with context resets.

The names below are the core, in reading order. The other packages are imported on their own:
``delethink.envs``, ``delethink.rewards``, ``delethink.engines``, ``delethink.training`` and
``delethink.evaluation``. Importing this package loads the standard library only.
"""

from delethink.carryover import Ask, Boundary, CarriedLength, Carryover
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
    RewardError,
    RolloutError,
    RunDirectoryError,
    SandboxError,
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
    # data types
    "TokenIds",
    "StopReason",
    "ChunkRole",
    "TraceStop",
    "Problem",
    "Chunk",
    "Trace",
    # chunking: sizes, policies and states of chunked thinking
    "ChunkSpec",
    "ThinkingState",
    "start",
    # carryover policies and early boundaries
    "Carryover",
    "CarriedLength",
    "Ask",
    "Boundary",
    # policies and sampling parameters
    "Policy",
    "Sampling",
    "SchedulingHint",
    "Completion",
    "ScriptedPolicy",
    # rollouts
    "run_rollout",
    "run_rollouts",
    "derive_seed",
    # errors
    "DelethinkError",
    "UserError",
    "ConfigError",
    "QueryTooLongError",
    "ActionError",
    "RewardError",
    "CarryoverError",
    "TraceFileError",
    "ModelError",
    "RunDirectoryError",
    "MissingExtraError",
    "PolicyError",
    "DeadlineError",
    "WorkersLostError",
    "RolloutError",
    "SandboxError",
    "WeightSyncError",
    "NonFiniteError",
    "ConformanceError",
    "__version__",
]
