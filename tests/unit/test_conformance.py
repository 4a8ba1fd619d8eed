"""The conformance checks find what is wrong: each environment and policy here breaks one thing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from delethink.carryover import Boundary, Carryover, Tail
from delethink.envs.thinking import ThinkingEnv
from delethink.envs.token_thinking import TokenThinkingEnv
from delethink.errors import ConformanceError, DelethinkError
from delethink.testing import check_boundary, check_carryover, check_thinking_env
from delethink.types import StopReason, TokenIds

SIZES: dict[str, Any] = {"context_size": 10, "carryover_size": 4, "max_chunks": 4}


def with_info(kind: type, change: Callable[[Any, dict[str, Any]], None]) -> Any:
    """An environment whose info is changed on its way out."""

    class Changed(kind):  # type: ignore[misc]
        def reset(self, **options: Any) -> Any:
            observation, info = super().reset(**options)
            change(self, info)
            return observation, info

        def step(self, action: Any) -> Any:
            *parts, info = super().step(action)
            change(self, info)
            return *parts, info

    return Changed(**SIZES)


def set_to(key: str, value: Any) -> Callable[[Any, dict[str, Any]], None]:
    return lambda env, info: info.update({key: value})


@pytest.mark.parametrize("kind", [ThinkingEnv, TokenThinkingEnv])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda env, info: info.pop("budget_left"), "info must have 'budget_left'"),
        (set_to("chunk", None), "info\\['chunk'\\] has a wrong type: None"),
        (set_to("role", "dreaming"), "must be one of .* got 'dreaming'"),
        (set_to("stop", "budget"), "must be None after reset"),
        (set_to("num_sampled", 0), "'num_sampled'\\] must grow by .* from 0, got 0"),
        (set_to("num_sampled", 3), "'num_sampled'\\] must be 0 after reset"),
        (set_to("carried", 1), "must be 0 before the first boundary"),
        (set_to("budget_left", 9), "must fall by at least"),
        (set_to("max_new_tokens", 5), "must be 0 after the end only|must not exceed|must grow"),
    ],
)
def test_wrong_info_is_found(kind: type, change: Any, text: str) -> None:
    with pytest.raises(ConformanceError, match=text):
        check_thinking_env(with_info(kind, change))


class Forgetful(ThinkingEnv):
    """Shows a prompt other than the one of chunk_spec."""

    def _observe(self, state: Any, output_ids: Any, ignored: int) -> Any:
        observation, info = super()._observe(state, output_ids, ignored)
        if state.num_chunks and len(observation) > 15:
            observation = observation[:-1]
            info["prompt_ids"] = info["prompt_ids"][:-1]
        return observation, info


class Deaf(ThinkingEnv):
    """Treats the end of an answer as a boundary."""

    def _finish_chunk(self, output_ids: Any, stop: Any) -> Any:
        return super()._finish_chunk(output_ids, StopReason.LENGTH)


class Tireless(ThinkingEnv):
    """Restarts after the end instead of raising."""

    def step(self, action: Any) -> Any:
        if self._state is not None and self._state.stop is not None:
            self.reset()
        return super().step(action)


class Lenient(ThinkingEnv):
    """Truncates a chunk instead of raising."""

    def step(self, action: Any) -> Any:
        limit = self._state.max_new_tokens if self._state else 0
        return super().step(action[: limit or len(action)])


class Moody(ThinkingEnv):
    """Rewards differ from time to time."""

    count = itertools.count()

    def _score(self, before: Any, after: Any) -> float:
        return float(next(self.count))


class Wilful(ThinkingEnv):
    """Ignores the given problem."""

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return super().reset(seed=seed)


class Both(ThinkingEnv):
    """An end is a truncation too."""

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated or terminated, info


class Outside(ThinkingEnv):
    """Observations are lists of text."""

    def _observe(self, state: Any, output_ids: Any, ignored: int) -> Any:
        observation, info = super()._observe(state, output_ids, ignored)
        return [str(i) for i in observation], info


class Stale(TokenThinkingEnv):
    """Shows the old window after a boundary."""

    def _open_chunk(self, state: Any) -> None:
        before = self._buffer.copy()
        super()._open_chunk(state)
        if state.num_chunks:
            self._buffer = before


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Forgetful, "must be the one of chunk_spec"),
        (Deaf, "an EOS token must terminate|'stop'|chunk_spec"),
        (Tireless, "a step after the end of the episode must be an error"),
        (Lenient, "more tokens than max_new_tokens must be an error"),
        (Moody, "equal seeds and actions must give equal results"),
        (Wilful, "must determine the problem"),
        (Both, "terminated and truncated must not both be true"),
        (Outside, "an observation must be in"),
        (Stale, "the window must have the prompt"),
    ],
)
def test_environments_breaking_the_contract_are_found(kind: Any, text: str) -> None:
    with pytest.raises(ConformanceError, match=text):
        check_thinking_env(kind(**SIZES))


class Promises(Carryover):
    def carry(self, head: Any, window: TokenIds, size: int) -> Any:
        return (), window[-size - 1 :]


class Counts(Carryover):
    count = 0

    def carry(self, head: Any, window: TokenIds, size: int) -> Any:
        type(self).count += 1
        return (), window[: self.count % 2]


class Remembers(Carryover):
    last: TokenIds = ()

    def carry(self, head: Any, window: TokenIds, size: int) -> Any:
        before, Remembers.last = Remembers.last, window
        return (), before[:size]


class OnlyTuples(Carryover):
    def carry(self, head: Any, window: Any, size: int) -> Any:
        return (), window[:1] if isinstance(window, tuple) else ()


class Words(Carryover):
    def carry(self, head: Any, window: Any, size: int) -> Any:
        return (), ("token",)


class Bare(Carryover):
    def carry(self, head: Any, window: Any, size: int) -> Any:
        return 7


class Unbounded(Carryover):
    def bound(self, size: int) -> Any:
        return -1

    def carry(self, head: Any, window: Any, size: int) -> Any:
        return (), ()


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (Promises(), "'Promises' returned .* tokens; its bound is"),
        (Counts(), "'Counts' is not pure"),
        (Remembers(), "'Remembers' is not pure"),
        (OnlyTuples(), "'OnlyTuples' is not pure: a call with TokenArray"),
        (Words(), "'Words' returned 'token', not a token id"),
        (Bare(), "'Bare' must return a head and a tail, got 7"),
        (Unbounded(), "the bound of 'Unbounded' for m=1 must be .* got -1"),
    ],
)
def test_policies_that_break_a_promise_are_found(policy: Carryover, text: str) -> None:
    with pytest.raises(ConformanceError, match=text):
        check_carryover(policy)


def test_a_policy_that_reads_text_needs_a_tokenizer_to_be_checked() -> None:
    from delethink.carryover import StateBlock

    with pytest.raises(ConformanceError, match="pass a tokenizer to the check"):
        check_carryover(StateBlock())
    check_carryover(Tail())


class Fickle(Boundary):
    within, count = 4, 0

    def ends(self, output_ids: TokenIds, room: int) -> bool:
        self.count += 1
        return self.count % 3 == 0


class Nowhere(Boundary):
    within = 0

    def ends(self, output_ids: TokenIds, room: int) -> bool:
        return False


def test_boundaries_that_break_a_promise_are_found() -> None:
    with pytest.raises(ConformanceError, match="'Fickle' is not pure"):
        check_boundary(Fickle())
    with pytest.raises(ConformanceError, match="got 0"):
        check_boundary(Nowhere())


def test_a_failed_check_is_an_assertion_and_one_of_ours() -> None:
    assert issubclass(ConformanceError, AssertionError)
    assert issubclass(ConformanceError, DelethinkError)
