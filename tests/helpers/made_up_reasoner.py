"""A made-up reasoner: its next token depends on the whole prompt, as in a greedy model."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from chat_tokenizers import END, make_chat_tokenizer

from delethink import Completion, Sampling, StopReason, TokenIds
from delethink.policy import TokenListener

MARK = "</think>"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<think>{% endif %}"
)
TOKENIZER = make_chat_tokenizer(TEMPLATE, marks=["<think>"])
EOS = TOKENIZER.convert_tokens_to_ids(END)
LETTERS = [TOKENIZER(letter)["input_ids"][0] for letter in "abc "]
MARK_IDS = tuple(TOKENIZER(MARK)["input_ids"])
HALVES = tuple(TOKENIZER("\u00e9\U0001f600")["input_ids"])  # bytes of two characters


class MadeUpReasoner:
    """Samples letters, bytes of characters, marks and ends, by a hash of the prompt.

    Args:
        seed: another reasoner.
        ends: chance of 256 that a token ends the answer; ``marks`` begins a mark.
        pieces: sizes of streamed pieces, in turn; without it nothing is streamed.
    """

    def __init__(
        self, seed: int = 0, ends: int = 4, marks: int = 8, pieces: Sequence[int] = ()
    ) -> None:
        self._seed, self._ends, self._marks = seed, ends, marks
        self._pieces = pieces
        self.sampled = 0
        if pieces:
            self.stream = self._stream  # the method is optional

    def next_token(self, ids: TokenIds) -> int:
        value = zlib.crc32(repr((self._seed, ids)).encode())
        for count in range(len(MARK_IDS) - 1, 0, -1):  # a mark that has begun mostly goes on
            if ids[-count:] == MARK_IDS[:count] and value % 32:
                return MARK_IDS[count]
        if ids[-1] in HALVES[:-1] and HALVES.index(ids[-1]) not in (1,):
            return HALVES[HALVES.index(ids[-1]) + 1]
        kind, pick = value % 256, value >> 8
        if kind < self._ends:
            return EOS
        if kind < self._ends + self._marks:
            return MARK_IDS[0]
        if kind < self._ends + self._marks + 20:
            return HALVES[(0, 2)[pick % 2]]
        return LETTERS[pick % len(LETTERS)]

    def complete(self, prompt_ids: TokenIds, max_new_tokens: int) -> tuple[int, ...]:
        ids = tuple(prompt_ids)
        while len(ids) < len(prompt_ids) + max_new_tokens:
            ids += (self.next_token(ids),)
            if ids[-1] == EOS:
                break
        return ids[len(prompt_ids) :]

    async def generate(
        self, prompt_ids: TokenIds, max_new_tokens: int, sampling: Sampling
    ) -> Completion:
        ids = self.complete(prompt_ids, max_new_tokens)
        self.sampled += len(ids)
        stop = StopReason.EOS if ids[-1] == EOS else StopReason.LENGTH
        return Completion(ids, tuple(-float(token) for token in ids), stop)

    async def _stream(
        self,
        prompt_ids: TokenIds,
        max_new_tokens: int,
        sampling: Sampling,
        on_tokens: TokenListener,
    ) -> Completion:
        done = await self.generate(prompt_ids, max_new_tokens, sampling)
        start = turn = 0
        while start < len(done.token_ids):
            end = start + self._pieces[turn % len(self._pieces)]
            on_tokens(done.token_ids[start:end], done.logprobs[start:end])
            start, turn = end, turn + 1
        return done
