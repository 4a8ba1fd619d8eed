"""Common base of the thinking environments: construction, episodes, rewards and rendering.

A boundary between chunks is neither ``terminated`` nor ``truncated``: the context is discarded, and
the next observation is the query and the carryover. ``terminated`` means the policy ended its
answer, ``truncated`` means the budget is used up.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Self, TypeVar

import gymnasium
from gymnasium.envs.registration import EnvSpec

from delethink.chunking import ChunkSpec, ThinkingState, start
from delethink.envs.arguments import (
    MAX_VOCABULARY,
    check_flag,
    check_number,
    default_eos_ids,
    make_tokenizer,
    problem_from,
    query_of,
    token_set,
)
from delethink.envs.reward import EpisodeReward, RewardFunction
from delethink.errors import ActionError, ConfigError, did_you_mean
from delethink.output import safe_text
from delethink.registry import make
from delethink.tasks import Task, as_problem, check_split, rewards_of
from delethink.thinking_marks import AUTO, ThinkingMarks, find_thinking_marks, marks_of
from delethink.tokenization import (
    Tokenizer,
    check_template_kwargs,
    check_thinking_is_open,
    keep_marks,
    reward_text,
)
from delethink.tokens import as_list, joined
from delethink.trace_html import (
    TraceView,
    answer_place,
    sections_html,
    token_texts,
    trace_html,
    trace_style,
)
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

_HTML_FACTS = ("chunk", "num_sampled", "budget_left", "role", "stop")

DEFAULT_TASK = {"name": "automaton", "args": {"min_steps": 2, "max_steps": 6}}
DEFAULT_SPEC = ChunkSpec(context_size=64, carryover_size=32, max_chunks=8, head_size=0)


class EpisodeEnv(gymnasium.Env[Observation, Action]):
    """Abstract base class. One episode is one trace.

    Subclasses add the spaces, ``_begin`` and ``step``.

    Args:
        task: source of problems: a registered name, ``{"name": ..., "args": ...}``, or any object
            with ``problem(split, index)``.
        reward: scores a finished trace: a registered name, ``{"name": ..., "args": ...}``, or a
            function whose parameters name its inputs, such as ``text`` and ``answer``; by default
            the first reward of the task, or ``"exact"``.
        tokenizer: encodes prompts and decodes traces: an object, a folder, or a Hugging Face id;
            by default one token per character.
        chunk_spec: sizes and policies of the chunks.
        eos_ids: tokens ending an answer; by default those of the tokenizer, its chat template, and
            the settings of its model.
        vocabulary: number of token ids; by default the tokenizer's.
        max_query_tokens: maximum length of a query, for the observation space.
        render_mode: ``"ansi"`` or ``"html"``.
        keep_trace: keep all sampled tokens, for ``trace`` and for the reward. If off, memory does
            not grow with the number of chunks, and the reward reads the last context only.
        chat_template_kwargs: variables of the tokenizer's chat template, such as
            ``{"enable_thinking": True}``.
        end_of_thinking: mark between thinking and answer, ``"auto"`` for the one that template or
            tokens show, or ``None``: the whole output is the answer.
        trust_remote_code: run the code of a tokenizer given by name.
        sizes: fields of ``chunk_spec`` to replace, such as ``context_size=64``. A carryover or
            boundary may be given by its registered name.

    Copies of an environment share its tokenizer and its task.

    Raises:
        ConfigError: a name or parameter is unknown, or values contradict each other.
        ModelError: the tokenizer of a name cannot be loaded.
    """

    metadata = {"render_modes": ["ansi", "html"], "render_fps": 4}  # noqa: RUF012 - Gymnasium's

    def __init__(
        self,
        task: Task | str | Mapping[str, Any] = DEFAULT_TASK,
        reward: RewardFunction | str | Mapping[str, Any] | None = None,
        tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
        chunk_spec: ChunkSpec | None = None,
        eos_ids: Sequence[int] | None = None,
        vocabulary: int | None = None,
        split: str = "train",
        max_query_tokens: int = 2048,
        render_mode: str | None = None,
        keep_trace: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        end_of_thinking: str | None = AUTO,
        trust_remote_code: bool = False,
        **sizes: Any,
    ) -> None:
        self._spec: EnvSpec | None = None
        check_flag("keep_trace", keep_trace)
        check_flag("trust_remote_code", trust_remote_code)
        check_number("max_query_tokens", max_query_tokens)
        check_split(split)
        self.tokenizer: Any = make_tokenizer(tokenizer, trust_remote_code)
        check_template_kwargs(self.tokenizer, chat_template_kwargs)
        self.chat_template_kwargs = chat_template_kwargs
        self.chunk_spec = self._make_spec(chunk_spec, sizes)  # `spec` is Gymnasium's own attribute
        self.task: Task = make("delethink.tasks", task)
        if isinstance(self.task, type) or not callable(getattr(self.task, "problem", None)):
            raise ConfigError(
                f"a task must be an object with problem(split, index), got {task!r:.80}"
            )
        if reward is None:
            reward = next(iter(rewards_of(self.task)), "exact")
        self.reward = EpisodeReward(reward)
        self.thinking_marks = self._find_marks(end_of_thinking)
        self._set_vocabulary(vocabulary, eos_ids, tokenizer, trust_remote_code)
        self.split, self.max_query_tokens = split, max_query_tokens
        modes = self.metadata["render_modes"]
        if render_mode is not None and render_mode not in modes:
            raise ConfigError(
                f"unknown render_mode {render_mode!r}.{did_you_mean(str(render_mode), modes)}"
            )
        self.render_mode, self.keep_trace = render_mode, keep_trace
        self.problem: Problem | None = None
        self._state: ThinkingState | None = None
        self._chunks: list[tuple[ThinkingState, TokenIds, StopReason]] = []  # with keep_trace
        self._last_output: TokenIds = ()
        self._has_open_thinking = False  # checked with the first problem

    def _make_spec(self, chunk_spec: ChunkSpec | None, sizes: dict[str, Any]) -> ChunkSpec:
        known = {field.name for field in fields(ChunkSpec)}
        for name in sizes:
            if name not in known:
                classes = (EpisodeEnv, type(self))
                own = {p for each in classes for p in inspect.signature(each).parameters}
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
                f"chunk_spec must be a delethink.ChunkSpec, got {spec!r:.80}; or pass its fields "
                "as parameters: context_size=64"
            )
        spec = replace(spec, **sizes).bind(self.tokenizer)
        if spec.budget >= 2**63:
            raise ConfigError(
                f"the budget of {spec.budget} tokens does not fit into 64 bits; lower context_size "
                "or max_chunks"
            )
        return spec

    def _find_marks(self, end_of_thinking: str | None) -> ThinkingMarks:
        """Return the marks of thinking; their special tokens stay in the text of rewards."""
        setting = self.reward.reward.mark_setting(end_of_thinking)
        if setting == AUTO and self.chat_template_kwargs is None:
            marks = marks_of(self.tokenizer)
        else:
            marks = find_thinking_marks(self.tokenizer, setting, self.chat_template_kwargs)
        if marks.end is not None and hasattr(self.tokenizer, "get_vocab"):  # has special tokens
            keep_marks(self.tokenizer, marks.end)
        return marks

    def _set_vocabulary(
        self,
        vocabulary: int | None,
        eos_ids: Sequence[int] | None,
        given: Tokenizer | str | os.PathLike[str] | None,
        trust_remote_code: bool,
    ) -> None:
        if vocabulary is None:
            if not hasattr(self.tokenizer, "__len__"):
                raise ConfigError("the tokenizer has no length: pass vocabulary=NUMBER_OF_TOKENS")
            vocabulary = len(self.tokenizer)
        check_number("vocabulary", vocabulary, MAX_VOCABULARY)
        if eos_ids is None:
            eos_ids = default_eos_ids(self.tokenizer, given, vocabulary, trust_remote_code)
        self.vocabulary, self.eos_ids = vocabulary, token_set("eos_ids", eos_ids)
        if not self.eos_ids or not all(0 <= i < vocabulary for i in self.eos_ids):
            raise ConfigError(
                f"eos_ids must name at least one token below vocabulary={vocabulary}, or no "
                f"answer can end; got {sorted(self.eos_ids)}"
            )

    @property
    def spec(self) -> EnvSpec | None:
        """Return Gymnasium's specification; copies of it share the tokenizer and the task."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        self._spec = spec and replace(spec, kwargs=_Arguments(spec.kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = memo[id(self)] = type(self).__new__(type(self))
        _share(memo, self.tokenizer, self.task)
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def close(self) -> None:
        """Stop the verifiers of the reward."""
        self.reward.close()

    @property
    def longest_context(self) -> int:
        """Return the maximum number of tokens in an observation: query and thinking."""
        return self.max_query_tokens + self.chunk_spec.max_thinking_context

    # -- episodes ------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode with a drawn problem, or with ``options["problem"]``.

        Raises:
            QueryTooLongError: the query has more than ``max_query_tokens`` tokens.
            ConfigError: an option is unknown, or the task gives no valid problem.
            ModelError: the chat template fails, or closes the thinking.
        """
        super().reset(seed=seed)
        self._state = None  # no step follows a reset that fails
        problem = problem_from(options)
        if problem is None:
            drawn = self.task.problem(self.split, int(self.np_random.integers(2**31)))
            problem = as_problem(drawn, "the problem of the task of this environment")
        self.problem = problem
        kwargs = self.chat_template_kwargs
        query = query_of(self.tokenizer, problem, self.vocabulary, kwargs)
        if not self._has_open_thinking:
            check_thinking_is_open(self.tokenizer, problem, kwargs, self.thinking_marks)
            self._has_open_thinking = True
        self._state = start(self.chunk_spec, query, self.longest_context)
        self._chunks, self._last_output = [], ()
        return self._begin(self._state)

    def _begin(self, state: ThinkingState) -> tuple[Observation, dict[str, Any]]:
        """Return the first observation and ``info`` of an episode."""
        raise NotImplementedError

    def _running_state(self) -> ThinkingState:
        if self._state is None:
            raise ActionError("call reset() before the first step()")
        if self._state.stop is not None:
            raise ActionError(f"the trace has ended ({self._state.stop.value}); call reset()")
        return self._state

    def _finish_chunk(self, output_ids: TokenIds, stop: StopReason) -> tuple[ThinkingState, float]:
        """Return the state after a chunk, and the reward."""
        before = self._running_state()
        state = before.advance(output_ids, stop)
        self._state, self._last_output = state, output_ids
        if self.keep_trace:
            self._chunks.append((before, output_ids, stop))
        return state, 0.0 if state.stop is None else self._score(before, state)

    def _score(self, before: ThinkingState, after: ThinkingState) -> float:
        assert self.problem is not None
        assert after.stop is not None
        ids = self._thinking() if self.keep_trace else before.carried + self._last_output
        attempt = Attempt(
            problem=self.problem,
            text=reward_text(self.tokenizer, ids),
            stop=after.stop,
            length=after.num_sampled,
            num_chunks=after.num_chunks,
            budget=self.chunk_spec.budget,
            max_chunks=self.chunk_spec.max_chunks,
            output_ids=ids,
            start_of_thinking=self.thinking_marks.start,
            end_of_thinking=self.thinking_marks.end,
        )
        return self.reward(attempt)

    def _thinking(self) -> TokenIds:
        """Return all thinking tokens of the episode."""
        return joined(ids for before, ids, _ in self._chunks if before.role is ChunkRole.THINKING)

    @property
    def trace(self) -> Trace:
        """Return the chunks of this episode, without log-probs.

        Raises:
            ActionError: there is no episode, or ``keep_trace`` is off.
        """
        if self._state is None or not self.keep_trace:
            why = "call reset() first" if self.keep_trace else "create it with keep_trace=True"
            raise ActionError(f"the environment has no trace; {why}")
        chunks = tuple(
            Chunk(
                prompt_ids=tuple(before.prompt_ids),
                output_ids=tuple(output_ids),
                logprobs=(),
                stop=stop,
                carried=len(before.prompt_ids) - len(before.query_ids),
                policy_version=None,
                role=before.role,
            )
            for before, output_ids, stop in self._chunks
        )
        return Trace(tuple(self._state.query_ids), chunks, self._state.stop or TraceStop.CUT)

    # -- info and rendering --------------------------------------------------------------------

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
        """Return the query, the carryover and the new tokens in the format of ``render_mode``."""
        if self.render_mode is None or self._state is None:
            return None
        state = self._state
        query, carried = self._text(state.query_ids), self._text(state.carried)
        name, ids = self._new_output()
        if self.render_mode == "ansi":
            if self.keep_trace:
                name, ids = "sampled so far", self._thinking() + self._unfinished_chunk()
            return render_ansi({"query": query, "carried": carried, name: self._text(ids)})
        facts = {key.replace("_", " "): self._facts(state)[key] for key in _HTML_FACTS}
        if self.keep_trace:
            return self._trace_html(state, facts)
        return sections_html(
            [
                ("query", "query", query),
                ("carried", "carried over the last boundary", carried),
                ("new", name, self._text(ids)),
            ],
            facts,
        )

    def _trace_html(self, state: ThinkingState, facts: Mapping[str, object]) -> str:
        """Return all chunks of the episode, the open one included, as HTML."""
        trace = self.trace
        if state.stop is None:
            prompt = tuple(state.prompt_ids)
            carried = len(prompt) - len(state.query_ids)
            ids = tuple(self._unfinished_chunk())
            now = Chunk(prompt, ids, (), StopReason.LENGTH, carried, None, role=state.role)
            trace = replace(trace, chunks=(*trace.chunks, now))
        texts = token_texts(self.tokenizer)
        view = TraceView(
            trace,
            texts,
            title="episode",
            facts=facts,
            answer=answer_place(trace, texts, self.thinking_marks.end),
            context_size=state.spec.context_size,
            is_open=state.stop is None,
        )
        return f"<style>{trace_style()}</style>{trace_html(view)}"

    def _new_output(self) -> tuple[str, TokenIds]:
        return "last chunk", self._last_output

    def _unfinished_chunk(self) -> TokenIds:
        """Return the tokens after the last finished chunk."""
        return ()

    def _text(self, ids: TokenIds) -> str:
        return str(self.tokenizer.decode(as_list(ids)))


class _Arguments(dict[str, Any]):
    """Arguments of an environment; copies share what never changes and may be large.

    Gymnasium copies them for every ``make`` and ``spec``, and a tokenizer of 262,144 tokens takes a
    second to copy.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Arguments:
        _share(memo, self.get("tokenizer"), self.get("task"))
        return _Arguments(copy.deepcopy(dict(self), memo))


def _share(memo: dict[int, Any], *parts: Any) -> None:
    """Make a deep copy hold these objects themselves. Plain settings are copied."""
    memo |= {id(part): part for part in parts if not isinstance(part, Mapping)}


def render_ansi(parts: Mapping[str, str]) -> str:
    """Return each part below its name in brackets."""
    return "\n".join(f"[{name}]\n{safe_text(text)}" for name, text in parts.items())
