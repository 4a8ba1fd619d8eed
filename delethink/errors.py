"""Exceptions of the library.

A ``UserError`` is correctable by the user. Each leaf also inherits the built-in type it refines, so
``except ValueError`` keeps working. All of them can be pickled, because they cross process
boundaries.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DelethinkError(Exception):
    """Base class of all exceptions of the library."""


class UserError(DelethinkError):
    """An error the user can correct. The command line prints its text and exits with 2."""


class ConfigError(UserError, ValueError):
    """An unknown, impossible or contradictory setting."""


class QueryTooLongError(UserError, ValueError):
    """A query without room for a context of thinking."""


class ActionError(UserError, ValueError):
    """An action the state of the environment does not allow."""


class RewardError(UserError, ValueError):
    """A reward gave an environment no finite number, or could not be computed."""


class CarryoverError(UserError, ValueError):
    """A carryover policy returned more tokens than its bound, or no token ids."""


class TraceFileError(UserError, ValueError):
    """A file of traces cannot be read or written, or has an unknown version."""


class ModelError(UserError, ValueError):
    """A model folder or tokenizer cannot be used."""


class RunDirectoryError(UserError, OSError):
    """An output folder cannot be written, or already holds a run."""


class MissingExtraError(UserError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(package, extra)
        self.package = package
        self.extra = extra

    def __str__(self) -> str:
        return (
            f"{self.package} is not installed; install it from the clone of the repository: "
            f"pip install -e '.[{self.extra}]'"
        )


class SandboxError(DelethinkError, RuntimeError):
    """The isolated process of a program cannot be started, or its host ended."""


class PolicyError(DelethinkError, RuntimeError):
    """A policy broke the protocol: too many tokens, or wrong log-probs."""


class DeadlineError(DelethinkError, TimeoutError):
    """A chunk was aborted at a timeout. Its trace is kept, with this error as its reason."""


class WorkersLostError(DelethinkError, RuntimeError):
    """All workers of a pool are lost and were not restarted in time."""


class RolloutError(DelethinkError, RuntimeError):
    """Traces of a training step failed, so the step cannot be exact."""


class WeightSyncError(DelethinkError, RuntimeError):
    """A worker did not load new weights in time, or has other weights than expected."""


class NonFiniteError(DelethinkError, ArithmeticError):
    """A loss, gradient or log-prob of training is NaN or infinite. The weights are unchanged."""


class ConformanceError(DelethinkError, AssertionError):
    """An environment or a policy fails a check of ``delethink.testing``."""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest allowed name, or a list of all names."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(name.lower(), allowed, n=1)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Allowed: {', '.join(allowed)}." if allowed else ""
