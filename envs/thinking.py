"""Thinking as a Gymnasium environment: one step is one chunk."""

from __future__ import annotations

from typing import Any

import numpy as np

from delethink.chunking import ThinkingState
from delethink.envs.episode import EpisodeEnv, as_array, as_view
from delethink.envs.spaces import Ids, TokenSequence, UnicodeText
from delethink.errors import ActionError, ConfigError, did_you_mean
from delethink.tokenization import encode, retokenized_at
from delethink.tokens import is_block, token_array
from delethink.types import StopReason, TokenIds, TraceStop

_INTERFACES = ("tokens", "text")
_BYTES = 4  # the most tokens that a character of Unicode is, where a token is at least a byte


class ThinkingEnv(EpisodeEnv[Any, Any]):
    """One episode is one trace: a problem, answered chunk by chunk.

    Args:
        interface: ``"tokens"``: actions and observations are token ids. ``"text"``: they are text,
            which the tokenizer turns into ids; an end of the answer is spelt as its token.
        options: see ``EpisodeEnv``.

    An action is a chunk. One that holds EOS ends the trace there; any other leads to a boundary,
    also where the chunk is not full. What lies beyond the end, or beyond a boundary that the spec's
    predicate places, was never sampled: it is left out (``ignored``). The observation is the prompt
    of the next chunk, and ``info`` says

    - ``prompt_ids`` and ``output_ids``: the exact ids of that prompt, and of the chunk just taken;
    - ``max_new_tokens``: how many tokens the next chunk may have; 0 after the end;
    - ``role``: ``"thinking"``, or ``"carryover"`` where the chunk writes what is carried;
    - ``chunk``: its index; ``carried``: how many thinking tokens it starts with;
    - ``num_sampled`` and ``budget_left``: tokens so far, and the most that may follow;
    - ``ignored``: tokens of the action that were left out;
    - ``stop``: at the end, why;
    - ``retokenized_at``, with text only: the first position of ``prompt_ids`` from which the
      observation, as text, would be other tokens; -1 where there is none.
    """

    def __init__(self, *args: Any, interface: str = "tokens", **options: Any) -> None:
        super().__init__(*args, **options)
        if interface not in _INTERFACES:
            raise ConfigError(
                f"unknown interface {interface!r}.{did_you_mean(str(interface), _INTERFACES)}"
            )
        self.interface = interface
        spec = self.chunk_spec
        longest = max(spec.context_size, 1 if spec.is_longcot else spec.max_written)
        always = spec.context_size - (0 if spec.is_longcot else spec.carryover_size)
        if spec.max_written:
            always = min(always, spec.max_written)
        # Where no chunk had more than C - m tokens, the next may have as many: so random ones do.
        if interface == "tokens":
            self.action_space: Any = TokenSequence(
                self.vocabulary, longest, min_length=1, sample_length=always
            )
            self.observation_space: Any = TokenSequence(
                self.vocabulary, self.longest_context, min_length=1
            )
            return
        pieces = getattr(self.tokenizer, "pieces", None)
        token = self._longest_token()
        self.action_space = UnicodeText(
            longest * token,
            min_length=1,
            pieces=pieces,
            sample_length=always if pieces else max(1, always // _BYTES),
        )
        self.observation_space = UnicodeText(self.longest_context * token, pieces=pieces)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Draws a problem, or takes ``options["problem"]``.

        Raises:
            QueryTooLongError: the query has more than ``max_query_tokens`` tokens.
            ConfigError: an unknown option.
        """
        return self._seen(self._begin(seed, options), token_array(()), 0)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Takes one chunk.

        Raises:
            ActionError: the chunk is empty, too long or not of known ids, or the trace has ended.
        """
        state = self._running_state()
        numbers = self._numbers(action, state)
        given = action if is_block(action) else token_array(numbers)
        end = self._end(numbers)
        if end is None:
            output_ids, stop = state.cut(given, StopReason.LENGTH)
        else:
            output_ids, stop = state.cut(given[: end + 1], StopReason.EOS)
        if len(output_ids) > state.max_new_tokens:
            raise ActionError(
                f"this chunk takes {state.max_new_tokens} tokens at most, got {len(output_ids)}"
            )
        state, reward = self._take(output_ids, stop)
        observation, info = self._seen(state, output_ids, len(given) - len(output_ids))
        terminated, truncated = state.stop is TraceStop.COMPLETED, state.stop is TraceStop.BUDGET
        return observation, reward, terminated, truncated, info

    def _numbers(self, action: Any, state: ThinkingState) -> Ids:
        """The action as an array of ids."""
        space = self.action_space
        if self.interface == "text":
            if not space.contains(action):
                raise ActionError(
                    f"an action is a text of 1 to {space.max_length} characters that "
                    f"the tokenizer knows, got {action!r:.200}"
                )
            ids = np.asarray(encode(self.tokenizer, action))
            space = TokenSequence(self.vocabulary, max(1, len(ids)), min_length=1)
        else:
            ids = _array(action)
        if not space.contains(ids):
            raise ActionError(
                f"an action is 1 to {state.max_new_tokens} token ids below {self.vocabulary}, got "
                f"{action!r:.200}"
            )
        return ids.astype(np.int64, copy=False)

    def _end(self, numbers: Ids) -> int | None:
        """The place of the first EOS, as nothing is sampled after it, if there is one."""
        ends = [places[0] for e in self.eos_ids if (places := (numbers == e).nonzero()[0]).size]
        return int(min(ends)) if ends else None

    def _seen(
        self, state: ThinkingState, output_ids: TokenIds, ignored: int
    ) -> tuple[Any, dict[str, Any]]:
        prompt_ids = state.prompt_ids
        info = self._facts(state)
        info["prompt_ids"], info["output_ids"] = prompt_ids, output_ids
        info["ignored"] = ignored
        if self.interface == "tokens":
            return as_array(prompt_ids), info
        differs = retokenized_at(self.tokenizer, prompt_ids)
        info["retokenized_at"] = -1 if differs is None else differs
        return self._text(prompt_ids), info

    def _longest_token(self) -> int:
        """The most characters of a token."""
        if hasattr(self.tokenizer, "get_vocab"):
            return max(map(len, self.tokenizer.get_vocab()))
        return max(len(self._text((i,))) for i in range(self.vocabulary))


def _array(action: Any) -> Any:
    """Ids as an array, or an array that holds none."""
    if is_block(action):
        return as_view(action)
    try:
        return np.asarray(action)
    except (TypeError, ValueError, RuntimeError):  # ragged; a tensor of another device
        return np.asarray(None)
