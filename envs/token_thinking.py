"""Thinking as a Gymnasium environment with one token per step.

The state of Markovian thinking is bounded, so observations have a fixed shape, and agents of any
reinforcement-learning library can act. An observation holds the query, the carryover and the tokens
of the current chunk.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from delethink.chunking import ThinkingState
from delethink.envs.episode import EpisodeEnv
from delethink.errors import ActionError, ConfigError
from delethink.tokens import token_array
from delethink.types import StopReason, TokenIds, TraceStop

_MAX_WINDOW = 2**24  # tokens

Window = dict[str, NDArray[Any]]


class TokenThinkingEnv(EpisodeEnv[Window, Any]):
    """One episode is one trace: a problem, answered token by token.

    Args:
        max_query_tokens: maximum length of a query; the window has room for a query and a context.
        options: see ``EpisodeEnv``.

    An action is a token. An observation is a window of ``longest_context`` entries with the latest
    token last: ``ids`` has the tokens, and ``mask`` is 1 for tokens and 0 for the padding on the
    left. After a boundary the window has fewer tokens. ``info`` is like in ``ThinkingEnv`` without
    the ids; ``max_new_tokens`` is the room left in the current chunk.
    """

    def __init__(self, *args: Any, max_query_tokens: int = 64, **options: Any) -> None:
        options["max_query_tokens"] = max_query_tokens
        super().__init__(*args, **options)
        width = self._width = self.longest_context
        if width > _MAX_WINDOW:
            raise ConfigError(
                f"a window of {width} tokens exceeds {_MAX_WINDOW}, and every observation has one; "
                "lower context_size or max_query_tokens, or use Thinking-v0"
            )
        self.action_space = spaces.Discrete(self.vocabulary)
        self.observation_space: Any = spaces.Dict(
            {
                "ids": spaces.MultiDiscrete(
                    np.full(width, self.vocabulary, dtype=np.int32), dtype=np.int32
                ),
                "mask": spaces.MultiBinary(width),
            }
        )
        # A window is a slice of this buffer that moves by one entry per token, without shifting.
        self._buffer = np.zeros(2 * width, dtype=np.int32)
        self._masks = np.repeat(np.array([0, 1], dtype=np.int8), width)
        self._used = 0  # tokens in the window
        self._first = 0  # tokens in the window when the chunk began
        self._limit = 0  # maximum new tokens of the chunk; 0 after the end
        self._chunk_facts: dict[str, Any] = {}  # info when the chunk began

    def _begin(self, state: ThinkingState) -> tuple[Window, dict[str, Any]]:
        self._open_chunk(state)
        return self._window(), self._info()

    def step(self, action: Any) -> tuple[Window, float, bool, bool, dict[str, Any]]:
        """Add one token to the trace.

        Raises:
            ActionError: the action is no token of the vocabulary, or the trace has ended.
        """
        state = self._running_state()
        token = self._token(action)
        self._buffer[self._width + self._used] = token
        self._used += 1
        reward = 0.0
        if token in self.eos_ids:
            reward = self._close_chunk(StopReason.EOS)
        elif self._used - self._first == self._limit or (
            self.chunk_spec.boundary is not None and state.boundary_after(self._current_chunk())
        ):
            reward = self._close_chunk(StopReason.LENGTH)
        stop = self._state.stop if self._state else None
        ends = stop is TraceStop.COMPLETED, stop is TraceStop.BUDGET
        return self._window(), reward, *ends, self._info()

    def _token(self, action: Any) -> int:
        try:
            token = -1 if isinstance(action, bool) else operator.index(action)
        except TypeError:
            token = -1
        if not 0 <= token < self.vocabulary:
            raise ActionError(
                f"an action must be a token: a whole number from 0 to {self.vocabulary - 1}, got "
                f"{action!r:.200}"
            )
        return token

    def _current_chunk(self) -> TokenIds:
        start = self._width + self._first
        return token_array(self._buffer[start : self._width + self._used].astype(np.int64))

    def _close_chunk(self, stop: StopReason) -> float:
        state, reward = self._finish_chunk(self._current_chunk(), stop)
        if state.stop is None:
            self._open_chunk(state)
        else:
            self._chunk_facts, self._limit = self._facts(state), 0
        return reward

    def _open_chunk(self, state: ThinkingState) -> None:
        prompt = np.asarray(state.prompt_ids)
        self._first = self._used = len(prompt)
        self._buffer[self._width : self._width + len(prompt)] = prompt
        self._limit = state.max_new_tokens
        self._chunk_facts = self._facts(state)

    def _window(self) -> Window:
        used = self._used
        return {
            "ids": self._buffer[used : used + self._width].copy(),
            "mask": self._masks[used : used + self._width].copy(),
        }

    def _info(self) -> dict[str, Any]:
        info = self._chunk_facts.copy()
        if self._limit:
            new = self._used - self._first
            info["max_new_tokens"] = self._limit - new
            info["num_sampled"] += new
            info["budget_left"] -= new
        return info

    def _new_output(self) -> tuple[str, TokenIds]:
        return "this chunk", self._current_chunk() if self._limit else self._last_output

    def _unfinished_chunk(self) -> TokenIds:
        return self._current_chunk() if self._limit else ()
