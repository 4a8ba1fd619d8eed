"""Thinking in chunks for verifiers 0.4: tasks, rewards, a harness, and a renderer for prime-rl.

    vf-eval delethink-verifiers --env.taskset.source automaton ...

verifiers finds the taskset and the harness in ``__all__``.
"""

from delethink_verifiers._release import INSTALLED
from delethink_verifiers.harness import ChunkHarness, ChunkHarnessConfig
from delethink_verifiers.rewards import for_verifiers, task_reward
from delethink_verifiers.taskset import ProblemTaskset, ProblemTasksetConfig

__all__ = [
    "ChunkHarness",
    "ChunkHarnessConfig",
    "INSTALLED",
    "ProblemTaskset",
    "ProblemTasksetConfig",
    "for_verifiers",
    "task_reward",
]
