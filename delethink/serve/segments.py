"""Streams from an engine that gives whole chunks only: a chunk is asked for in segments."""

from __future__ import annotations

from delethink.policy import Completion, Policy, Sampling, TokenListener, stream_completion
from delethink.tokens import TokenIds
from delethink.types import StopReason

_FIRST_TOKENS = 8  # of the first segment, for a client that waits


class SegmentedPolicy:
    """Policy that asks for a few tokens at a time, each time after all earlier ones.

    The engine finds the earlier tokens in its prefix cache. A sampled chunk with a seed is asked
    for at once, as its tokens depend on the engine's random stream.

    Args:
        policy: gives whole completions.
        tokens: of a segment.
    """

    def __init__(self, policy: Policy, tokens: int) -> None:
        self._policy, self._tokens = policy, tokens

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        """See ``Policy``."""
        return await self._policy.generate(prompt_ids, max_new_tokens, sampling)

    async def stream(
        self,
        prompt_ids: TokenIds,
        max_new_tokens: int,
        sampling: Sampling,
        on_tokens: TokenListener,
    ) -> Completion:
        """See ``StreamingPolicy``."""
        call = prompt_ids, max_new_tokens, sampling
        if sampling.seed is not None and sampling.temperature > 0:
            return await stream_completion(self._policy, *call, on_tokens)
        ids: tuple[int, ...] = ()
        logprobs: tuple[float, ...] = ()
        size = min(_FIRST_TOKENS, self._tokens)
        while True:
            limit = min(size, max_new_tokens - len(ids))
            done = await self._policy.generate(prompt_ids + ids, limit, sampling)
            on_tokens(done.token_ids, done.logprobs)
            ids, logprobs = ids + tuple(done.token_ids), logprobs + tuple(done.logprobs)
            if done.stop is not StopReason.LENGTH or len(ids) >= max_new_tokens:
                return Completion(ids, logprobs, done.stop, done.policy_version)
            size = self._tokens
