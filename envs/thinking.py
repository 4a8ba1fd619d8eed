"""Thinking as a Gymnasium environment: one step is one chunk.

A border between chunks is neither ``terminated`` nor ``truncated``: the context is thrown away and
the next observation is the query and what the rule carries over. ``terminated`` means that the
policy ended its answer, ``truncated`` that the budget is spent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, SupportsFloat

import gymnasium
import numpy as np
from numpy.typing import NDArray

from delethink.errors import ActionError
from delethink.query import Tokenizer, query_ids, reward_text
from delethink.rule import ChunkSpec, ThinkingState, start
from delethink.types import Problem, StopReason, TraceStop

Ids = NDArray[np.int64]


class Task(Protocol):
    """A stream of problems, indexable without end."""

    def problem(self, split: str, index: int) -> Problem:
        """Problem ``index`` of ``split``."""
        ...


class TokenSequence(gymnasium.Space[Ids]):
    """Sequences of ``min_length`` to ``max_length`` token ids below ``vocabulary``.

    Gymnasium's own ``Sequence`` has no longest length, and ``Text`` no token ids.
    """

    def __init__(
        self, vocabulary: int, max_length: int, min_length: int = 0, seed: int | None = None
    ) -> None:
        super().__init__(shape=None, dtype=np.int64, seed=seed)
        self.vocabulary = vocabulary
        self.min_length = min_length
        self.max_length = max_length

    def sample(self, mask: Any = None, probability: Any = None) -> Ids:
        """A sequence of random length and tokens."""
        length = self.np_random.integers(self.min_length, self.max_length + 1)
        return self.np_random.integers(0, self.vocabulary, length)

    def contains(self, x: Any) -> bool:
        """Whether ``x`` is a one-dimensional sequence of ids of allowed length and range."""
        try:
            ids = np.asarray(x)
        except ValueError:  # ragged
            return False
        if ids.ndim != 1 or not self.min_length <= len(ids) <= self.max_length:
            return False
        if len(ids) == 0:
            return True
        whole = np.issubdtype(ids.dtype, np.integer)
        return bool(whole and 0 <= ids.min() and ids.max() < self.vocabulary)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenSequence) and vars_of(self) == vars_of(other)

    def __repr__(self) -> str:
        return f"TokenSequence({self.vocabulary}, {self.max_length}, {self.min_length})"


def vars_of(space: TokenSequence) -> tuple[int, int, int]:
    """What makes two spaces equal."""
    return space.vocabulary, space.max_length, space.min_length


class ThinkingEnv(gymnasium.Env[Ids, Ids]):
    """One episode is one trace: a problem, answered chunk by chunk.

    Args:
        task: where problems come from.
        reward: scores the stitched text of a finished trace against the gold answer.
        tokenizer: turns prompts into ids and traces into text.
        chunk_spec: the chunk rule's sizes.
        eos_ids: the tokens that end an answer.
        vocabulary: number of token ids.
        split: the task's split to draw from.
        max_query_tokens: bound of the observation space on the query.

    An action is the token ids of a chunk. One that ends with EOS ends the trace; any other leads to
    a border, also where the chunk is not full. The observation is the prompt of the next chunk, and
    ``info`` says how many tokens that chunk may have (``max_new_tokens``), which chunk it is
    (``chunk``), how many tokens were sampled (``num_sampled``) and are left (``budget_left``), how
    many of the observation were carried (``carried``), and at the end why (``stop``).
    """

    metadata = {"render_modes": ["ansi"]}  # noqa: RUF012 - the name and type are Gymnasium's

    def __init__(
        self,
        task: Task,
        reward: Callable[[str, str], SupportsFloat],
        tokenizer: Tokenizer,
        chunk_spec: ChunkSpec,
        eos_ids: Sequence[int],
        vocabulary: int,
        split: str = "train",
        max_query_tokens: int = 2048,
        render_mode: str | None = None,
    ) -> None:
        self.task, self.reward, self.tokenizer = task, reward, tokenizer
        self.chunk_spec = chunk_spec  # not `spec`: that is the name of Gymnasium's own
        self.eos_ids, self.split = frozenset(eos_ids), split
        self.max_query_tokens = max_query_tokens
        self.render_mode = render_mode
        self.vocabulary = vocabulary
        self.action_space = TokenSequence(vocabulary, chunk_spec.context_size, min_length=1)
        longest = max_query_tokens + chunk_spec.max_thinking_context
        self.observation_space = TokenSequence(vocabulary, longest, min_length=1)
        self.problem: Problem | None = None
        self._state: ThinkingState | None = None
        self._sampled: list[int] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Ids, dict[str, Any]]:
        """Draws a problem, or takes ``options["problem"]``.

        Raises:
            QueryTooLongError: the query has more than ``max_query_tokens`` tokens.
        """
        super().reset(seed=seed)
        self.problem = (options or {}).get("problem") or self.task.problem(
            self.split, int(self.np_random.integers(2**31))
        )
        longest = self.max_query_tokens + self.chunk_spec.max_thinking_context
        query = query_ids(self.tokenizer, self.problem)
        self._state = start(self.chunk_spec, query, longest)
        self._sampled = []
        return self._observation(self._state), self._info(self._state)

    def step(self, action: Any) -> tuple[Ids, float, bool, bool, dict[str, Any]]:
        """Takes one chunk.

        Raises:
            ActionError: the chunk is empty, too long or not of known ids, or the trace has ended.
        """
        state = self._running_state()
        output_ids = self._checked(action, state.max_new_tokens)
        ended = output_ids[-1] in self.eos_ids
        state = state.advance(output_ids, StopReason.EOS if ended else StopReason.LENGTH)
        self._state = state
        self._sampled.extend(output_ids)
        terminated = state.stop is TraceStop.COMPLETED
        truncated = state.stop is TraceStop.BUDGET
        reward = self._score() if state.stop is not None else 0.0
        return self._observation(state), reward, terminated, truncated, self._info(state)

    def render(self) -> str | None:
        """The query, what is carried and all that was sampled, as text."""
        if self.render_mode != "ansi" or self._state is None:
            return None
        parts = {
            "query": self._state.query_ids,
            "carried": self._state.carried,
            "sampled so far": self._sampled,
        }
        return "\n".join(f"[{name}]\n{self.tokenizer.decode(ids)}" for name, ids in parts.items())

    def _running_state(self) -> ThinkingState:
        if self._state is None:
            raise ActionError("call reset() before the first step()")
        if self._state.stop is not None:
            raise ActionError(f"the trace has ended ({self._state.stop.value}); call reset()")
        return self._state

    def _checked(self, action: Any, limit: int) -> tuple[int, ...]:
        if not self.action_space.contains(action):
            raise ActionError(
                f"an action is 1 to {limit} token ids below {self.vocabulary}, got {action!r}"
            )
        ids = tuple(int(token) for token in action)
        ends = [i for i, token in enumerate(ids) if token in self.eos_ids]
        if ends:
            ids = ids[: ends[0] + 1]  # nothing is sampled after the end
        if len(ids) > limit:
            raise ActionError(f"this chunk takes {limit} tokens at most, got {len(ids)}")
        return ids

    def _score(self) -> float:
        assert self.problem is not None
        return float(self.reward(reward_text(self.tokenizer, self._sampled), self.problem.answer))

    def _observation(self, state: ThinkingState) -> Ids:
        return np.asarray(state.prompt_ids, dtype=np.int64)

    def _info(self, state: ThinkingState) -> dict[str, Any]:
        return {
            "max_new_tokens": state.max_new_tokens,
            "chunk": state.num_chunks,
            "carried": len(state.carried),
            "num_sampled": state.num_sampled,
            "budget_left": 0 if state.stop else self.chunk_spec.budget - state.num_sampled,
            "stop": state.stop.value if state.stop else None,
        }
