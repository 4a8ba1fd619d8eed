"""The policy protocol: anything that continues a prompt of token ids.

Rollouts know nothing else of an engine, so that every part of the library can be played against a
script. Engines live in ``delethink.engines``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from delethink.errors import PolicyError
from delethink.tokens import all_finite, as_logprobs, as_token_ids
from delethink.types import StopReason, TokenIds


@dataclass(frozen=True)
class SchedulingHint:
    """Where a chunk stands in its trace, for an engine that decides what to sample first.

    Rollouts fill in what they know (``query``, ``num_chunks``, ``max_chunks``); the rest is the
    caller's. It changes when a chunk is sampled and never what.
    """

    query: Hashable = None  # the same for all traces of a query
    num_chunks: int = 0  # that the trace has already
    max_chunks: int = 1  # I
    expected_chunks: float | None = None  # of the whole trace, where somebody has an idea
    batch: int = 0  # chunks of a lower one go first


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Top-p and top-k are left out: they bias the policy gradient."""

    temperature: float = 1.0  # 0 means greedy; log-probs are then those at temperature 1
    seed: int | None = None  # None draws from the engine's own stream
    hint: SchedulingHint | None = field(
        default=None, compare=False, repr=False
    )  # no matter of draws


@dataclass(frozen=True)
class Completion:
    """What a policy made of a prompt.

    ``logprobs`` are those of ``token_ids`` under the distribution they were drawn from (temperature
    applied), one each. ``token_ids`` end with EOS where ``stop`` is ``EOS``. Both stay what they
    were given as: tuples, or blocks of memory that behave like them (``delethink.tokens``).
    """

    token_ids: TokenIds
    logprobs: tuple[float, ...]
    stop: StopReason
    policy_version: int = 0  # number of weight updates of the weights that sampled this

    def __post_init__(self) -> None:
        tokens, logprobs = as_token_ids(self.token_ids), as_logprobs(self.logprobs)
        if tokens is not self.token_ids:
            object.__setattr__(self, "token_ids", tokens)
        if logprobs is not self.logprobs:
            object.__setattr__(self, "logprobs", logprobs)
        if not all_finite(self.logprobs):
            raise PolicyError("the policy returned a log-prob that is not a finite number")
        if len(self.token_ids) != len(self.logprobs):
            raise PolicyError(
                f"the policy returned {len(self.token_ids)} tokens and "
                f"{len(self.logprobs)} log-probs: there must be one for each token"
            )


class Policy(Protocol):
    """Continues prompts. Many calls may be in flight; an engine batches them as it likes."""

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """Sample at most ``max_new_tokens`` tokens after ``prompt_ids``."""
        ...


class ScriptedPolicy:
    """A policy that says what it is told: for tests, examples and demonstrations.

    Args:
        script: the completions in the order of the calls, each as token ids, as a ``Completion``,
            or as an exception to raise; or a function of (prompt ids, max new tokens) that returns
            one.
        eos_id: a completion given as token ids that ends with it stops with ``EOS``.

    ``calls`` records (prompt ids, max new tokens) of each call.
    """

    def __init__(
        self,
        script: Sequence[TokenIds | Completion | Exception]
        | Callable[[TokenIds, int], TokenIds | Completion | Exception],
        eos_id: int = 1,
    ) -> None:
        self._script = script
        self._eos_id = eos_id
        self.calls: list[tuple[TokenIds, int]] = []

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """The next line of the script."""
        await asyncio.sleep(0)  # a real engine lets other traces run
        said = self._next(prompt_ids, max_new_tokens)
        if isinstance(said, Exception):
            raise said
        if isinstance(said, Completion):
            return said
        ended = bool(said) and said[-1] == self._eos_id
        stop = StopReason.EOS if ended else StopReason.LENGTH
        return Completion(tuple(said), (0.0,) * len(said), stop)

    def _next(self, prompt_ids: TokenIds, max_new_tokens: int) -> TokenIds | Completion | Exception:
        self.calls.append((prompt_ids, max_new_tokens))
        if callable(self._script):
            return self._script(prompt_ids, max_new_tokens)
        if len(self.calls) > len(self._script):
            raise PolicyError(
                f"the script has {len(self._script)} lines and was asked for one more"
            )
        return self._script[len(self.calls) - 1]
