"""The policy protocol: anything that continues a prompt of token ids.

Rollouts depend on this protocol only, so every part of the library also runs with a
``ScriptedPolicy``. Engines live in ``delethink.engines``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from delethink.errors import PolicyError
from delethink.tokens import (
    Logprobs,
    TokenIds,
    all_finite,
    as_logprobs,
    as_token_ids,
    joined,
    logprob_array,
)
from delethink.types import StopReason


@dataclass(frozen=True)
class SchedulingHint:
    """Position of a chunk in its trace, for the order of requests in an engine.

    Rollouts fill in ``query``, ``num_chunks`` and ``max_chunks``; the caller sets the rest. A hint
    affects when a chunk is sampled, never the tokens.
    """

    query: Hashable = None  # equal for all traces of a query
    num_chunks: int = 0  # finished chunks of the trace
    max_chunks: int = 1  # I
    expected_chunks: float | None = None  # estimate for the whole trace
    batch: int = 0  # chunks of lower batches run first


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    ``top_p``, ``top_k`` and ``min_p`` cut the distribution, as vLLM does: after the temperature,
    ``min_p`` first. Log-probs are then those of the cut distribution. Training samples without
    them, because they bias the policy gradient; greedy decoding does not use them.
    """

    temperature: float = 1.0  # 0 means greedy; log-probs are then those at temperature 1
    seed: int | None = None  # None uses the engine's own random stream
    hint: SchedulingHint | None = field(default=None, compare=False, repr=False)
    top_p: float = 1.0  # keep the most probable tokens with this mass; 1 keeps all
    top_k: int = 0  # keep this many of the most probable tokens; 0 keeps all
    min_p: float = 0.0  # drop tokens less probable than this share of the most probable one

    @property
    def is_cut(self) -> bool:
        """Return whether tokens are dropped from the distribution."""
        return self.temperature > 0 and (self.top_p, self.top_k, self.min_p) != (1.0, 0, 0.0)


@dataclass(frozen=True)
class Completion:
    """A policy's continuation of a prompt.

    Raises:
        PolicyError: the numbers of tokens and log-probs differ, or a log-prob is not finite.
    """

    token_ids: TokenIds  # ends with EOS if ``stop`` is ``EOS``
    logprobs: Logprobs  # one for each token, at the sampling temperature
    stop: StopReason
    policy_version: int = 0  # number of updates of the weights it was sampled with
    worker: str | None = field(default=None, compare=False)  # name of the worker, if in a pool

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", as_token_ids(self.token_ids))
        object.__setattr__(self, "logprobs", as_logprobs(self.logprobs))
        if not all_finite(self.logprobs):
            raise PolicyError("the policy returned a log-prob that is not a finite number")
        if len(self.token_ids) != len(self.logprobs):
            raise PolicyError(
                f"the policy returned {len(self.token_ids)} tokens and {len(self.logprobs)} "
                "log-probs; each token needs one log-prob"
            )


def join_completions(pieces: Sequence[Completion]) -> Completion:
    """Return the pieces of a chunk as one completion, with the stop reason of the last."""
    if len(pieces) == 1:
        return pieces[0]
    return replace(
        pieces[-1],
        token_ids=joined(piece.token_ids for piece in pieces),
        logprobs=logprob_array([value for piece in pieces for value in piece.logprobs]),
    )


class Policy(Protocol):
    """Continues prompts. Callers run many calls concurrently, and engines may batch them."""

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """Sample at most ``max_new_tokens`` tokens after ``prompt_ids``; see ``Completion``."""
        ...


TokenListener = Callable[[TokenIds, Logprobs], None]


class StreamingPolicy(Policy, Protocol):
    """A policy that gives tokens out while it samples.

    The method is optional: ``stream_completion`` reads any policy.
    """

    async def stream(
        self,
        prompt_ids: TokenIds,
        max_new_tokens: int,
        sampling: Sampling,
        on_tokens: TokenListener,
    ) -> Completion:
        """Sample as ``generate`` does, and pass on tokens as they are sampled.

        Args:
            prompt_ids: the prompt.
            max_new_tokens: limit of sampled tokens.
            sampling: sampling parameters.
            on_tokens: called in the event loop of the caller with the next tokens and their
                log-probs. All calls together give the tokens of the completion, in order. It may
                raise ``asyncio.CancelledError``, which cancels the call.

        A cancelled call stops sampling.
        """
        ...


async def stream_completion(
    policy: Policy,
    prompt_ids: TokenIds,
    max_new_tokens: int,
    sampling: Sampling,
    on_tokens: TokenListener,
) -> Completion:
    """Sample from any policy; one without ``stream`` gives all tokens at its end."""
    stream = getattr(policy, "stream", None)
    if stream is not None:
        streamed: Completion = await stream(prompt_ids, max_new_tokens, sampling, on_tokens)
        return streamed
    completion = await policy.generate(prompt_ids, max_new_tokens, sampling)
    on_tokens(completion.token_ids, completion.logprobs)
    return completion


ScriptLine = Sequence[int] | Completion | Exception


class ScriptedPolicy:
    """A policy with prepared completions, for tests and examples.

    Args:
        script: the completions in call order, or a function from (prompt ids, max new tokens) to a
            completion. A completion is a sequence of token ids, a ``Completion``, or an exception
            to raise.
        eos_id: a sequence of token ids stops with ``EOS`` if this token ends the sequence.

    Attributes:
        calls: the (prompt ids, max new tokens) of each call.
    """

    def __init__(
        self, script: Sequence[ScriptLine] | Callable[[TokenIds, int], ScriptLine], eos_id: int = 1
    ) -> None:
        self._script = script
        self._eos_id = eos_id
        self.calls: list[tuple[TokenIds, int]] = []

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """Return or raise the next line of the script."""
        await asyncio.sleep(0)  # like a real engine, let other traces run
        self.calls.append((prompt_ids, max_new_tokens))
        if callable(self._script):
            line = self._script(prompt_ids, max_new_tokens)
        elif len(self.calls) <= len(self._script):
            line = self._script[len(self.calls) - 1]
        else:
            raise PolicyError(f"the script has {len(self._script)} lines and got one call more")
        if isinstance(line, Exception):
            raise line
        if isinstance(line, Completion):
            return line
        ids = tuple(line)
        stop = StopReason.EOS if ids[-1:] == (self._eos_id,) else StopReason.LENGTH
        return Completion(ids, (0.0,) * len(ids), stop)
