"""Conformance checks for environments, carryover policies and boundary policies.

Each check samples random tokens and raises ``ConformanceError`` with the first violation. Use
``check_thinking_env`` together with ``gymnasium.utils.env_checker.check_env``, which does not test
chunks.

    from delethink.testing import check_carryover, check_thinking_env

    check_thinking_env(gymnasium.make("delethink.envs:delethink/Thinking-v0"))
    check_carryover(MyCarryover())
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

from delethink.carryover import Boundary, Carryover, name_of
from delethink.chunking import ChunkSpec, ThinkingState, start
from delethink.errors import ConfigError, ConformanceError, DelethinkError
from delethink.tokenization import Tokenizer, encode
from delethink.tokens import token_array
from delethink.types import ChunkRole, StopReason, TokenIds

_INFO_TYPES: dict[str, type | tuple[type, ...]] = {
    "max_new_tokens": int,
    "chunk": int,
    "carried": int,
    "num_sampled": int,
    "budget_left": int,
    "role": str,
    "stop": (str, type(None)),
}
CheckedPolicy = TypeVar("CheckedPolicy", Carryover, Boundary)

_VOCABULARY = 1000  # without a tokenizer; large enough to make equal tokens rare


# -- carryover policies ----------------------------------------------------------------------------


def check_carryover(
    policy: Carryover,
    sizes: Iterable[int] = (1, 2, 7, 256),
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
) -> None:
    """Check the contract of a carryover policy at random boundaries and in whole traces.

    The policy must return token ids within its bound. Equal arguments must give equal results in
    any order, from a copy of the policy, and for ``TokenArray`` as for tuples.

    Args:
        policy: the policy to check.
        sizes: values of m; those refused by ``policy.check`` are skipped.
        tokenizer: bound to the policy, and the source of random tokens.
        seed: seed of the random boundaries.

    Raises:
        ConformanceError: the policy breaks the contract; the text has the arguments.
    """
    policy = policy if tokenizer is None else policy.bind(tokenizer)
    if policy.unbound:
        raise ConformanceError(f"{name_of(policy)!r} works on text: pass a tokenizer to the check")
    rng, tried = random.Random(seed), 0
    for size in sizes:
        try:
            policy.check(size, 2 * size)
        except ConfigError:
            continue
        tried += 1
        _check_boundaries(policy, size, rng, tokenizer)
        _check_traces(policy, size, rng, tokenizer)
    if not tried:
        raise ConformanceError(f"{name_of(policy)!r} refuses all carryover sizes {list(sizes)}")


def _check_boundaries(
    policy: Carryover, size: int, rng: random.Random, tokenizer: Tokenizer | None
) -> None:
    bound = policy.bound(size)
    _require(
        bound is None or (isinstance(bound, int) and bound >= 0),
        f"the bound of {name_of(policy)!r} for m={size} must be a number of tokens or None, got "
        f"{bound!r}",
    )
    calls: list[tuple[TokenIds | None, TokenIds, Any]] = []
    head: TokenIds | None = None
    for _ in range(30):
        window = _random_ids(rng, rng.randint(1, 4 * size + 8), tokenizer)
        result = _carry(policy, head, window, size)
        calls.append((head, window, result))
        head = result[0] if rng.random() < 0.7 else None
    other = _copied(policy)
    rng.shuffle(calls)
    for head, window, result in calls:
        arrays = (None if head is None else token_array(head), token_array(window))
        for caller, what, arguments in (
            (policy, "a second call", (head, window)),
            (other, "a copy", (head, window)),
            (policy, "a call with TokenArray", arrays),
        ):
            _require(
                _carry(caller, *arguments, size) == result,
                f"{name_of(policy)!r} is not pure: {what} returns other tokens for the same "
                f"boundary (m={size}, head={head!r:.100}, window={window!r:.200})",
            )


def _carry(
    policy: Carryover, head: TokenIds | None, window: TokenIds, size: int
) -> tuple[TokenIds, TokenIds]:
    returned = policy.carry(head, window, size)
    where = f"(m={size}, head={head!r:.100}, window={window!r:.200})"
    try:
        first, rest = (tuple(part) for part in returned)
    except (TypeError, ValueError):
        raise ConformanceError(
            f"{name_of(policy)!r} must return a head and a tail, got {returned!r:.200} {where}"
        ) from None
    for token in first + rest:
        _require(
            isinstance(token, int) and token >= 0,
            f"{name_of(policy)!r} returned {token!r}, not a token id {where}",
        )
    bound, found = policy.bound(size), len(first) + len(rest)
    _require(
        bound is None or found <= bound,
        f"{name_of(policy)!r} returned {found} tokens; its bound is {bound} {where}",
    )
    return first, rest


def _check_traces(
    policy: Carryover, size: int, rng: random.Random, tokenizer: Tokenizer | None
) -> None:
    """Run whole traces, in which chunking checks the bound."""
    spec = ChunkSpec(2 * size + rng.randint(1, 9), size, 6, carryover=policy)
    for _ in range(5):
        state = start(spec, _random_ids(rng, 3, tokenizer))
        while state.stop is None:
            longest = len(state.query_ids) + spec.max_thinking_context
            _require(
                0 < state.max_new_tokens <= state.budget_left
                and len(state.prompt_ids) + state.max_new_tokens <= longest,
                f"{name_of(policy)!r} lets a context grow beyond {longest} tokens (m={size})",
            )
            count = rng.randint(1, state.max_new_tokens)
            state = state.advance(_random_ids(rng, count, tokenizer), StopReason.LENGTH)


def _copied(value: CheckedPolicy) -> CheckedPolicy:
    """Return a pickled copy, or a deep copy for a class local to a function."""
    try:
        return pickle.loads(pickle.dumps(value))  # type: ignore[no-any-return]
    except (pickle.PicklingError, AttributeError, TypeError):
        return copy.deepcopy(value)


def _random_ids(rng: random.Random, count: int, tokenizer: Tokenizer | None) -> TokenIds:
    known = len(tokenizer) if isinstance(tokenizer, Sized) else _VOCABULARY
    return tuple(rng.randrange(known) for _ in range(count))


def check_boundary(
    boundary: Boundary,
    tokenizer: Tokenizer | None = None,
    texts: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """Check whether a boundary policy has a valid ``within`` and is pure.

    Args:
        boundary: the policy to check.
        tokenizer: bound to the policy, and the source of random tokens.
        texts: additional chunks, for boundaries which are rare in random tokens.
        seed: seed of the random chunks.

    Raises:
        ConformanceError: the policy breaks the contract.
    """
    boundary = boundary if tokenizer is None else boundary.bind(tokenizer)
    if boundary.unbound:
        raise ConformanceError(
            f"{name_of(boundary)!r} works on text: pass a tokenizer to the check"
        )
    within = getattr(boundary, "within", None)
    _require(
        isinstance(within, int) and within >= 1,
        f"within of {name_of(boundary)!r} must be a number of tokens of at least 1, got {within!r}",
    )
    rng, calls = random.Random(seed), []
    chunks = [_random_ids(rng, rng.randint(1, 40), tokenizer) for _ in range(50)]
    chunks += [encode(tokenizer, text) for text in texts if tokenizer is not None]
    for chunk in chunks:
        room = rng.randint(1, boundary.within)
        calls.append((chunk, room, boundary.ends(chunk, room)))
    rng.shuffle(calls)
    other = _copied(boundary)
    for chunk, room, result in calls:
        _require(
            bool(boundary.ends(chunk, room)) == bool(result) == bool(other.ends(chunk, room)),
            f"{name_of(boundary)!r} is not pure: a second call returns another value "
            f"({chunk!r:.200})",
        )


# -- environments ----------------------------------------------------------------------------------


@dataclass
class _Step:
    """Result of ``reset`` or ``step``."""

    observation: Any
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]

    @property
    def ended(self) -> bool:
        return self.terminated or self.truncated


def check_thinking_env(env: Any, episodes: int = 8, seed: int = 0) -> None:
    """Check a thinking environment in episodes of random actions.

    A ``Discrete`` action space means one token per step, any other one chunk per step. The check
    covers ``info``, the end of episodes, the budget, the bound of the state, determinism for equal
    seeds and actions, and errors for illegal actions and steps after the end. If the environment
    has a ``chunk_spec``, its prompts must follow it.

    Args:
        env: the environment, wrapped or not.
        episodes: number of episodes.
        seed: seed of the random actions and of ``reset``.

    Raises:
        ConformanceError: the environment breaks the contract; the text has the expected value.
    """
    checker = _EnvChecker(env, random.Random(seed))
    checker.check_start()
    for episode in range(episodes):
        # Episodes without EOS run out of budget.
        end_after = (None, 0, 1, 2)[episode % 4]
        actions, steps = checker.run_episode(seed + episode, end_after)
        again = checker.replay(seed + episode, actions)
        _require(_same(steps, again), "equal seeds and actions must give equal results")
    checker.check_problem(seed)
    checker.check_errors(seed)


class _EnvChecker:
    def __init__(self, env: Any, rng: random.Random) -> None:
        self.env, self.rng = env, rng
        self.inner = env.unwrapped
        self.by_token = hasattr(env.action_space, "n")
        self.by_text = getattr(env.action_space.dtype, "kind", None) == "U"
        self.eos_ids = frozenset(getattr(self.inner, "eos_ids", ()))
        self._chunk: TokenIds = ()  # the tokens of the current chunk, at token level
        self.spec: ChunkSpec | None = getattr(self.inner, "chunk_spec", None)

    # -- the checks ----------------------------------------------------------------------------

    def check_start(self) -> None:
        info = self._reset(seed=0).info
        _require(info["stop"] is None, "info['stop'] must be None after reset")
        for key in ("num_sampled", "chunk"):
            _require(info[key] == 0, f"info[{key!r}] must be 0 after reset")
        _require(info["carried"] == 0, "info['carried'] must be 0 before the first boundary")

    def run_episode(self, seed: int, end_after: int | None) -> tuple[list[Any], list[_Step]]:
        """Run an episode. ``end_after`` is the number of chunks before the one with EOS."""
        seen, actions = [self._reset(seed=seed)], []
        budget = seen[0].info["budget_left"]
        state = self.spec and start(self.spec, self._observed_ids(seen[0]))
        while not seen[-1].ended:
            before = seen[-1].info
            thinking = before["role"] == ChunkRole.THINKING.value
            wants_end = end_after is not None and before["chunk"] >= end_after and thinking
            action = self._action(before, bool(wants_end and self.eos_ids))
            actions.append(action)
            seen.append(self._step(action))
            self._check_step(before, seen[-1], budget)
            state = state and self._advance(state, action, seen[-1])
            _require(len(actions) <= 4 * budget + 4, "an episode must end within its budget")
            if thinking and self._ends_answer(action, seen[-1].info, bool(wants_end)):
                _require(seen[-1].terminated, "an EOS token must terminate the episode")
        self._check_refused(
            self._action(seen[-2].info, False), "a step after the end of the episode"
        )
        return actions, seen

    def replay(self, seed: int, actions: list[Any]) -> list[_Step]:
        return [self._reset(seed=seed), *(self._step(action) for action in actions)]

    def check_problem(self, seed: int) -> None:
        """Check that ``options["problem"]`` overrides the seed."""
        self._reset(seed=seed)
        problem = getattr(self.inner, "problem", None)
        if problem is None:
            return
        first = self._reset(seed=seed + 1, options={"problem": problem})
        second = self._reset(seed=seed + 2, options={"problem": problem})
        _require(_same([first], [second]), "options={'problem': ...} must determine the problem")

    def check_errors(self, seed: int) -> None:
        info = self._reset(seed=seed).info
        if self.by_token:
            for wrong in (-1, int(self.env.action_space.n), 0.5, None):
                self._check_refused(wrong, f"the action {wrong!r}")
            return
        self._check_refused("" if self.by_text else [], "an action without a token")
        if not self.by_text:
            token = self._token()
            self._check_refused(
                [token] * (info["max_new_tokens"] + 1), "more tokens than max_new_tokens"
            )
            self._check_refused([-1], "a negative token")

    # -- checks of every step ------------------------------------------------------------------

    def _check_step(self, before: dict[str, Any], seen: _Step, budget: int) -> None:
        info = seen.info
        taken = 1 if self.by_token else len(info["output_ids"])
        _require(taken >= 1, "a step must take at least one token")
        _require(
            info["num_sampled"] == before["num_sampled"] + taken,
            f"info['num_sampled'] must grow by {taken} tokens from "
            f"{before['num_sampled']}, got {info['num_sampled']}",
        )
        _require(
            info["num_sampled"] <= budget, f"info['num_sampled'] exceeds the budget of {budget}"
        )
        _require(
            info["budget_left"] <= before["budget_left"] - (0 if seen.ended else taken),
            "info['budget_left'] must fall by at least the tokens of the step",
        )
        _require(
            not (seen.terminated and seen.truncated),
            "terminated and truncated must not both be true",
        )
        ends = {(True, False): "completed", (False, True): "budget", (False, False): None}
        expected = ends[seen.terminated, seen.truncated]
        _require(
            info["stop"] == expected,
            f"info['stop'] must be {expected!r} for terminated={seen.terminated} and "
            f"truncated={seen.truncated}, got {info['stop']!r}",
        )
        none_left = (info["max_new_tokens"] == 0) and (info["budget_left"] == 0)
        _require(
            none_left is seen.ended,
            "info['max_new_tokens'] and info['budget_left'] must be 0 after the end only",
        )
        if seen.ended:
            return
        _require(
            info["max_new_tokens"] <= info["budget_left"],
            "info['max_new_tokens'] must not exceed info['budget_left']",
        )
        most = None if self.spec is None else self.spec.max_carried
        _require(
            most is None or info["carried"] <= most,
            f"info['carried'] is {info['carried']} and exceeds the bound of {most}",
        )

    def _ends_answer(self, action: Any, info: dict[str, Any], wanted: bool) -> bool:
        """Return whether the tokens of the step end the answer."""
        early = self.spec is not None and self.spec.boundary is not None
        if wanted and self.eos_ids and not self.by_token and not self.by_text and not early:
            return True
        return int(action if self.by_token else info["output_ids"][-1]) in self.eos_ids

    def _advance(self, state: ThinkingState, action: Any, seen: _Step) -> ThinkingState:
        """Compare a step with chunking and return the next state."""
        if self.by_token:
            chunk = (*self._chunk, int(action))
        else:
            chunk = tuple(map(int, seen.info["output_ids"]))
        ended = chunk[-1] in self.eos_ids
        full = ended or not self.by_token or len(chunk) == state.max_new_tokens
        if full or state.boundary_after(chunk):
            state = state.advance(chunk, StopReason.EOS if ended else StopReason.LENGTH)
            chunk = chunk if self.by_token and state.stop else ()
        self._chunk = chunk
        _require(
            self._observed_ids(seen) == tuple(state.prompt_ids) + chunk,
            "the window must have the prompt of chunk_spec and the tokens of the chunk"
            if self.by_token
            else "the prompt after a chunk must be the one of chunk_spec",
        )
        return state

    # -- calls of the environment --------------------------------------------------------------

    def _reset(self, **options: Any) -> _Step:
        self._chunk = ()
        observation, info = self.env.reset(**options)
        return self._checked(_Step(observation, 0.0, False, False, info))

    def _step(self, action: Any) -> _Step:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._checked(_Step(observation, float(reward), terminated, truncated, info))

    def _checked(self, seen: _Step) -> _Step:
        for key, kind in _INFO_TYPES.items():
            _require(key in seen.info, f"info must have {key!r}")
            value = seen.info[key]
            _require(isinstance(value, kind), f"info[{key!r}] has a wrong type: {value!r}")
        roles = [role.value for role in ChunkRole]
        _require(
            seen.info["role"] in roles,
            f"info['role'] must be one of {roles}, got {seen.info['role']!r}",
        )
        if not self.by_token:
            for key in ("prompt_ids", "output_ids"):
                _require(key in seen.info, f"info must have {key!r}, the exact ids")
        space = self.env.observation_space
        _require(seen.observation in space, f"an observation must be in {space!r:.200}")
        return seen

    def _observed_ids(self, seen: _Step) -> TokenIds:
        """Return the tokens of the observation."""
        if self.by_token:
            window = seen.observation
            return tuple(int(i) for i in window["ids"][window["mask"] == 1])
        ids = tuple(int(i) for i in seen.info["prompt_ids"])
        if not self.by_text:
            shown = tuple(int(i) for i in seen.observation)
            _require(shown == ids, "the observation must equal info['prompt_ids']")
        return ids

    def _action(self, info: dict[str, Any], end: bool) -> Any:
        """Return a random legal action, with EOS if ``end``."""
        if self.by_token:
            return next(iter(self.eos_ids)) if end else self._token()
        most = max(1, info["max_new_tokens"])
        count = self.rng.randint(1, most)
        ids = [self._token() for _ in range(count - end)]
        ids += [next(iter(self.eos_ids))] if end else []
        if not self.by_text:
            return ids
        text = str(self.inner.tokenizer.decode(ids))
        fits = 1 <= len(encode(self.inner.tokenizer, text)) <= most if text else False
        return text if fits else self.env.action_space.sample(mask=1)

    def _token(self) -> int:
        """Return a random token other than EOS."""
        known = int(self.env.action_space.n) if self.by_token else self.inner.vocabulary
        while (token := self.rng.randrange(known)) in self.eos_ids:
            continue
        return token

    def _check_refused(self, action: Any, what: str) -> None:
        try:
            self.env.step(action)
        except (DelethinkError, ValueError, TypeError, RuntimeError):
            return
        raise ConformanceError(f"{what} must be an error")


def _same(one: list[_Step], other: list[_Step]) -> bool:
    from gymnasium.utils.env_checker import data_equivalence  # the core loads without Gymnasium

    return bool(data_equivalence([*map(vars, one)], [*map(vars, other)], exact=True))


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise ConformanceError(text)
