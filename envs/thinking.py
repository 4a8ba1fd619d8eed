"""Thinking as a Gymnasium environment with one chunk per step."""

from __future__ import annotations

from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from delethink.chunking import ThinkingState
from delethink.envs.episode import EpisodeEnv
from delethink.envs.spaces import Ids, TokenSequence, UnicodeText
from delethink.errors import ActionError, ConfigError, did_you_mean
from delethink.tokenization import encode, retokenized_at
from delethink.tokens import token_array
from delethink.types import TokenIds, TraceStop

_INTERFACES = ("tokens", "text")
# Vocabulary and longest token of each tokenizer: a vocabulary of 262,144 takes a second to read.
_LONGEST_TOKENS: WeakKeyDictionary[Any, tuple[int, int]] = WeakKeyDictionary()
_MAX_CHARACTER_TOKENS = 4  # UTF-8 bytes of a character, each at most one token


class ThinkingEnv(EpisodeEnv[Any, Any]):
    """One episode is one trace: a problem, answered chunk by chunk.

    Args:
        interface: ``"tokens"`` for actions and observations of token ids, or ``"text"``. With
            ``"text"`` the tokenizer encodes actions; the text of the EOS token ends the answer.
        options: see ``EpisodeEnv``.

    An action is a chunk. A chunk with EOS ends the trace there. Any other chunk leads to a
    boundary, also where the chunk is not full. Tokens after EOS or after an early boundary are
    ignored. The observation is the prompt of the next chunk. ``info`` contains

    - ``prompt_ids`` and ``output_ids``: the exact ids of that prompt and of the last chunk;
    - ``max_new_tokens``: the maximum length of the next chunk; 0 after the end;
    - ``role``: ``"thinking"``, or ``"carryover"`` for a chunk that writes the carryover;
    - ``chunk``: the index of the next chunk; ``carried``: its number of carried tokens;
    - ``num_sampled`` and ``budget_left``: tokens so far, and the maximum still to come;
    - ``ignored``: number of ignored tokens of the action;
    - ``stop``: the stop reason after the end;
    - ``retokenized_at``, with text only: the first position of ``prompt_ids`` at which encoding the
      observation again gives other tokens; -1 if none.
    """

    def __init__(self, *args: Any, interface: str = "tokens", **options: Any) -> None:
        super().__init__(*args, **options)
        if interface not in _INTERFACES:
            raise ConfigError(
                f"unknown interface {interface!r}.{did_you_mean(str(interface), _INTERFACES)}"
            )
        self.interface = interface
        spec = self.chunk_spec
        longest = max(spec.context_size, spec.max_written)
        # Every chunk has room for C - m tokens, so samples of this length are always legal.
        always = spec.context_size - (0 if spec.is_longcot else spec.carryover_size)
        always = min(always, spec.max_written or always)
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
            sample_length=always if pieces else max(1, always // _MAX_CHARACTER_TOKENS),
        )
        self.observation_space = UnicodeText(self.longest_context * token, pieces=pieces)

    def _longest_token(self) -> int:
        """Return the maximum number of characters of a token, computed once per tokenizer."""
        try:
            known, longest = _LONGEST_TOKENS.get(self.tokenizer, (0, 0))
        except TypeError:  # without a hash or weak references
            known = longest = 0
        if known == self.vocabulary:
            return longest
        if hasattr(self.tokenizer, "get_vocab"):
            longest = max(map(len, self.tokenizer.get_vocab()))
        else:
            longest = max(len(self._text((i,))) for i in range(self.vocabulary))
        with suppress(TypeError):
            _LONGEST_TOKENS[self.tokenizer] = self.vocabulary, longest
        return longest

    def _begin(self, state: ThinkingState) -> tuple[Any, dict[str, Any]]:
        return self._observe(state, (), 0)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Add one chunk to the trace.

        Raises:
            ActionError: the chunk is empty, too long or has unknown ids, or the trace has ended.
        """
        state = self._running_state()
        numbers = self._action_ids(action, state)
        ids = token_array(numbers)
        output_ids, stop = state.read_chunk(ids, self.eos_ids)
        if len(output_ids) > state.max_new_tokens:
            raise ActionError(
                f"this chunk may have at most {state.max_new_tokens} tokens, got {len(output_ids)}"
            )
        state, reward = self._finish_chunk(output_ids, stop)
        observation, info = self._observe(state, output_ids, len(ids) - len(output_ids))
        terminated, truncated = state.stop is TraceStop.COMPLETED, state.stop is TraceStop.BUDGET
        return observation, reward, terminated, truncated, info

    def _action_ids(self, action: Any, state: ThinkingState) -> Ids:
        space = self.action_space
        if self.interface == "text":
            if not space.contains(action):
                raise ActionError(
                    f"an action must be a text of 1 to {space.max_length} characters known to "
                    f"the tokenizer, got {action!r:.200}"
                )
            ids = np.asarray(encode(self.tokenizer, action))
            if not TokenSequence(self.vocabulary, len(ids), min_length=1).contains(ids):
                raise ActionError(
                    f"an action must be a text of 1 to {state.max_new_tokens} token ids below "
                    f"{self.vocabulary}, and the tokenizer encodes {action!r:.200} as "
                    f"{ids.tolist()!r:.80}"
                )
            return ids.astype(np.int64, copy=False)
        else:
            try:
                ids = np.asarray(action)
            except (TypeError, ValueError, RuntimeError):  # ragged, or a tensor on another device
                ids = np.asarray(None)  # outside every space
        if not space.contains(ids):
            raise ActionError(
                f"an action must be 1 to {state.max_new_tokens} token ids below "
                f"{self.vocabulary}, got {action!r:.200}"
            )
        return ids.astype(np.int64, copy=False)

    def _observe(
        self, state: ThinkingState, output_ids: TokenIds, ignored: int
    ) -> tuple[Any, dict[str, Any]]:
        prompt_ids = state.prompt_ids
        info = self._facts(state)
        info |= {"prompt_ids": prompt_ids, "output_ids": output_ids, "ignored": ignored}
        if self.interface == "tokens":
            return np.array(prompt_ids, np.int64), info
        position = retokenized_at(self.tokenizer, prompt_ids)
        info["retokenized_at"] = -1 if position is None else position
        return self._text(prompt_ids), info
