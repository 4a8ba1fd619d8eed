"""Conformance checks for environments, carryover policies and boundaries of anybody's making.

Each plays a while with random tokens and raises ``ConformanceError`` with what is wrong; where it
returns, nothing was found. ``check_thinking_env`` stands beside Gymnasium's own
``gymnasium.utils.env_checker.check_env``, which knows nothing of chunks.

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

_FACTS: dict[str, type | tuple[type, ...]] = {
    "max_new_tokens": int,
    "chunk": int,
    "carried": int,
    "num_sampled": int,
    "budget_left": int,
    "role": str,
    "stop": (str, type(None)),
}
Policy = TypeVar("Policy", Carryover, Boundary)

_TAGS = 1000  # ids of random windows; enough that equal tokens seldom stand in for each other


# -- carryover policies ----------------------------------------------------------------------------


def check_carryover(
    policy: Carryover,
    sizes: Iterable[int] = (1, 2, 7, 256),
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
) -> None:
    """Whether a carryover policy keeps what it promises.

    It is asked at random boundaries and through whole traces: whether what it returns is token
    ids, no
    more than its bound, and the same each time, in whatever order it is asked, as a copy of itself,
    and for tokens in one block of memory as for a tuple.

    Args:
        policy: what is checked.
        sizes: values of m to check it with; those that the policy itself refuses are left out.
        tokenizer: bound to it, and the source of random tokens.
        seed: of the random boundaries.

    Raises:
        ConformanceError: it does not; the text names the policy and says when.
    """
    policy = policy if tokenizer is None else policy.bind(tokenizer)
    if policy.unbound:
        raise ConformanceError(f"{name_of(policy)!r} works on text: give the check a tokenizer")
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
        raise ConformanceError(f"{name_of(policy)!r} refuses every carryover size that was tried")


def _check_boundaries(
    policy: Carryover, size: int, rng: random.Random, tokenizer: Tokenizer | None
) -> None:
    bound, heads = policy.bound(size), [None]
    _hold(
        bound is None or (isinstance(bound, int) and bound >= 0),
        f"the bound of {name_of(policy)!r} for m={size} is {bound!r}, no number of tokens",
    )
    asked: list[tuple[TokenIds | None, TokenIds, Any]] = []
    head: TokenIds | None = None
    for _ in range(30):
        window = _random_ids(rng, rng.randint(1, 4 * size + 8), tokenizer)
        answer = _carried(policy, head, window, size)
        asked.append((head, window, answer))
        head = answer[0] if rng.random() < 0.7 else heads[0]
    other = _copied(policy)
    rng.shuffle(asked)
    for head, window, answer in asked:
        blocks = (None if head is None else token_array(head), token_array(window))
        for asker, what, given in (
            (policy, "asked again", (head, window)),
            (other, "copied", (head, window)),
            (policy, "given tokens in one block of memory", blocks),
        ):
            _hold(
                _carried(asker, *given, size) == answer,
                f"{name_of(policy)!r} is not pure: {what}, it carries something else over the same "
                f"boundary (m={size}, head={head!r:.100}, window={window!r:.200})",
            )


def _carried(
    policy: Carryover, head: TokenIds | None, window: TokenIds, size: int
) -> tuple[TokenIds, TokenIds]:
    returned = policy.carry(head, window, size)
    where = f"(m={size}, head={head!r:.100}, window={window!r:.200})"
    try:
        first, rest = (tuple(part) for part in returned)
    except (TypeError, ValueError):
        raise ConformanceError(
            f"{name_of(policy)!r} returned {returned!r:.200}, not a head and a tail {where}"
        ) from None
    for token in first + rest:
        _hold(
            isinstance(token, int) and token >= 0,
            f"{name_of(policy)!r} returned {token!r}, which is no token id {where}",
        )
    bound, found = policy.bound(size), len(first) + len(rest)
    _hold(
        bound is None or found <= bound,
        f"{name_of(policy)!r} returned {found} tokens and promised {bound} at most {where}",
    )
    return first, rest


def _check_traces(
    policy: Carryover, size: int, rng: random.Random, tokenizer: Tokenizer | None
) -> None:
    """Whole traces through the rule, which checks the bound itself."""
    spec = ChunkSpec(2 * size + rng.randint(1, 9), size, 6, carryover=policy)
    for _ in range(5):
        state = start(spec, _random_ids(rng, 3, tokenizer))
        while state.stop is None:
            longest = len(state.query_ids) + spec.max_thinking_context
            _hold(
                0 < state.max_new_tokens <= state.budget_left
                and len(state.prompt_ids) + state.max_new_tokens <= longest,
                f"{name_of(policy)!r} lets a context grow beyond {longest} tokens (m={size})",
            )
            count = rng.randint(1, state.max_new_tokens)
            state = state.advance(_random_ids(rng, count, tokenizer), StopReason.LENGTH)


def _copied(value: Policy) -> Policy:
    """As it would arrive in another process, where its class is not local to a function."""
    try:
        return pickle.loads(pickle.dumps(value))  # type: ignore[no-any-return]
    except (pickle.PicklingError, AttributeError, TypeError):
        return copy.deepcopy(value)


def _random_ids(rng: random.Random, count: int, tokenizer: Tokenizer | None) -> TokenIds:
    known = len(tokenizer) if isinstance(tokenizer, Sized) else _TAGS
    return tuple(rng.randrange(known) for _ in range(count))


def check_boundary(
    boundary: Boundary,
    tokenizer: Tokenizer | None = None,
    texts: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """Whether a boundary policy answers yes or no, and the same each time.

    Args:
        boundary: what is checked.
        tokenizer: bound to it, and the source of random tokens.
        texts: asked about too, where random tokens would hardly ever make a boundary fall.
        seed: of the random chunks.

    Raises:
        ConformanceError: it does not.
    """
    boundary = boundary if tokenizer is None else boundary.bind(tokenizer)
    if boundary.unbound:
        raise ConformanceError(f"{name_of(boundary)!r} works on text: give the check a tokenizer")
    within = getattr(boundary, "within", None)
    _hold(
        isinstance(within, int) and within >= 1,
        f"{name_of(boundary)!r} must say in how many last tokens a boundary may fall: within is "
        f"{within!r}",
    )
    rng, asked = random.Random(seed), []
    chunks = [_random_ids(rng, rng.randint(1, 40), tokenizer) for _ in range(50)]
    chunks += [encode(tokenizer, text) for text in texts if tokenizer is not None]
    for chunk in chunks:
        room = rng.randint(1, boundary.within)
        asked.append((chunk, room, boundary.ends(chunk, room)))
    rng.shuffle(asked)
    other = _copied(boundary)
    for chunk, room, answer in asked:
        _hold(
            bool(boundary.ends(chunk, room)) == bool(answer) == bool(other.ends(chunk, room)),
            f"{name_of(boundary)!r} is not pure: asked twice, it answers differently "
            f"({chunk!r:.200})",
        )


# -- environments ----------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What an environment said."""

    observation: Any
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]

    @property
    def ended(self) -> bool:
        return self.terminated or self.truncated


