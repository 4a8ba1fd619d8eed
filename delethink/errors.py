"""Everything delethink raises on purpose.

    DelethinkError
    ├── UserError               something the user can mend; shown as one sentence, no traceback
    │   ├── ConfigError         (ValueError)    a setting that is unknown, impossible or in conflict
    │   ├── QueryTooLongError   (ValueError)    a query that leaves no room for thinking
    │   ├── ActionError         (ValueError)    an environment was given a chunk it cannot take
    │   ├── CarryoverError      (ValueError)    a carryover policy that does not keep its promise
    │   ├── TraceFileError      (ValueError)    a file of traces that cannot be read or written
    │   ├── ModelError          (ValueError)    a model folder or tokenizer that cannot be used
    │   ├── RunDirectoryError   (OSError)       an output folder that cannot be written or is taken
    │   └── MissingExtraError   (ImportError)   an optional dependency that is not installed
    ├── PolicyError             (RuntimeError)  a policy broke the protocol
    ├── DeadlineError           (TimeoutError)  a chunk was given up because its time was over
    ├── WorkersLostError        (RuntimeError)  no worker is left to sample with
    ├── RolloutError            (RuntimeError)  too many traces of a step failed
    ├── WeightSyncError         (RuntimeError)  a worker did not take up new weights
    ├── NonFiniteError          (ArithmeticError) a step would have made weights that are no numbers
    └── ConformanceError        (AssertionError) an environment or policy fails a conformance check

Each leaf also inherits the built-in type it refines, so ``except ValueError`` keeps working. All of
them survive pickling, because they cross process boundaries.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DelethinkError(Exception):
    """Root of all errors raised on purpose."""


class UserError(DelethinkError):
    """Something the user can mend: the command line prints its text and exits with 2."""


class ConfigError(UserError, ValueError):
    """A setting that is unknown, impossible, or in conflict with another."""


class QueryTooLongError(UserError, ValueError):
    """A query that leaves no room for a context of thinking."""


class ActionError(UserError, ValueError):
    """An environment was given a chunk that its state does not allow."""


class CarryoverError(UserError, ValueError):
    """A carryover policy that returned more than it promised, or no token ids at all."""


class TraceFileError(UserError, ValueError):
    """A file of traces that cannot be read or written, or is of a version that is not known."""


class ModelError(UserError, ValueError):
    """A model folder or a tokenizer that cannot be used."""


class RunDirectoryError(UserError, OSError):
    """An output folder that cannot be written or already holds a run."""


class MissingExtraError(UserError, ImportError):
    """An optional dependency that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(package, extra)
        self.package = package
        self.extra = extra

    def __str__(self) -> str:
        return (
            f"{self.package} is not installed; "
            f"install it with: pip install 'delethink[{self.extra}]'"
        )


class PolicyError(DelethinkError, RuntimeError):
    """A policy broke the protocol: too many tokens, or log-probs that do not match them."""


class DeadlineError(DelethinkError, TimeoutError):
    """A chunk was given up because its time was over; its trace becomes data that says so."""


class WorkersLostError(DelethinkError, RuntimeError):
    """All workers of a pool are gone and did not come back in time: nothing can be sampled."""


class RolloutError(DelethinkError, RuntimeError):
    """Traces of a training step failed, so the step cannot be exact."""


class WeightSyncError(DelethinkError, RuntimeError):
    """A worker did not take up new weights in time, or runs others than it should."""


class NonFiniteError(DelethinkError, ArithmeticError):
    """A loss, gradient or log-prob of training is NaN or infinite; the weights are as before."""


class ConformanceError(DelethinkError, AssertionError):
    """An environment or a policy fails a check of ``delethink.testing``; the text says which."""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the nearest allowed name, or the list of them."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(name.lower(), allowed, n=1)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Allowed: {', '.join(allowed)}." if allowed else ""
