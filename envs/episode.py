"""What the thinking environments share: how they are made, drawn, scored, described and shown.

A boundary between chunks is neither ``terminated`` nor ``truncated``: the context is thrown away
and the next observation is the query and what the rule carries over. ``terminated`` means that the
policy ended its answer, ``truncated`` that the budget is spent.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol, SupportsFloat, TypeVar

import gymnasium
import numpy as np

from delethink.chunking import ChunkSpec, ThinkingState, start
from delethink.envs.rendering import render_ansi, render_html
from delethink.envs.spaces import CharacterTokenizer, Ids
from delethink.errors import ActionError, ConfigError, did_you_mean
from delethink.registry import make, resolve
from delethink.scoring.reward import Reward
from delethink.tokenization import Tokenizer, query_ids, reward_text
from delethink.tokens import as_list, joined, memory_of, token_array
from delethink.types import (
    Attempt,
    Chunk,
    ChunkRole,
    Problem,
    StopReason,
    TokenIds,
    Trace,
    TraceStop,
)

Observation = TypeVar("Observation")
Action = TypeVar("Action")
_SHOWN = ("chunk", "num_sampled", "budget_left", "role", "stop")  # in HTML

RewardFunction = Callable[[str, str], SupportsFloat]  # (text of a finished trace, gold answer)

DEFAULT_TASK = {"name": "automaton", "args": {"min_steps": 2, "max_steps": 6}}
DEFAULT_SPEC = ChunkSpec(context_size=64, carryover_size=32, max_chunks=8, head_size=0)


class Task(Protocol):
    """A stream of problems, indexable without end."""

    def problem(self, split: str, index: int) -> Problem:
        """Problem ``index`` of ``split``."""
        ...


class EpisodeEnv(gymnasium.Env[Observation, Action]):
    """One episode is one trace. Not an environment yet: it has no spaces and no ``step``.

    Args:
        task: where problems come from: a registered name, ``{"name": ..., "args": ...}``, or any
            object with ``problem(split, index)``.
        reward: scores the stitched text of a finished trace against the gold answer: a registered
            name, or a function of both.
        tokenizer: turns prompts into ids and traces into text; by default one of single characters.
        chunk_spec: the chunk rule's sizes.
        eos_ids: the tokens that end an answer; by default the tokenizer's.
        vocabulary: number of token ids; by default the tokenizer's.
        split: the task's split to draw from.
        max_query_tokens: bound of the observation space on the query.
        render_mode: ``"ansi"`` or ``"html"``.
        keep_trace: keep what was sampled, for ``trace`` and for the reward. Without it, memory does
            not grow with the number of chunks, and the reward reads what the last context held.
        sizes: single values of ``chunk_spec`` by their names, a carryover or boundary also by its
            registered one: ``context_size=64, carryover="tail"``.

    Raises:
        ConfigError: an unknown name or parameter, or values that cannot work together.
    """

    metadata = {"render_modes": ["ansi", "html"], "render_fps": 4}  # noqa: RUF012 - Gymnasium's

    def __init__(
        self,
        task: Task | str | Mapping[str, Any] = DEFAULT_TASK,
        reward: RewardFunction | str = "exact",
        tokenizer: Tokenizer | None = None,
        chunk_spec: ChunkSpec | None = None,
        eos_ids: Sequence[int] | None = None,
        vocabulary: int | None = None,
        split: str = "train",
        max_query_tokens: int = 2048,
        render_mode: str | None = None,
        keep_trace: bool = True,
        **sizes: Any,
    ) -> None:
        self.tokenizer: Any = CharacterTokenizer() if tokenizer is None else tokenizer
        self.chunk_spec = self._spec(chunk_spec, sizes)  # not `spec`: that is Gymnasium's own
        self.task: Task = make("delethink.tasks", task)
        if not callable(getattr(self.task, "problem", None)):
            raise ConfigError(f"a task has problem(split, index), got {task!r:.80}")
        self.reward = _reward(reward)
        self.vocabulary = self._size(vocabulary)
        self.eos_ids = self._ends(eos_ids)
        if max_query_tokens < 1:
            raise ConfigError(f"max_query_tokens must be at least 1, got {max_query_tokens}")
        self.split, self.max_query_tokens = split, max_query_tokens
        self.render_mode, self.keep_trace = self._known_mode(render_mode), keep_trace
        self.problem: Problem | None = None
        self._state: ThinkingState | None = None
        self._taken: list[tuple[TokenIds, StopReason, ChunkRole]] = []  # all chunks, where kept
        self._last: TokenIds = ()  # of the chunk before

    # -- making --------------------------------------------------------------------------------

    def _spec(self, chunk_spec: ChunkSpec | None, sizes: dict[str, Any]) -> ChunkSpec:
        known = {field.name for field in fields(ChunkSpec) if field.init}
        for name in sizes:
            if name not in known:
                makers = (EpisodeEnv, type(self))
                own = {p for maker in makers for p in inspect.signature(maker).parameters}
                own -= {"args", "options", "sizes"}
                raise ConfigError(
                    f"{type(self).__name__} has no parameter {name!r}."
                    f"{did_you_mean(name, own | known)}"
                )
        for name, group in (("carryover", "carryovers"), ("boundary", "boundaries")):
            if name in sizes:
                sizes[name] = make(f"delethink.{group}", sizes[name])
        spec = DEFAULT_SPEC if chunk_spec is None else chunk_spec
        if not isinstance(spec, ChunkSpec):
            raise ConfigError(
                f"chunk_spec must be a delethink.ChunkSpec, got {spec!r:.80}; its sizes may "
                "also be given one by one: context_size=64"
            )
        return replace(spec, **sizes).bind(self.tokenizer)

    def _size(self, vocabulary: int | None) -> int:
        if vocabulary is None:
            if not hasattr(self.tokenizer, "__len__"):
                raise ConfigError("the tokenizer does not say how many tokens it has: vocabulary=")
            vocabulary = len(self.tokenizer)
        if vocabulary < 1:
            raise ConfigError(f"vocabulary must be at least 1, got {vocabulary}")
        return vocabulary

    def _ends(self, eos_ids: Sequence[int] | None) -> frozenset[int]:
        if eos_ids is None:
            eos_ids = [i for i in [getattr(self.tokenizer, "eos_token_id", None)] if i is not None]
        ends = frozenset(int(i) for i in eos_ids)
        if not ends or not all(0 <= i < self.vocabulary for i in ends):
            raise ConfigError(
                f"eos_ids must name at least one token below vocabulary={self.vocabulary}, or no "
                f"answer could ever end; got {sorted(ends)}"
            )
        return ends

    def _known_mode(self, render_mode: str | None) -> str | None:
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ConfigError(
                f"unknown render_mode {render_mode!r}."
                f"{did_you_mean(render_mode, self.metadata['render_modes'])}"
            )
        return render_mode

    @property
    def longest_context(self) -> int:
        """The most tokens that are ever seen at once: query and thinking."""
        return self.max_query_tokens + self.chunk_spec.max_thinking_context

    # -- playing -------------------------------------------------------------------------------

    def _begin(self, seed: int | None, options: dict[str, Any] | None) -> ThinkingState:
        """Draws a problem, or takes ``options["problem"]``."""
        super().reset(seed=seed)
        self.problem = _problem_in(options or {}) or self.task.problem(
            self.split, int(self.np_random.integers(2**31))
        )
        query = query_ids(self.tokenizer, self.problem)
        if query and max(query) >= self.vocabulary:
            raise ConfigError(
                f"the query has the token {max(query)}, outside the vocabulary of {self.vocabulary}"
            )
        self._state = start(self.chunk_spec, token_array(query), self.longest_context)
        self._taken, self._last = [], ()
        return self._state

    def _running_state(self) -> ThinkingState:
        if self._state is None:
            raise ActionError("call reset() before the first step()")
        if self._state.stop is not None:
            raise ActionError(f"the trace has ended ({self._state.stop.value}); call reset()")
        return self._state

    def _take(self, output_ids: TokenIds, stop: StopReason) -> tuple[ThinkingState, float]:
        """Ends a chunk; the state after it, and the reward."""
        before = self._running_state()
        state = before.advance(output_ids, stop)
        self._state, self._last = state, output_ids
        if self.keep_trace:
            self._taken.append((output_ids, stop, before.role))
        return state, 0.0 if state.stop is None else self._score(before, state)

    def _score(self, before: ThinkingState, after: ThinkingState) -> float:
        assert self.problem is not None
        assert after.stop is not None
        read = self._stitched() if self.keep_trace else before.carried + self._last
        text = reward_text(self.tokenizer, read)
        if not hasattr(self.reward, "arguments"):
            return float(self.reward(text, self.problem.answer))
        attempt = Attempt(
            problem=self.problem,
            text=text,
            stop=after.stop,
            length=after.num_sampled,
            num_chunks=after.num_chunks,
            budget=self.chunk_spec.budget,
            max_chunks=self.chunk_spec.max_chunks,
            output_ids=tuple(read),
        )
        return float(self.reward.function(**self.reward.arguments(attempt)) or 0.0)

    def _stitched(self) -> TokenIds:
        """All tokens of thinking so far."""
        return joined(ids for ids, _, role in self._taken if role is ChunkRole.THINKING)

    @property
    def trace(self) -> Trace:
        """What was sampled in this episode, chunk by chunk, without log-probs.

        Raises:
            ActionError: there is no episode, or traces are not kept.
        """
        if self._state is None or not self.keep_trace:
            why = "call reset() first" if self.keep_trace else "keep_trace is off"
            raise ActionError(f"there is no trace: {why}")
        state, chunks = start(self.chunk_spec, self._state.query_ids), []
        for output_ids, stop, _ in self._taken:
            carried = len(state.prompt_ids) - len(state.query_ids)
            chunks.append(
                Chunk(
                    prompt_ids=tuple(state.prompt_ids),
                    output_ids=tuple(output_ids),
                    logprobs=(),
                    stop=stop,
                    carried=carried,
                    policy_version=None,
                    role=state.role,
                )
            )
            state = state.advance(output_ids, stop)
        return Trace(tuple(state.query_ids), tuple(chunks), state.stop or TraceStop.CUT)

    # -- describing ----------------------------------------------------------------------------

    def _facts(self, state: ThinkingState) -> dict[str, Any]:
        return {
            "max_new_tokens": state.max_new_tokens,
            "chunk": state.num_chunks,
            "carried": state.num_carried,
            "num_sampled": state.num_sampled,
            "budget_left": state.budget_left,
            "role": state.role.value,
            "stop": state.stop.value if state.stop else None,
        }

    def render(self) -> str | None:
        """Query, carryover and new tokens apart, as ``render_mode`` says."""
        if self.render_mode is None or self._state is None:
            return None
        state = self._state
        query, carried = self._text(state.query_ids), self._text(state.carried)
        if self.render_mode == "ansi":
            name, ids = self._sampled()
            return render_ansi({"query": query, "carried": carried, name: self._text(ids)})
        facts = self._facts(state)
        name, ids = self._new()
        return render_html(
            [
                ("query", "query", query),
                ("carried", "carried over the last boundary", carried),
                ("new", name, self._text(ids)),
            ],
            {key.replace("_", " "): facts[key] for key in _SHOWN},
        )

    def _sampled(self) -> tuple[str, TokenIds]:
        return ("sampled so far", self._stitched()) if self.keep_trace else self._new()

    def _new(self) -> tuple[str, TokenIds]:
        return "last chunk", self._last

    def _text(self, ids: TokenIds) -> str:
        return str(self.tokenizer.decode(as_list(ids)))


def _reward(reward: RewardFunction | str) -> Any:
    """A function of text and answer, or a registered reward with the parameters that it asks for.

    A reward that does not apply (``None``) pays nothing here.
    """
    if callable(reward):
        return reward
    if not isinstance(reward, str):
        raise ConfigError(f"a reward is a name or a function of text and answer, got {reward!r}")
    named = Reward(reward, resolve("delethink.rewards", reward))
    if named.kind in ("async", "trl") or named.needs_correctness:
        raise ConfigError(
            f"the reward {reward!r} cannot be asked about one trace alone: name it in a recipe, or "
            "give a function of text and answer"
        )
    named.check()
    return named


def as_array(ids: TokenIds) -> Ids:
    """A new array of the ids."""
    return as_view(ids).copy()


def as_view(ids: TokenIds) -> Ids:
    """The ids as an array that cannot be written to."""
    return np.frombuffer(memory_of(ids), np.int64)


def _problem_in(options: dict[str, Any]) -> Problem | None:
    for name in options:
        if name != "problem":
            raise ConfigError(f"reset has no option {name!r}.{did_you_mean(name, ['problem'])}")
    problem = options.get("problem")
    if isinstance(problem, Mapping):
        unknown = set(problem) - {field.name for field in fields(Problem)}
        if unknown or not {"prompt", "answer"} <= set(problem):
            raise ConfigError(
                f"a problem has a prompt, an answer and perhaps metadata; got {sorted(problem)}"
            )
        problem = Problem(**problem)
    if problem is not None and not isinstance(problem, Problem):
        raise ConfigError(f"options['problem'] must be a delethink.Problem, got {problem!r:.80}")
    return problem