def check_thinking_env(env: Any, episodes: int = 8, seed: int = 0) -> None:
    """Whether an environment thinks in chunks as this library means it.

    Episodes of random actions are played at chunk or token level, as the action space says: with
    ``Discrete`` actions an action is a token. Checked are the facts in ``info``, what ends an
    episode and how, the budget, the bound of the state, that a seed and actions decide everything,
    that stepping after the end and illegal actions are errors, and, where the environment says by
    which ``chunk_spec`` it goes, that its prompts are the rule's.

    Args:
        env: wrapped or not.
        episodes: how many are played.
        seed: of the random actions, and of ``reset``.

    Raises:
        ConformanceError: it does not; the text says what was expected.
    """
    checker = _EnvChecker(env, random.Random(seed))
    checker.check_start()
    for episode in range(episodes):
        # Some end by themselves, some are ended, some run out of budget.
        end_after = (None, 0, 1, 2)[episode % 4]
        actions, seen = checker.play(seed + episode, end_after)
        again = checker.replay(seed + episode, actions)
        _hold(_same(seen, again), "with the same seed and actions, something else came back")
    checker.check_problem(seed)
    checker.check_errors(seed)


class _EnvChecker:
    def __init__(self, env: Any, rng: random.Random) -> None:
        self.env, self.rng = env, rng
        self.inner = env.unwrapped
        self.by_token = hasattr(env.action_space, "n")
        self.by_text = getattr(env.action_space.dtype, "kind", None) == "U"
        self.eos_ids = frozenset(getattr(self.inner, "eos_ids", ()))
        self._chunk: TokenIds = ()  # the tokens of the chunk at hand, at token level
        self.spec: ChunkSpec | None = getattr(self.inner, "chunk_spec", None)

    # -- one thing at a time -------------------------------------------------------------------

    def check_start(self) -> None:
        fresh = self._reset(seed=0)
        info = fresh.info
        _hold(info["stop"] is None, "info['stop'] must be None after reset")
        _hold(info["num_sampled"] == 0, "info['num_sampled'] must be 0 after reset")
        _hold(info["chunk"] == 0, "info['chunk'] must be 0 after reset")
        _hold(info["carried"] == 0, "nothing can be carried before the first boundary")

    def play(self, seed: int, end_after: int | None) -> tuple[list[Any], list[_Seen]]:
        """An episode; with ``end_after``, an answer is ended in the chunk after so many."""
        seen, actions = [self._reset(seed=seed)], []
        budget = seen[0].info["budget_left"]
        state = self._start(seen[0])
        while not seen[-1].ended:
            before = seen[-1].info
            thinking = before["role"] == ChunkRole.THINKING.value
            wants_end = end_after is not None and before["chunk"] >= end_after and thinking
            action = self._action(before, bool(wants_end and self.eos_ids))
            actions.append(action)
            seen.append(self._step(action))
            self._check_step(before, seen[-1], budget)
            state = self._follow(state, before, action, seen[-1])
            _hold(len(actions) <= 4 * budget + 4, "the episode does not end within its budget")
            if thinking and self._holds_end(action, seen[-1].info, bool(wants_end)):
                _hold(seen[-1].terminated, "an end of the answer must terminate the episode")
        self._refuses(self._action(seen[-2].info, False), "a step after the end of the episode")
        return actions, seen

    def replay(self, seed: int, actions: list[Any]) -> list[_Seen]:
        return [self._reset(seed=seed), *(self._step(action) for action in actions)]

    def check_problem(self, seed: int) -> None:
        """A problem that is given is the one that is asked, whatever the seed."""
        self._reset(seed=seed)
        problem = getattr(self.inner, "problem", None)
        if problem is None:
            return
        first = self._reset(seed=seed + 1, options={"problem": problem})
        second = self._reset(seed=seed + 2, options={"problem": problem})
        _hold(_same([first], [second]), "options={'problem': ...} must decide the problem")

    def check_errors(self, seed: int) -> None:
        info = self._reset(seed=seed).info
        if self.by_token:
            for wrong in (-1, int(self.env.action_space.n), 0.5, None):
                self._refuses(wrong, f"the action {wrong!r}")
            return
        self._refuses("" if self.by_text else [], "an action without a token")
        if not self.by_text:
            token = self._token()
            self._refuses([token] * (info["max_new_tokens"] + 1), "more tokens than max_new_tokens")
            self._refuses([-1], "a negative token")

    # -- what every step must hold -------------------------------------------------------------

    def _check_step(self, before: dict[str, Any], seen: _Seen, budget: int) -> None:
        info = seen.info
        taken = 1 if self.by_token else len(info["output_ids"])
        _hold(taken >= 1, "a step must take at least one token")
        _hold(
            info["num_sampled"] == before["num_sampled"] + taken,
            f"info['num_sampled'] went from {before['num_sampled']} to {info['num_sampled']} over "
            f"{taken} tokens",
        )
        _hold(info["num_sampled"] <= budget, f"more was sampled than the budget of {budget}")
        _hold(
            info["budget_left"] <= before["budget_left"] - (0 if seen.ended else taken),
            "info['budget_left'] must go down by the tokens that were taken, at least",
        )
        _hold(not (seen.terminated and seen.truncated), "terminated and truncated at once")
        ends = {(True, False): "completed", (False, True): "budget", (False, False): None}
        expected = ends[seen.terminated, seen.truncated]
        _hold(
            info["stop"] == expected,
            f"info['stop'] is {info['stop']!r}, where terminated={seen.terminated} and "
            f"truncated={seen.truncated} mean {expected!r}",
        )
        left = (info["max_new_tokens"] == 0) and (info["budget_left"] == 0)
        _hold(left is seen.ended, "tokens are left exactly as long as the episode goes on")
        if seen.ended:
            return
        _hold(
            info["max_new_tokens"] <= info["budget_left"],
            "a chunk may have no more tokens than the budget has left",
        )
        most = None if self.spec is None else self.spec.max_carried
        _hold(
            most is None or info["carried"] <= most,
            f"{info['carried']} tokens are carried, more than the bound of {most}",
        )

    def _holds_end(self, action: Any, info: dict[str, Any], wanted: bool) -> bool:
        """Whether the tokens that were taken end the answer."""
        if self.by_token:
            return int(action) in self.eos_ids
        early = self.spec is not None and self.spec.boundary is not None
        if wanted and self.eos_ids and not self.by_text and not early:
            return True
        return int(info["output_ids"][-1]) in self.eos_ids

    def _start(self, fresh: _Seen) -> ThinkingState | None:
        return None if self.spec is None else start(self.spec, self._visible(fresh))

    def _follow(
        self, state: ThinkingState | None, before: dict[str, Any], action: Any, seen: _Seen
    ) -> ThinkingState | None:
        """Holds what is seen against the rule, step by step."""
        if state is None:
            return None
        if self.by_token:
            return self._follow_token(state, before, int(action), seen)
        output_ids = tuple(map(int, seen.info["output_ids"]))
        ended = output_ids[-1] in self.eos_ids
        state = state.advance(output_ids, StopReason.EOS if ended else StopReason.LENGTH)
        _hold(
            self._visible(seen) == tuple(state.prompt_ids),
            "the prompt after a chunk is not the one that the rule makes",
        )
        return state

    def _follow_token(
        self, state: ThinkingState, before: dict[str, Any], token: int, seen: _Seen
    ) -> ThinkingState:
        chunk = (*self._chunk, token)
        whole = token in self.eos_ids or len(chunk) == state.max_new_tokens
        if not whole and not state.boundary_after(chunk):
            self._chunk = chunk
        else:
            ended = token in self.eos_ids
            state = state.advance(chunk, StopReason.EOS if ended else StopReason.LENGTH)
            self._chunk = chunk if state.stop else ()
        _hold(
            self._visible(seen) == tuple(state.prompt_ids) + self._chunk,
            "the window is not what the rule makes of the tokens so far",
        )
        return state

    # -- talking to it -------------------------------------------------------------------------

    def _reset(self, **options: Any) -> _Seen:
        self._chunk = ()
        observation, info = self.env.reset(**options)
        return self._checked(_Seen(observation, 0.0, False, False, info))

    def _step(self, action: Any) -> _Seen:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._checked(_Seen(observation, float(reward), terminated, truncated, info))

    def _checked(self, seen: _Seen) -> _Seen:
        for key, kind in _FACTS.items():
            _hold(key in seen.info, f"info has no {key!r}")
            value = seen.info[key]
            _hold(isinstance(value, kind), f"info[{key!r}] is {value!r}")
        roles = [role.value for role in ChunkRole]
        _hold(seen.info["role"] in roles, f"info['role'] is {seen.info['role']!r}, none of {roles}")
        if not self.by_token:
            for key in ("prompt_ids", "output_ids"):
                _hold(key in seen.info, f"info has no {key!r}, the exact ids")
        space = self.env.observation_space
        _hold(seen.observation in space, f"an observation is outside {space!r:.200}")
        return seen

    def _visible(self, seen: _Seen) -> TokenIds:
        """The tokens that are seen: the window's, or the prompt's."""
        if self.by_token:
            window = seen.observation
            return tuple(int(i) for i in window["ids"][window["mask"] == 1])
        ids = tuple(int(i) for i in seen.info["prompt_ids"])
        if not self.by_text:
            shown = tuple(int(i) for i in seen.observation)
            _hold(shown == ids, "the observation is not info['prompt_ids']")
        return ids

    def _action(self, info: dict[str, Any], end: bool) -> Any:
        """A random legal action, which ends the answer or does not."""
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
        """A random token that ends nothing."""
        known = int(self.env.action_space.n) if self.by_token else self.inner.vocabulary
        while (token := self.rng.randrange(known)) in self.eos_ids:
            continue
        return token

    def _refuses(self, action: Any, what: str) -> None:
        try:
            self.env.step(action)
        except (DelethinkError, ValueError, TypeError, RuntimeError):
            return
        raise ConformanceError(f"{what} must be an error")


def _same(one: list[_Seen], other: list[_Seen]) -> bool:
    return len(one) == len(other) and all(map(_equal, map(vars, one), map(vars, other)))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    equal = one == other
    return bool(equal.all()) if hasattr(equal, "all") else bool(equal)


def _hold(fact: bool, otherwise: str) -> None:
    if not fact:
        raise ConformanceError(otherwise)
