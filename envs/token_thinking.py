"""Thinking as an ordinary Gymnasium environment: one step is one token.

The state of Markovian thinking is bounded, so an observation has a fixed shape and any agent of any
reinforcement-learning library can act: the query, what was carried and the tokens of the chunk so
far, in a window that never has to grow.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from delethink.chunking import ThinkingState
from delethink.envs.episode import EpisodeEnv, as_view
from delethink.errors import ActionError
from delethink.tokens import token_array
from delethink.types import StopReason, TokenIds, TraceStop

Window = dict[str, NDArray[Any]]


class TokenThinkingEnv(EpisodeEnv[Window, Any]):
    """One episode is one trace: a problem, answered token by token.

    Args:
        max_query_tokens: the most tokens of a query; the window has as many and those of a context.
        options: see ``EpisodeEnv``.

    An action is a token. An observation is a window of ``longest_context`` places, the latest token
    last: ``ids`` holds tokens, and ``mask`` is 1 where one is and 0 in what is empty before them. A
    boundary shows as a window that has suddenly less in it. ``info`` is that of ``ThinkingEnv`` but
    for the ids, with ``max_new_tokens`` the tokens that the chunk at hand may still have.
    """

    def __init__(self, *args: Any, max_query_tokens: int = 64, **options: Any) -> None:
        options["max_query_tokens"] = max_query_tokens
        super().__init__(*args, **options)
        width = self._width = self.longest_context
        self.action_space = spaces.Discrete(self.vocabulary)
        self.observation_space: Any = spaces.Dict(
            {
                "ids": spaces.MultiDiscrete(
                    np.full(width, self.vocabulary, dtype=np.int32), dtype=np.int32
                ),
                "mask": spaces.MultiBinary(width),
            }
        )
        # A window is a view that moves on by one place with each token: nothing is shifted.
        self._places = np.zeros(2 * width, dtype=np.int32)
        self._masks = np.repeat(np.array([0, 1], dtype=np.int8), width)
        self._used = self._first = self._limit = 0  # tokens in the window, at the start, at most
        self._since: dict[str, Any] = {}  # facts of the chunk's start

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Window, dict[str, Any]]:
        """Draws a problem, or takes ``options["problem"]``.

        Raises:
            QueryTooLongError: the query has more than ``max_query_tokens`` tokens.
            ConfigError: an unknown option.
        """
        self._open_chunk(self._begin(seed, options))
        return self._window(), self._info()

    def step(self, action: Any) -> tuple[Window, float, bool, bool, dict[str, Any]]:
        """Takes one token.

        Raises:
            ActionError: no token of the vocabulary, or the trace has ended.
        """
        state = self._running_state()
        token = self._token(action)
        self._places[self._width + self._used] = token
        self._used += 1
        new = self._used - self._first
        reward = 0.0
        if token in self.eos_ids:
            reward = self._close_chunk(StopReason.EOS)
        elif new == self._limit or (
            self.chunk_spec.boundary is not None and state.boundary_after(self._chunk())
        ):
            reward = self._close_chunk(StopReason.LENGTH)
        stop = self._state.stop if self._state else None
        terminated, truncated = stop is TraceStop.COMPLETED, stop is TraceStop.BUDGET
        return self._window(), reward, terminated, truncated, self._info()

    def _token(self, action: Any) -> int:
        try:
            token = -1 if isinstance(action, bool) else operator.index(action)
        except TypeError:
            token = -1
        if not 0 <= token < self.vocabulary:
            raise ActionError(
                f"an action is a token: a whole number from 0 to {self.vocabulary - 1}, got "
                f"{action!r:.200}"
            )
        return token

    def _chunk(self) -> TokenIds:
        """The tokens of the chunk at hand."""
        start = self._width + self._first
        return token_array(self._places[start : self._width + self._used].astype(np.int64))

    def _close_chunk(self, stop: StopReason) -> float:
        state, reward = self._take(self._chunk(), stop)
        if state.stop is None:
            self._open_chunk(state)
        else:
            self._since, self._limit = self._facts(state), 0
        return reward

    def _open_chunk(self, state: ThinkingState) -> None:
        prompt = as_view(state.prompt_ids)
        self._first = self._used = len(prompt)
        self._places[self._width : self._width + len(prompt)] = prompt
        self._limit = state.max_new_tokens
        self._since = self._facts(state)

    def _window(self) -> Window:
        used = self._used
        return {
            "ids": self._places[used : used + self._width].copy(),
            "mask": self._masks[used : used + self._width].copy(),
        }

    def _info(self) -> dict[str, Any]:
        info = self._since.copy()
        if self._limit:
            new = self._used - self._first
            info["max_new_tokens"] = self._limit - new
            info["num_sampled"] += new
            info["budget_left"] -= new
        return info

    def _new(self) -> tuple[str, TokenIds]:
        return "this chunk", self._chunk() if self._limit else self._last

    def _sampled(self) -> tuple[str, TokenIds]:
        if not self.keep_trace:
            return self._new()
        chunk = self._chunk() if self._limit else ()
        return "sampled so far", self._stitched() + chunk
