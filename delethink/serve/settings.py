"""Settings of the server."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from delethink.chunking import ChunkSpec
from delethink.errors import ConfigError
from delethink.policy import Sampling
from delethink.serve.loops import LoopRule

if TYPE_CHECKING:
    from delethink.serve.thinking import ThinkingModel

# Shares of the server's budget of thinking by the reasoning effort of a request.
EFFORT_SHARES: Mapping[str, float] = {
    "none": 0.0,
    "minimal": 1 / 16,
    "low": 1 / 4,
    "medium": 1 / 2,
    "high": 1.0,
    "xhigh": 1.0,
    "max": 1.0,
}
# Carried past a loop, as the last of the thinking that the next chunk sees.
NUDGE = "\nThis repeats itself. Try another way.\n"
REASONING_FIELDS = ("reasoning", "reasoning_content")


@dataclass(frozen=True)
class ServeSettings:
    """Settings of the server, which are also the limits of its requests.

    Raises:
        ConfigError: a setting is out of range.
    """

    model_name: str
    spec: ChunkSpec
    answer_tokens: int = 2048  # room kept back for an answer
    sampling: Sampling = Sampling()  # of requests that name no value
    efforts: Mapping[str, int] = field(default_factory=dict)  # thinking tokens, besides the shares
    loop: LoopRule | None = None  # of every request, unless it names its own
    on_loop: Literal["end", "nudge"] = "end"  # the thinking, or the chunk alone
    nudge: str = NUDGE
    max_traces: int = 64  # sampled at once
    max_queue: int = 256  # traces that wait
    max_choices: int = 16  # of a request
    max_body_bytes: int = 4 * 2**20
    thinking_time_s: float | None = None  # then thinking is ended and the answer sampled
    answer_time_s: float = 600.0  # of an answer, after the end of thinking
    keepalive_s: float = 5.0  # between comments in a silent stream
    send_time_s: float = 120.0  # a client that reads nothing for so long is left
    reattach_s: float = 30.0  # a trace waits so long for the retry of a client that left
    keep_result_s: float = 300.0  # results of requests with an Idempotency-Key
    reasoning_fields: tuple[str, ...] = REASONING_FIELDS
    api_keys: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name in ("max_traces", "max_choices", "answer_tokens", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_queue < 0:
            raise ConfigError(f"max_queue must be at least 0, got {self.max_queue}")
        for name in ("thinking_time_s", "answer_time_s", "keepalive_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} must be a number of seconds above 0, got {value}")

    def thinking_tokens(self, effort: str) -> int:
        """Return the budget of thinking of a known reasoning effort."""
        if effort in self.efforts:
            return self.efforts[effort]
        return round(EFFORT_SHARES[effort] * self.spec.thinking_budget)

    def virtual_window(self, model: ThinkingModel) -> int:
        """Return the tokens of query, thinking and answer that a client may count on."""
        context = len(model.mark_ids) + self.spec.max_thinking_context + self.answer_tokens
        longest = context if model.max_model_tokens is None else model.max_model_tokens
        query = longest - context
        return query + self.spec.budget + len(model.mark_ids) + self.answer_tokens

    def accepts_key(self, header: str | None) -> bool:
        """Return whether an ``Authorization`` header holds a key; without keys any does.

        Digests are compared, in a time that tells nothing about the keys.
        """
        if not self.api_keys:
            return True
        kind, _, given = (header or "").partition(" ")
        digest, accepted = _digest(given.strip()), False
        for key in self.api_keys:
            accepted |= hmac.compare_digest(_digest(key), digest)
        return accepted and kind.lower() == "bearer"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
